"""What the person chose, from the environment, and what the children are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from webapp.run import ROOT, StartError
from webapp.run.network import host_names, in_url, local_addresses


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
        return f"{'https' if self.is_public else 'http'}://{in_url(name)}:{self.port}/"


def environment(options: Options, own: Mapping[str, str], redis_url: str, env: Mapping[str, str]) -> dict[str, str]:
    """What the children are told; what the person set stays as it is."""
    names = ["localhost", "127.0.0.1", "[::1]"]
    if options.is_public:
        names += [in_url(name) for name in (*local_addresses(options.host), *host_names()) if in_url(name) not in names]
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
