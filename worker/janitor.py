"""What is to go, goes: things that were put away long enough, and once a day the files that nothing speaks of.

Those are what killed processes left half written, zips whose upload was given up, photos that nothing shows any more.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from pathlib import Path

from django.conf import settings
from django.core.files.storage import default_storage
from django.db import DatabaseError, close_old_connections
from django.utils import timezone

from webapp import trash
from webapp.library.models import Import
from worker.leases import no_fork

LOOK_EVERY_S = 60
SWEEP_EVERY_S = 24 * 3600
PART_AGE_S = 24 * 3600  # no write takes so long
UPLOAD_AGE = timedelta(days=14)  # after which an unfinished zip will not be gone on with

log = logging.getLogger(__name__)


def start() -> None:
    threading.Thread(target=_sweep_forever, name="janitor", daemon=True).start()


def sweep() -> int:
    """Remove leftovers; returns how many files went."""
    return _sweep_parts(Path(settings.MEDIA_ROOT)) + _sweep_archives() + trash.delete_orphans()


def _sweep_parts(root: Path) -> int:
    old = time.time() - PART_AGE_S
    gone = 0
    for path in root.rglob(".*.part"):
        try:
            if path.stat().st_mtime < old:
                path.unlink()
                gone += 1
        except FileNotFoundError:
            continue  # its writer was alive after all, and gave it its name
    return gone


def _sweep_archives() -> int:
    """Chunks of zips that are taken in (their worker was killed before it could), and of those nobody finished."""
    zips = Import.objects.filter(archive_chunks__gt=0)
    done = zips.filter(state=Import.State.DONE, created__gt=timezone.now() - 2 * UPLOAD_AGE)
    abandoned = zips.filter(state=Import.State.OPEN, created__lt=timezone.now() - UPLOAD_AGE)
    gone = 0
    for batch in [*done, *abandoned]:
        for number in range(batch.archive_chunks):
            if default_storage.exists(batch.chunk_name(number)):
                default_storage.delete(batch.chunk_name(number))
                gone += 1
    return gone


def _sweep_forever() -> None:
    swept = -float(SWEEP_EVERY_S)
    while True:
        with no_fork:
            try:
                if gone := trash.delete_due():
                    log.info("deleted %d things for good that were put away", gone)
                if time.monotonic() - swept >= SWEEP_EVERY_S:
                    swept = time.monotonic()
                    if gone := sweep():
                        log.info("removed %d leftover files", gone)
            except (DatabaseError, OSError) as error:
                log.warning("the janitor could not finish: %s", error)
            close_old_connections()
        time.sleep(LOOK_EVERY_S)
