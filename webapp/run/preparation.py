"""What has to be done before site and workers start, and whether that was done already for what there is now."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from webapp.run import ROOT
from webapp.run.data_dir import read_json
from webapp.run.options import Options
from webapp.run.processes import Process


def still_needed(steps: Sequence[Process], options: Options, env: Mapping[str, str]) -> list[Process]:
    """Of these steps those whose result is not there, or depends on something that has changed since."""
    done, wanted = read_json(_stamp(options)), fingerprints(options, env)
    return [step for step in steps if not wanted.get(step.name) or wanted[step.name] != done.get(step.name)]


def note_done(options: Options, env: Mapping[str, str]) -> None:
    """All steps are done, for what there is now."""
    _stamp(options).write_text(json.dumps(fingerprints(options, env), indent=1))


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


def _stamp(options: Options) -> Path:
    return options.data_dir / "prepared.json"


def _tree(paths: Sequence[Path]) -> str:
    stats = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    lines = (f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
