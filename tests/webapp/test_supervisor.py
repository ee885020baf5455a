"""What `make run` starts: the embedded server, the processes, and that nothing outlives their supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from webapp.run import ROOT, processes
from webapp.run.embedded import EmbeddedRedis, ping_redis
from webapp.run.network import free_port
from webapp.run.processes import PROCESSES, WEB, Child, Process


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder with a short name: pytest's are too long for a unix socket in some places."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp") as folder:
        yield Path(folder)


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
