"""The supervisor: starts the children in order, keeps them alive, stops them in the reverse order."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from webapp.run import StartError
from webapp.run.data_dir import write_private
from webapp.run.embedded import EmbeddedRedis, ping_redis
from webapp.run.network import ensure_certificate, host_names, in_url, local_addresses, print_qr
from webapp.run.options import Options
from webapp.run.preparation import note_done, still_needed
from webapp.run.processes import COLLECT_STATIC, DEATHS_ALLOWED, MIGRATE, PROCESSES, REDIS, WEB, Child, Process


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
        needed = still_needed(self.first, self.options, self.env)
        steps = [self.keep(process, [sys.executable, *process.arguments]) for process in needed]
        self._start_redis(redis)
        if self.options.is_public:
            names = ["localhost", "127.0.0.1", *local_addresses(self.options.host), *host_names()]
            self.tls = ensure_certificate(self.options.data_dir / "tls", names, datetime.datetime.now(datetime.UTC))
            self._say("certificate for the local network")
        self._finish(steps)
        if needed:
            note_done(self.options, self.env)

    def _start_redis(self, redis: EmbeddedRedis | None) -> None:
        """Until the embedded one answers; one that REDIS_URL names has to answer at once."""
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

    def _finish(self, steps: list[Child]) -> None:
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
        url = f"{'https' if self.tls else 'http'}://{in_url(host)}:{self.options.port}/healthz/"
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
            print_qr(self.options.address)

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
        write_private(self.options.data_dir / "run.json", json.dumps(state, indent=1))

    def _pause(self, seconds: float) -> None:
        if self.asked_to_stop:
            raise KeyboardInterrupt
        time.sleep(seconds)

    def _say(self, what: str) -> None:
        print(f"- {time.monotonic() - self.started:5.1f} s  {what}")
