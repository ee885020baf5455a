"""A whole studio of its own, as `make run` starts it, and a visitor who speaks HTTP to it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_S = 240  # a busy machine with cold caches; a warm one needs seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Studio:
    """Site, workers and Valkey on a free port of 127.0.0.1, with a data folder that goes when it does."""

    def __init__(self, **env: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fewshot-studio-")
        self.data_dir = Path(self.folder.name)
        self.port = free_port()
        self.env = {
            k: v for k, v in os.environ.items() if k not in ("SECRET_KEY", "REDIS_URL", "DATABASE_URL", "DEBUG")
        }
        self.env |= {"PORT": str(self.port), "HOST": "127.0.0.1", "DATA_DIR": str(self.data_dir), **env}
        self.env.pop("ALLOWED_HOSTS", None)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start it and wait until it is healthy; returns the seconds that took."""
        begun = time.monotonic()
        with (self.data_dir / "run.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "webapp.run"], cwd=ROOT, env=self.env, stdout=log, stderr=log
            )
        while time.monotonic() - begun < START_S:
            if self.process.poll() is not None:
                break
            if self.health() == 200:
                return time.monotonic() - begun
            time.sleep(0.1)
        raise RuntimeError(f"the studio did not start:\n{self.logs()}")

    def health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/healthz/")
            with connection.getresponse() as answer:
                return answer.status
        except OSError:
            return 0
        finally:
            connection.close()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.folder.cleanup()

    def logs(self, last: int = 30) -> str:
        files = [self.data_dir / "run.log", *sorted(self.data_dir.glob("logs/*.log"))]
        parts = [(f.name, f.read_text(errors="replace").splitlines()[-last:]) for f in files if f.exists()]
        return "\n".join(f"== {name}\n" + "\n".join(lines) for name, lines in parts)

    def manage(self, *arguments: str) -> str:
        """`manage.py` with this studio's settings."""
        done = subprocess.run(
            [sys.executable, "-m", "webapp.run", "manage", *arguments],
            cwd=ROOT, env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def __enter__(self) -> Studio:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


class Visitor:
    """A browser without a screen: cookies, CSRF, JSON. One connection, kept open."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
        self.cookies: dict[str, str] = {}
        self.token = ""

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        sent = {"Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items()), "X-CSRFToken": self.token, **headers}
        try:
            self.connection.request(method, path, body, sent)
            answer = self.connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected):  # the server closed the idle connection
            self.connection.close()
            self.connection.request(method, path, body, sent)
            answer = self.connection.getresponse()
        data = answer.read()
        for line in answer.headers.get_all("Set-Cookie", []):
            name, _is, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        found = re.search(rb'name="csrf-token" content="([^"]+)"', data)
        if found:
            self.token = found[1].decode()
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, data

    def get(self, path: str) -> tuple[int, bytes]:
        status, _headers, data = self.request("GET", path)
        return status, data

    def post(self, path: str, **fields: str) -> tuple[int, str]:
        """A form; returns the status and where it leads."""
        body = urllib.parse.urlencode({"csrfmiddlewaretoken": self.token, **fields}).encode()
        kind = {"Content-Type": "application/x-www-form-urlencoded", "Referer": self.studio.url}
        status, headers, _data = self.request("POST", path, body, **kind)
        return status, headers.get("location", "")

    def post_json(self, path: str, said: Any) -> Any:
        status, _headers, data = self.request(
            "POST", path, json.dumps(said).encode(), **{"Content-Type": "application/json"}
        )
        if status >= 400:
            raise RuntimeError(f"{path}: {status} {data[:300]!r}")
        return json.loads(data)

    def sign_up(self, email: str = "first@example.org", password: str = "correct-horse-battery") -> None:
        self.get("/accounts/signup/")
        status, where = self.post("/accounts/signup/", email=email, password1=password)
        assert status == 302, (status, where)
        self.get("/account/")

    def upload_folder(self, files: Iterable[tuple[str, bytes]], *, name: str, hashed: bool = True) -> dict[str, Any]:
        """As the page does it: manifests, a PUT a photo, close. Returns the server's answer to the opening."""
        content = dict(files)
        entries = [
            {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest() if hashed else ""}
            for path, data in content.items()
        ]
        answer = self.post_json("/collections/imports/", {"name": name, "files": entries[:500]})
        rows = answer["files"]
        for start in range(500, len(entries), 500):
            rows += self.post_json(answer["manifestUrl"], {"files": entries[start : start + 500]})["files"]
        self.put_files(rows, content)
        self.post_json(answer["closeUrl"], {})
        return answer

    def put_files(self, rows: Iterable[dict[str, Any]], content: dict[str, bytes]) -> None:
        for row in rows:
            if row["url"]:
                status, _headers, data = self.request("PUT", row["url"], content[row["path"]])
                if status >= 400:
                    raise RuntimeError(f"{row['path']}: {status} {data[:300]!r}")

    def wait_for_import(self, answer: dict[str, Any], *, seconds: float = 300) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            _status, data = self.get(answer["statusUrl"])
            report: dict[str, Any] = json.loads(data)["report"]
            if report["state"] == "done":
                return report
            time.sleep(0.2)
        raise RuntimeError(f"the import took longer than {seconds} s: {report}\n{self.studio.logs()}")
