"""Who gives up a job, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest

from tests.webapp.test_jobs import queued
from webapp.accounts.models import User
from webapp.jobs import services
from webapp.jobs.models import Job
from worker import leases

pytestmark = pytest.mark.django_db


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The reaper's own clock; move its only element."""
    now = [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    return now


def test_a_job_whose_heartbeat_stands_still_for_a_lease_is_given_up(owner: User, clock: list[float]) -> None:
    job = queued(owner)
    services.claim(job.pk, worker="elsewhere/1")
    reaper = leases.Reaper("ingest", lease_s=20)
    reaper.look()
    clock[0] += 19
    reaper.look()
    job.refresh_from_db()
    assert job.state == Job.State.RUNNING
    clock[0] += 1
    reaper.look()
    job.refresh_from_db()
    assert job.state == Job.State.QUEUED


def test_a_beating_job_is_left_alone_however_long_it_takes(owner: User, clock: list[float]) -> None:
    job = queued(owner)
    claim = services.claim(job.pk, worker="elsewhere/1")
    assert claim is not None
    reaper = leases.Reaper("ingest", lease_s=20)
    for _round in range(20):
        reaper.look()
        services.beat(claim)
        clock[0] += 19
    job.refresh_from_db()
    assert job.state == Job.State.RUNNING


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_dead_child_of_ones_own_is_given_up_at_once(owner: User, clock: list[float], is_waited_for: bool) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | (0 if is_waited_for else os.WNOWAIT))
    dead, alive = queued(owner), queued(owner)
    services.claim(dead.pk, worker=f"{leases.WORKER}/{child}")
    services.claim(alive.pk, worker=f"{leases.WORKER}/{os.getpid()}")
    leases.Reaper("ingest").look()
    dead.refresh_from_db()
    alive.refresh_from_db()
    assert (dead.state, alive.state) == (Job.State.QUEUED, Job.State.RUNNING)
    if not is_waited_for:
        os.waitpid(child, 0)


def test_a_living_child_of_ones_own_that_has_no_time_to_beat_keeps_its_job(owner: User, clock: list[float]) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        job = queued(owner)
        services.claim(job.pk, worker=f"{leases.WORKER}/{child.pid}")
        mine, others = leases.Reaper("training", lease_s=20), leases.Reaper("ingest", lease_s=20)
        for _round in range(20):
            mine.look()
            others.look()
            clock[0] += 6
        job.refresh_from_db()
        assert (job.state, job.attempt) == (Job.State.RUNNING, 1)
        child.send_signal(signal.SIGSTOP)  # a frozen one does not
        for _round in range(6):
            mine.look()
            clock[0] += 6
        job.refresh_from_db()
        assert job.state == Job.State.QUEUED
    finally:
        child.kill()
        child.wait()


def test_no_child_is_forked_while_a_thread_of_the_parent_works() -> None:
    working, seconds = threading.Event(), 0.3

    def work() -> None:
        with leases.no_fork:
            working.set()
            time.sleep(seconds)

    thread = threading.Thread(target=work)
    thread.start()
    working.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if leases.no_fork.acquire(timeout=10) else 1)
    _pid, status = os.waitpid(child, 0)
    thread.join()
    assert status == 0
    assert not leases.no_fork.locked()


def test_nothing_is_claimed_twice(owner: User) -> None:
    job = queued(owner)
    with leases.claimed(str(job.pk)) as first, leases.claimed(str(job.pk)) as second:
        assert first is not None
        assert second is None
