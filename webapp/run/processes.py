"""The processes that the studio consists of, and one of them as it runs: its life, its deaths, its log."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from webapp.run import ROOT

DEATHS_ALLOWED, DEATHS_WINDOW_S = 5, 60.0
LOG_LIMIT_BYTES = 20_000_000


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
