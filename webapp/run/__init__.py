"""Start all that the studio is made of, watch it, stop it: `python -m webapp.run`, which is what `make run` calls.

An embedded Valkey or Redis (unless REDIS_URL names one), migrations, the site and three workers. Nothing here imports
Django: the children do.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class StartError(Exception):
    """A sentence for the person at the terminal: what is wrong and the way out."""
