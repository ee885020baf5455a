"""Who may work on a job: claims kept alive by a thread, and a reaper for those whose worker is gone.

The reaper compares no clocks: it watches on its own monotonic one whether a job's heartbeat number changes. A child of
its own that died it need not wait for, and for one that lives it beats as well: on a busy machine a training, which
yields to everything else, may be minutes at its imports, in which its own thread hardly ever has its turn.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal
from uuid import UUID

from django.conf import settings
from django.db import DatabaseError, close_old_connections, connection
from redis import RedisError

from webapp.health import redis_client
from webapp.jobs import services
from webapp.jobs.models import Job

LOOK_EVERY_S = 1.0
RESEND_AFTER = timedelta(seconds=5)
WORKER = secrets.token_hex(8)  # made before the fork: a worker's children share it

# Held by the parent's threads while they work: a child that is forked meanwhile inherits whatever locks they hold (of a
# module that they import, of a connection) and waits for them for ever.
no_fork = threading.Lock()
os.register_at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=no_fork.release)

log = logging.getLogger(__name__)
_leaving = mmap.mmap(-1, 1)  # shared with the children: 1 once the worker was asked to leave


class Lease:
    """A claim that a thread keeps alive; `is_lost` and `should_stop` are looked at between steps of work."""

    def __init__(self, claim: services.Claim) -> None:
        self.claim = claim
        self.is_lost = False
        self._done = threading.Event()
        self._parent = os.getppid()

    @property
    def should_leave(self) -> bool:
        """The worker was asked to stop, or its parent is gone: save what there is, hand the job back."""
        return _leaving[0] == 1 or os.getppid() != self._parent

    @property
    def is_cancelled(self) -> bool:
        return services.cancel_is_wanted(self.claim)

    def _keep(self) -> None:
        try:
            while not self._done.wait(settings.JOB_LEASE_S / 4):
                with suppress(DatabaseError):  # busy for now: there are three more beats in a lease
                    if not services.beat(self.claim):
                        self.is_lost = True
                        return
        finally:
            connection.close()


@contextmanager
def claimed(job_id: str) -> Iterator[Lease | None]:
    """Claim a job and keep the claim alive; None when there is nothing to claim."""
    claim = services.claim(job_id, worker=f"{WORKER}/{os.getpid()}")
    if claim is None:
        yield None
        return
    lease = Lease(claim)
    thread = threading.Thread(target=lease._keep, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease._done.set()
        thread.join()


def ask_to_leave() -> None:
    """Tell this worker's children to save what they have and hand their jobs back."""
    _leaving[0] = 1


def start_reaper(queue: str) -> None:
    threading.Thread(target=_reap_forever, args=(queue,), name="reaper", daemon=True).start()


class Reaper:
    """Finds jobs whose worker is gone, and queued ones whose message is."""

    def __init__(self, queue: str, *, lease_s: float | None = None) -> None:
        self.queue = queue
        self.lease_s = settings.JOB_LEASE_S if lease_s is None else lease_s
        self._seen: dict[UUID, tuple[int, int, float]] = {}

    def look(self) -> None:
        """One round. Conditional updates make it harmless that every worker does this."""
        now = time.monotonic()
        running = Job.objects.filter(state=Job.State.RUNNING).values_list("pk", "attempt", "beat", "worker")
        seen = {}
        for pk, attempt, beat, worker in running:
            before = self._seen.get(pk)
            since = before[2] if before and before[:2] == (attempt, beat) else now
            seen[pk] = (attempt, beat, since)
            child = _child(worker)
            if child == "dead" or now - since >= self.lease_s:
                log.warning("job %s: the worker of attempt %d is gone", pk, attempt)
                services.give_up_lease(pk, attempt)
            elif child == "alive" and now - since >= self.lease_s / 4:
                services.beat(services.Claim(pk, attempt, wanted=0))
        self._seen = seen

    def resend(self) -> None:
        with redis_client() as redis:
            waiting = int(redis.llen(self.queue))
        services.resend_unheard(self.queue, waiting_messages=waiting, after=RESEND_AFTER)


def _child(worker: str) -> Literal["alive", "dead", "unknown"]:
    """Whether a job's worker is a child of this one's own that lives, or is dead; of any other nothing is known."""
    token, _slash, pid = worker.partition("/")
    if token != WORKER or not pid.isdigit():
        return "unknown"
    try:
        os.kill(int(pid), 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return "dead"
    except OSError:  # no Linux: that it is there says nothing of whether it goes on
        return "unknown"
    if state in "ZX":  # it has ended, and its parent has not looked yet
        return "dead"
    return "unknown" if state in "Tt" else "alive"


def _reap_forever(queue: str) -> None:
    reaper = Reaper(queue)
    rounds = 0
    while True:
        with no_fork:
            try:
                reaper.look()
                if rounds % 3 == 0:
                    reaper.resend()
            except (DatabaseError, RedisError, OSError) as error:
                log.warning("the reaper could not look: %s", error)
            close_old_connections()
        rounds += 1
        time.sleep(LOOK_EVERY_S)
