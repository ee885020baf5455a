"""What settings find in a test run: a data folder of its own with a real Valkey. A pytest plugin, loaded early."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

_folder = Path(tempfile.mkdtemp(prefix="fewshot-test-"))
(_folder / "static").mkdir()  # the site's door warns where it is missing, and warnings are errors
atexit.register(shutil.rmtree, _folder, ignore_errors=True)

os.environ.update(
    SECRET_KEY="only-for-tests",
    DATA_DIR=str(_folder),
    DEBUG="0",
    ALLOWED_HOSTS="testserver,localhost,127.0.0.1",
    DJANGO_ALLOW_ASYNC_UNSAFE="1",
)
for _name in ("DATABASE_URL", "OPEN_SIGNUP", "EMAIL_URL", "HTTPS"):
    os.environ.pop(_name, None)
if _database := os.environ.get("TEST_DATABASE_URL"):  # the same tests on PostgreSQL, where one runs
    os.environ["DATABASE_URL"] = _database


def _start_valkey() -> subprocess.Popen[bytes]:
    from webapp.run.embedded import EmbeddedRedis, ping_redis

    server = EmbeddedRedis.find(_folder, "test-password")
    os.environ["REDIS_URL"] = server.url
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    for _ in range(200):
        if ping_redis(server.url) is None:
            return process
        time.sleep(0.02)
    raise RuntimeError("the test run's Valkey did not start")


_valkey = _start_valkey()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    _valkey.kill()
