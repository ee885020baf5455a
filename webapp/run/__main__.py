"""The command line: `python -m webapp.run` starts the studio, `python -m webapp.run manage …` is its manage.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from webapp.run import ROOT, StartError
from webapp.run.data_dir import check_data_dir, load_secrets, lock, read_state
from webapp.run.embedded import EmbeddedRedis
from webapp.run.network import check_port
from webapp.run.options import Options, environment
from webapp.run.processes import COLLECT_STATIC, MIGRATE
from webapp.run.supervisor import Supervisor


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
    with lock(options.data_dir):
        check_port(options.host, options.port)
        own = load_secrets(options.data_dir)
        redis = None if options.redis_url else EmbeddedRedis.find(options.data_dir, own["redis_password"])
        env = environment(options, own, redis.url if redis else options.redis_url, os.environ)
        serves_static_as_it_lies = env.get("DEBUG", "").lower() in ("1", "true", "yes", "on")
        first = (MIGRATE,) if serves_static_as_it_lies else (MIGRATE, COLLECT_STATIC)
        supervisor = Supervisor(options, env, first=first)
        with supervisor.signals():
            return supervisor.run(redis)


def manage(options: Options, arguments: Sequence[str]) -> int:
    """manage.py with the settings that `make run` gives to the site."""
    check_data_dir(options.data_dir)
    own = load_secrets(options.data_dir)
    url = options.redis_url or read_state(options.data_dir).get("redis_url", "")
    env = environment(options, own, url, os.environ)
    return subprocess.call([sys.executable, "manage.py", *arguments], cwd=ROOT, env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
