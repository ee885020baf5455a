"""`make run`: what it refuses and how it says so, what it makes, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import bootstrap
from webapp.run import ROOT, StartError, processes
from webapp.run.data_dir import check_data_dir, load_secrets, lock
from webapp.run.embedded import EmbeddedRedis, ping_redis
from webapp.run.network import check_port, ensure_certificate, free_port
from webapp.run.options import Options, environment
from webapp.run.preparation import fingerprints
from webapp.run.processes import PROCESSES, WEB, Child, Process
from webapp.run.supervisor import Supervisor

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder with a short name: pytest's are too long for a unix socket in some places."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp") as folder:
        yield Path(folder)


def options(data_dir: Path, **env: str) -> Options:
    return Options.from_environment({"DATA_DIR": str(data_dir), **env})


# What is refused ------------------------------------------------------------------------------------------------------


def test_port_in_use_names_another_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartError, match=f"Port {port} is in use.*make run PORT={port + 1}"):
            check_port("127.0.0.1", port)


def test_free_port_is_taken() -> None:
    check_port("127.0.0.1", free_port())


@pytest.mark.parametrize("port", ["0", "70000", "http", "-1"])
def test_port_that_is_none_is_named(port: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"PORT is '{port}'"):
        options(tmp_path, PORT=port)


def test_foreign_host_is_named() -> None:
    with pytest.raises(StartError, match=r"192\.0\.2\.7"):
        check_port("192.0.2.7", 8000)


def test_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StartError, match=r"cannot be written.*make run DATA_DIR="):
        check_data_dir(tmp_path / "data")


def test_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"0\.1 GB free and 0\.5 GB is the least"):
        check_data_dir(tmp_path, free_gb=lambda path: 0.1)


def test_second_run_on_one_data_dir_is_told_of_the_first(tmp_path: Path) -> None:
    first = options(tmp_path)
    with lock(first.data_dir):
        Supervisor(first, {"REDIS_URL": ""})._write_state()
        with pytest.raises(StartError, match=rf"already runs on .*http://localhost:8000/ \(process {os.getpid()}\)"):
            lock(first.data_dir).__enter__()
    with lock(first.data_dir):
        pass  # and it may start once the first is gone


def test_damaged_secrets_are_not_replaced_in_silence(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(StartError, match="damaged"):
        load_secrets(tmp_path)


# The environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "problem"),
    [((3, 8), "too old"), ((2, 7), "too old"), ((3, 11), None), ((3, 14), None), ((3, 15), "too new")],
)
def test_python_that_does_not_fit(version: tuple[int, int], problem: str | None) -> None:
    said = bootstrap.python_problem(version)
    assert (said is None) if problem is None else (problem in str(said))


def test_old_pythons_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: "/usr/bin/python3" if name == "python3" else None)
    monkeypatch.setattr(bootstrap, "_version", lambda path: (3, 8))
    with pytest.raises(bootstrap.SetupError, match=r"3\.11 to 3\.14 is needed.*3\.8 is too old \(/usr/bin/python3\)"):
        bootstrap.find_python()


def test_python_range_is_that_of_the_project() -> None:
    wanted = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    oldest, newest = bootstrap.OLDEST, bootstrap.NEWEST
    assert wanted is not None
    assert wanted[1] == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


def test_set_up_without_disk_is_refused() -> None:
    with pytest.raises(bootstrap.SetupError, match=r"needs 9 GB of disk and .* has 2\.0 GB free"):
        bootstrap.check_disk(2.0, needed_gb=9)


@pytest.mark.parametrize(
    ("words", "is_network"),
    [
        ("error: Failed to fetch: `x`\n  Caused by: client error (Connect)", True),
        ("npm error code ENOTFOUND", True),
        ("NewConnectionError: Temporary failure in name resolution", True),
        ("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", False),
    ],
)
def test_missing_network_is_told_from_other_failures(words: str, is_network: bool) -> None:
    assert bootstrap.network_failed(words) is is_network


def test_run_needs_nothing_where_all_is_installed_for_tests() -> None:
    uv, dev = bootstrap._lock_hash("requirements/uv.txt"), bootstrap._lock_hash("requirements/dev.txt")
    assert bootstrap._satisfies({"uv": uv, "dev": dev}, "run")
    assert not bootstrap._satisfies({"uv": uv, "run": bootstrap._lock_hash("requirements/run.txt")}, "dev")
    assert not bootstrap._satisfies({"uv": uv, "dev": "an older lock"}, "run")


def test_what_runs_has_the_same_versions_under_test() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[\w.\[\]-]+==\S+", (ROOT / "requirements" / name).read_text(), re.MULTILINE))

    assert pins("run.txt") <= pins("dev.txt")
    assert pins("web.txt") | pins("engine.txt") <= pins("run.txt")


def test_locks_name_no_host() -> None:
    for path in [*(ROOT / "requirements").glob("*.txt"), ROOT / "package-lock.json"]:
        assert "://" not in path.read_text(), path.name


# What is made at the first start --------------------------------------------------------------------------------------


def test_secrets_are_private_and_kept(tmp_path: Path) -> None:
    first = load_secrets(tmp_path)
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert len(first["secret_key"]) >= 50
    assert load_secrets(tmp_path) == first


def test_secrets_that_others_could_read_are_closed(tmp_path: Path) -> None:
    load_secrets(tmp_path)
    (tmp_path / "secrets.json").chmod(0o644)
    load_secrets(tmp_path)
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_children_are_told_the_settings(tmp_path: Path) -> None:
    own = {"secret_key": "generated", "redis_password": "x"}
    told = environment(options(tmp_path), own, "unix://:x@/s?db=0", {"MAKELEVEL": "1", "LANG": "C.UTF-8"})
    assert told["SECRET_KEY"] == "generated"
    assert told["REDIS_URL"] == "unix://:x@/s?db=0"
    assert told["DATA_DIR"] == str(tmp_path)
    assert told["DATABASE_URL"] == f"sqlite:///{tmp_path}/db.sqlite3"
    assert told["HTTPS"] == "0"
    assert told["LANG"] == "C.UTF-8"
    assert "MAKELEVEL" not in told


def test_what_the_person_set_wins(tmp_path: Path) -> None:
    env = {"SECRET_KEY": "mine", "DATABASE_URL": "postgres://u@h/d", "ALLOWED_HOSTS": "studio.example"}
    told = environment(options(tmp_path), {"secret_key": "generated"}, "redis://", env)
    assert (told["SECRET_KEY"], told["DATABASE_URL"]) == ("mine", "postgres://u@h/d")
    assert told["ALLOWED_HOSTS"] == "studio.example,127.0.0.1"


def test_open_host_is_served_over_tls_to_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webapp.run.options.local_addresses", lambda host: ["192.168.1.5"])
    chosen = options(tmp_path, HOST="0.0.0.0", PORT="8443")
    told = environment(chosen, {"secret_key": "x"}, "redis://", {})
    assert chosen.address == "https://192.168.1.5:8443/"
    assert told["HTTPS"] == "1"
    assert "192.168.1.5" in told["ALLOWED_HOSTS"].split(",")
    assert "https://192.168.1.5:8443" in told["CSRF_TRUSTED_ORIGINS"].split(",")


def test_certificate_is_kept_until_a_name_is_new_or_it_expires(tmp_path: Path) -> None:
    certificate, key = ensure_certificate(tmp_path, ["localhost", "192.168.1.5"], NOW)
    assert key.stat().st_mode & 0o777 == 0o600
    first = certificate.read_bytes()
    ensure_certificate(tmp_path, ["192.168.1.5"], NOW)
    assert certificate.read_bytes() == first
    ensure_certificate(tmp_path, ["localhost", "10.0.0.9"], NOW)
    second = certificate.read_bytes()
    assert second != first
    ensure_certificate(tmp_path, ["localhost"], NOW + datetime.timedelta(days=799))
    assert certificate.read_bytes() != second


# What a second start leaves out ------------------------------------------------------------------------------------


def prepared(data_dir: Path, database: str = "") -> dict[str, str]:
    return fingerprints(options(data_dir), {"DATABASE_URL": database or f"sqlite:///{data_dir}/db.sqlite3"})


def test_database_is_migrated_again_once_it_is_another(tmp_path: Path) -> None:
    assert prepared(tmp_path)["migrate"] == "", "there is none yet"
    with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite3")) as database:
        assert prepared(tmp_path)["migrate"] == "", "it is empty"
        database.execute("CREATE TABLE django_migrations (id INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO django_migrations VALUES (1), (2)")
        database.commit()
        migrated = prepared(tmp_path)["migrate"]
        assert migrated
        assert prepared(tmp_path)["migrate"] == migrated
        database.execute("DELETE FROM django_migrations WHERE id = 2")  # as after a backup is brought back
        database.commit()
    assert prepared(tmp_path)["migrate"] != migrated


def test_database_server_is_always_asked(tmp_path: Path) -> None:
    assert prepared(tmp_path, "postgres://u@h/d")["migrate"] == ""


def test_static_files_are_collected_where_there_are_none(tmp_path: Path) -> None:
    assert prepared(tmp_path)["collectstatic"] == ""
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "staticfiles.json").write_text("{}")
    assert prepared(tmp_path)["collectstatic"] != ""


# The embedded server --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["socket", "loopback"])
def server(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[EmbeddedRedis]:
    folder = data_dir if request.param == "socket" else data_dir / ("long" * 30)
    embedded = EmbeddedRedis.find(folder, "the-password")
    assert embedded.url.startswith("unix://" if request.param == "socket" else "redis://")
    with subprocess.Popen(embedded.command, stdout=subprocess.DEVNULL) as process:
        for _ in range(100):
            if ping_redis(embedded.url) is None:
                break
            time.sleep(0.05)
        yield embedded
        process.terminate()


def test_embedded_server_answers_only_with_its_password(server: EmbeddedRedis) -> None:
    assert ping_redis(server.url) is None
    assert "uthentication" in str(ping_redis(server.url.replace(":the-password@", "")))
    assert not any("the-password" in word for word in server.command)
    assert (server.folder / "server.conf").stat().st_mode & 0o777 == 0o600


# The supervisor, with small programs in the place of site and workers ------------------------------------------------

SITE = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""
WORKER = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: (print("gone well", flush=True), os._exit(0)))
print("me@here ready.", os.environ["WORKER_QUEUE"][:0], sep="", flush=True)
while True: time.sleep(1)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x ready.', flush=True); time.sleep(99)"
)
MAIN = """
import os, sys
from webapp.run.data_dir import load_secrets, lock
from webapp.run.embedded import EmbeddedRedis
from webapp.run.options import Options, environment
from webapp.run.processes import Process
from webapp.run.supervisor import Supervisor
options = Options.from_environment(os.environ)
own = load_secrets(options.data_dir)
redis = EmbeddedRedis.find(options.data_dir, own["redis_password"])
env = environment(options, own, redis.url, os.environ)
worker = Process("training", ("-c", os.environ["WORKER"]), {"WORKER_QUEUE": "training"}, 1, " ready.")
supervisor = Supervisor(options, env, (Process("web", ("-c", os.environ["SITE"])), worker), ())
with lock(options.data_dir), supervisor.signals():
    sys.exit(supervisor.run(redis))
"""


class Studio:
    """A supervisor in a process of its own, that has come to be ready."""

    def __init__(self, data_dir: Path, worker: str = WORKER) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        env = {**os.environ, "DATA_DIR": str(data_dir), "PORT": str(self.port), "SITE": SITE, "WORKER": worker}
        self.popen = subprocess.Popen(
            [sys.executable, "-u", "-c", MAIN],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.popen.stdout is not None
        self.said = []
        for line in self.popen.stdout:
            self.said.append(line)
            if "stop: Ctrl-C" in line:
                break
        else:
            pytest.fail("".join(self.said))

    @property
    def pids(self) -> dict[str, int]:
        return dict(json.loads((self.data_dir / "run.json").read_text())["processes"])

    def finish(self) -> str:
        rest, _ = self.popen.communicate(timeout=20)
        return rest

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(claim: object, timeout_s: float = 10) -> None:
    assert callable(claim)
    until = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_is_stopped_in_order(data_dir: Path, number: signal.Signals) -> None:
    with Studio(data_dir) as studio:
        pids = studio.pids
        assert set(pids) == {"redis", "web", "training"}
        assert f"http://localhost:{studio.port}/" in "".join(studio.said)
        studio.popen.send_signal(number)
        assert "stopped" in studio.finish()
        assert studio.popen.returncode == 0
        assert not any(map(is_alive, pids.values()))
        assert "gone well" in (data_dir / "logs" / "training.log").read_text()
        assert not (data_dir / "run.json").exists()


def test_nothing_outlives_a_killed_supervisor(data_dir: Path) -> None:
    with Studio(data_dir) as studio:
        pids = studio.pids
        studio.popen.kill()
        wait_until(lambda: not any(map(is_alive, pids.values())))


def test_dead_worker_is_started_again(data_dir: Path) -> None:
    with Studio(data_dir) as studio:
        before = studio.pids["training"]
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: studio.pids.get("training", before) != before)
        assert is_alive(studio.pids["training"])
        studio.popen.terminate()
        assert "training ended by signal 9" in studio.finish()


def test_worker_that_does_not_stop_is_killed_after_its_time(data_dir: Path) -> None:
    with Studio(data_dir, STUBBORN) as studio:
        pid = studio.pids["training"]
        studio.popen.terminate()
        assert "training did not stop within 1 s" in studio.finish()
        assert not is_alive(pid)


def test_logs_of_the_start_before_are_kept(data_dir: Path) -> None:
    for _ in range(2):
        with Studio(data_dir) as studio:
            studio.popen.terminate()
            studio.finish()
    assert {"training.log", "training.log.1", "web.log", "redis.log"} <= {
        path.name for path in (data_dir / "logs").iterdir()
    }


def child(tmp_path: Path) -> Child:
    return Child(Process("web", ()), [], {}, tmp_path / "web.log")


def test_five_deaths_within_a_minute_are_enough(tmp_path: Path) -> None:
    web = child(tmp_path)
    assert [web.died(now) for now in (0.0, 10.0, 20.0, 30.0, 40.0)] == [True, True, True, True, False]


def test_rare_deaths_are_forgiven(tmp_path: Path) -> None:
    web = child(tmp_path)
    assert all(web.died(now) for now in range(0, 1000, 20))


def test_errors_in_a_log_are_repeated(tmp_path: Path) -> None:
    web = child(tmp_path)
    web.log.write_text(
        "2026-11-23 INFO webapp: all is well\n2026-11-23 ERROR django.request: Internal Server Error: /x\n"
        "Traceback (most recent call last):\n  File x\nValueError: 5\nan unfinished ERROR li"
    )
    assert web.errors(web.new_lines()) == [
        "2026-11-23 ERROR django.request: Internal Server Error: /x",
        "ValueError: 5",
    ]
    with web.log.open("a") as log:
        log.write("ne\n")
    assert web.errors(web.new_lines()) == ["an unfinished ERROR line"]


def test_long_log_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_LIMIT_BYTES", 100)
    web = child(tmp_path)
    web.log.write_text("x" * 120 + "\n")
    web.new_lines()
    assert web.log.read_text() == ""
    assert len((tmp_path / "web.log.1").read_text()) == 121


# Containers -----------------------------------------------------------------------------------------------------------


def test_compose_starts_the_same_processes() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {process.name for process in PROCESSES} == set(services) - {"setup", "valkey", "postgres"}
    for process in PROCESSES:
        service = services[process.name]
        bound = ["--host", "0.0.0.0", "--port", "8000"] if process is WEB else []
        assert service["command"] == ["python", *process.arguments, *bound]
        assert service["stop_grace_period"] == f"{process.grace_s}s"
        assert service["environment"].items() >= process.env.items()


# Documentation --------------------------------------------------------------------------------------------------------


def test_every_setting_is_in_the_readme() -> None:
    read = re.findall(r'env\.\w+\(\s*"([A-Z_]+)"', (ROOT / "webapp" / "settings.py").read_text())
    for path in (ROOT / "webapp" / "run").glob("*.py"):
        read += re.findall(r'env\.get\("([A-Z_]+)"', path.read_text())
    documented = re.findall(r"^\| `([A-Z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(read) > 10
    assert set(read) == set(documented)
