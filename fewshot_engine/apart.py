"""Work that needs torch, in a process of its own: the caller need not carry torch for the rest of its life."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fewshot_engine.errors import EngineError, WeightsMissing

REFUSED = 2  # the exit status of a module that has said in one sentence what is missing


def run_apart(module: str, *arguments: str, what: str, refusal: type[EngineError] = WeightsMissing) -> None:
    """`python -m module arguments…`, waited for.

    Args:
        what: was to be made, for the sentence of an error that nobody foresaw.
        refusal: what is raised, with the module's own words, where it ends with REFUSED.

    Raises:
        EngineError: `refusal`, or it failed otherwise.
    """
    root = str(Path(__file__).parents[1])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # One thread: on a busy machine several wait for each other by spinning, and take ten times as long.
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    if done.returncode == REFUSED:
        raise refusal(done.stderr.strip())
    if done.returncode != 0:
        raise EngineError(f"{what} could not be made: {done.stderr.strip()[-2000:]}")


def answer(work: Callable[..., None]) -> NoReturn:
    """The other end: do the work with the arguments given, and end with REFUSED after a sentence on standard error."""
    try:
        work(*sys.argv[1:])
    except EngineError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(0)
