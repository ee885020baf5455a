"""The life of a job, as its row tells it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from webapp import queue
from webapp.accounts.models import User
from webapp.jobs import services
from webapp.jobs.models import Event, Job

pytestmark = pytest.mark.django_db


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that were sent to workers, in order."""
    messages: list[str] = []
    monkeypatch.setattr(queue, "send", lambda job_id, _queue: messages.append(str(job_id)) or True)
    return messages


def make_job(owner: User, **values: object) -> Job:
    job = services.create_job(owner, Job.Kind.INGEST, queue=Job.Queue.INGEST, title="Photos")
    Job.objects.filter(pk=job.pk).update(**values)
    job.refresh_from_db()
    return job


def queued(owner: User, **values: object) -> Job:
    return make_job(owner, state=Job.State.QUEUED, wanted=1, **values)


def test_waking_an_idle_job_queues_it_once_and_sends_it_on_commit(
    owner: User, sent: list[str], django_capture_on_commit_callbacks
) -> None:
    job = make_job(owner)
    with django_capture_on_commit_callbacks(execute=True):
        services.wake(job.pk)
        services.wake(job.pk)
        assert sent == []
    job.refresh_from_db()
    assert (job.state, job.wanted) == (Job.State.QUEUED, 2)
    assert sent == [str(job.pk)]


def test_the_same_key_gives_the_same_job(owner: User, outsider: User) -> None:
    def make(person: User) -> Job:
        return services.create_job(person, Job.Kind.TRAIN, queue=Job.Queue.TRAINING, title="Run", key="k1")

    assert make(owner) == make(owner)
    assert make(owner) != make(outsider)


def test_a_message_that_comes_twice_is_claimed_once(owner: User) -> None:
    job = queued(owner)
    assert services.claim(job.pk, worker="a") is not None
    assert services.claim(job.pk, worker="b") is None


def test_an_old_claim_writes_nothing(owner: User, sent: list[str]) -> None:
    job = queued(owner)
    old = services.claim(job.pk, worker="a")
    assert old is not None
    services.give_up_lease(job.pk, old.attempt)
    new = services.claim(job.pk, worker="b")
    assert new is not None
    assert not services.beat(old)
    with pytest.raises(services.LeaseLost):
        services.report(old, "photos", changes={"done": 5})
    services.report(new, "photos", changes={"done": 3})
    job.refresh_from_db()
    assert job.done == 3
    assert job.attempt == new.attempt == old.attempt + 1


def test_a_wake_up_during_the_run_makes_it_run_again(owner: User, sent: list[str]) -> None:
    job = queued(owner)
    claim = services.claim(job.pk, worker="a")
    assert claim is not None
    services.wake(job.pk)
    services.finish(claim, Job.State.IDLE)
    job.refresh_from_db()
    assert job.state == Job.State.QUEUED
    again = services.claim(job.pk, worker="a")
    assert again is not None
    services.finish(again, Job.State.IDLE)
    job.refresh_from_db()
    assert (job.state, job.tries) == (Job.State.IDLE, 0)


def test_a_job_whose_workers_die_fails_after_exactly_three_tries(owner: User, sent: list[str], settings) -> None:
    job = queued(owner)
    for tries in (1, 2, 3):
        claim = services.claim(job.pk, worker="a")
        assert claim is not None, f"try {tries}"
        services.give_up_lease(job.pk, claim.attempt)
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert "3 times" in job.error
    assert services.claim(job.pk, worker="a") is None


def test_handing_back_costs_no_try(owner: User, sent: list[str]) -> None:
    job = queued(owner)
    for _round in range(5):
        claim = services.claim(job.pk, worker="a")
        assert claim is not None
        services.hand_back(claim)
    job.refresh_from_db()
    assert (job.state, job.tries) == (Job.State.QUEUED, 0)


def test_giving_up_twice_counts_once(owner: User, sent: list[str]) -> None:
    job = queued(owner)
    claim = services.claim(job.pk, worker="a")
    assert claim is not None
    services.give_up_lease(job.pk, claim.attempt)
    services.give_up_lease(job.pk, claim.attempt)
    assert Event.objects.filter(job=job, type="retrying").count() == 1


def test_events_are_numbered_without_gaps(owner: User) -> None:
    job = queued(owner)
    for n in range(5):
        services.record(job.pk, "photos", n=n)
    assert list(job.events.values_list("number", flat=True)) == [1, 2, 3, 4, 5]


def test_a_standing_job_keeps_its_last_events_only(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "KEPT_EVENTS", 3)
    job = queued(owner)
    claim = services.claim(job.pk, worker="a")
    assert claim is not None
    for n in range(6):
        services.record(job.pk, "photos", n=n)
    services.finish(claim, Job.State.IDLE)
    assert list(job.events.values_list("number", flat=True)) == [5, 6, 7]


def test_cancelling_a_queued_job_ends_it_and_a_running_one_is_asked(owner: User) -> None:
    waiting, running = queued(owner), queued(owner)
    claim = services.claim(running.pk, worker="a")
    assert claim is not None
    services.request_cancel(waiting)
    services.request_cancel(running)
    waiting.refresh_from_db()
    assert waiting.state == Job.State.CANCELLED
    assert services.cancel_is_wanted(claim)


def test_a_cancelled_job_whose_worker_died_is_not_tried_again(owner: User) -> None:
    job = queued(owner)
    claim = services.claim(job.pk, worker="a")
    assert claim is not None
    services.request_cancel(job)
    services.give_up_lease(job.pk, claim.attempt)
    job.refresh_from_db()
    assert job.state == Job.State.CANCELLED


def test_only_unheard_jobs_are_sent_again(owner: User, sent: list[str]) -> None:
    long_ago = timezone.now() - timedelta(minutes=1)
    lost = queued(owner, sent_at=long_ago)
    queued(owner, sent_at=timezone.now())
    again = services.resend_unheard("ingest", waiting_messages=0, after=timedelta(seconds=5))
    assert again == 1
    assert sent == [str(lost.pk)]
    assert services.resend_unheard("ingest", waiting_messages=2, after=timedelta(seconds=5)) == 0
