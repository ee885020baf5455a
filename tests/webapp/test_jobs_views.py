"""Activity: one's own jobs, their logs in sentences, cancel and try again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from webapp import queue
from webapp.accounts.models import User
from webapp.jobs import services
from webapp.jobs.models import Event, Job
from webapp.jobs.story import percent, tell

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _plain_parts(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    monkeypatch.setattr(queue, "send", lambda *_arguments: True)


def make_job(owner: User, title: str = "Taking in photos", **values: Any) -> Job:
    job = services.create_job(owner, Job.Kind.INGEST, queue=Job.Queue.INGEST, title=title)
    Job.objects.filter(pk=job.pk).update(**values)
    job.refresh_from_db()
    return job


@pytest.fixture
def job(owner: User) -> Job:
    return make_job(owner, state=Job.State.RUNNING, done=42, total=60)


def test_only_the_owner_sees_a_job(job: Job, owner_client: Client, outsider_client: Client) -> None:
    url = reverse("jobs:job", args=[job.pk])
    assert owner_client.get(url).status_code == 200
    assert outsider_client.get(url).status_code == 404
    assert Client().get(url).status_code == 302


@pytest.mark.parametrize("name", ["cancel", "retry"])
def test_only_the_owner_acts_on_a_job(name: str, job: Job, owner_client: Client, outsider_client: Client) -> None:
    url = reverse(f"jobs:{name}", args=[job.pk])
    assert outsider_client.post(url).status_code == 404
    assert Client().post(url).status_code == 302
    assert owner_client.get(url).status_code == 405
    job.refresh_from_db()
    assert not job.cancel_requested
    assert owner_client.post(url).status_code == 302


def test_activity_shows_one_s_own_and_no_standing_jobs(
    job: Job, owner: User, outsider: User, owner_client: Client
) -> None:
    make_job(owner, "A standing one")
    make_job(outsider, "Somebody else's", state=Job.State.RUNNING)
    failed = make_job(owner, "A failed one", state=Job.State.FAILED, error="The disk is full.")
    text = owner_client.get(reverse("jobs:activity")).content.decode()
    assert "42 of 60 · 70 %" in text
    assert "The disk is full." in text
    assert reverse("jobs:retry", args=[failed.pk]) in text
    assert "A standing one" not in text
    assert "Somebody else" not in text


def test_the_running_ones_are_told_to_pages_without_a_socket(job: Job, owner_client: Client) -> None:
    url = reverse("jobs:running")
    assert [one["id"] for one in owner_client.get(url).json()["active"]] == [str(job.pk)]
    assert Client().get(url).status_code == 302


def test_an_empty_activity_says_what_to_do(owner_client: Client) -> None:
    assert b"Nothing has happened yet" in owner_client.get(reverse("jobs:activity")).content


def test_activity_is_paged(owner: User, owner_client: Client) -> None:
    for number in range(30):
        make_job(owner, f"Job {number}", state=Job.State.SUCCEEDED)
    first = owner_client.get(reverse("jobs:activity"))
    assert "Page 1 of 2" in first.content.decode()
    assert owner_client.get(reverse("jobs:activity"), {"page": "nonsense"}).status_code == 200
    assert owner_client.get(reverse("jobs:activity"), {"page": 99}).status_code == 200


def test_activity_takes_as_many_queries_for_many_jobs(owner: User, owner_client: Client) -> None:
    def queries() -> int:
        with CaptureQueriesContext(connection) as caught:
            owner_client.get(reverse("jobs:activity"))
        return len(caught)

    make_job(owner, state=Job.State.RUNNING)
    make_job(owner, state=Job.State.FAILED, error="no")
    few = queries()
    for _job in range(6):
        make_job(owner, state=Job.State.RUNNING)
        make_job(owner, state=Job.State.SUCCEEDED)
    assert queries() == few <= 8


def test_cancel_goes_back_to_the_page_it_was_pressed_on_and_nowhere_else(job: Job, owner_client: Client) -> None:
    url = reverse("jobs:cancel", args=[job.pk])
    assert owner_client.post(url, {"next": "/activity/"})["Location"] == "/activity/"
    for elsewhere in ("https://evil.example/", "//evil.example/", "javascript:alert(1)", "/\\evil.example"):
        assert owner_client.post(url, {"next": elsewhere})["Location"] == reverse("jobs:job", args=[job.pk])
    job.refresh_from_db()
    assert job.cancel_requested


def test_a_failed_job_is_tried_again_once(owner: User, owner_client: Client) -> None:
    job = make_job(owner, state=Job.State.FAILED, error="no")
    for _press in range(2):
        owner_client.post(reverse("jobs:retry", args=[job.pk]))
    job.refresh_from_db()
    assert (job.state, job.wanted, job.error) == (Job.State.QUEUED, 1, "")


def test_a_job_that_is_done_is_not_tried_again(owner: User) -> None:
    assert not services.retry(make_job(owner, state=Job.State.SUCCEEDED))
    assert not services.retry(make_job(owner, state=Job.State.RUNNING))


def test_a_log_is_told_in_sentences(job: Job, owner_client: Client) -> None:
    services.record(job.pk, "preparing", done=3, total=60)
    services.record(job.pk, "step", episode=1, loss=1.0)
    services.record(job.pk, "retrying", message="The worker stopped; going on from the last step.")
    services.record(job.pk, "failed", error="<b>The disk is full.</b>")
    text = owner_client.get(reverse("jobs:job", args=[job.pk])).content.decode()
    assert "The worker stopped" in text
    assert "&lt;b&gt;The disk is full." in text


def test_every_kind_of_event_can_be_told(job: Job) -> None:
    score = {"accuracy": 0.8589, "ci95": 0.0041, "way": 5, "shot": 1, "optimistic": False}
    plan = {"base_classes": ["a", "b"], "validation_classes": ["c"]}
    said = [
        ("started", {"plan": plan, "baseline": score, "notes": ["A note."], "resumed_at": 0}, "85.9 % ± 0.4"),
        ("started", {"plan": plan, "baseline": {**score, "optimistic": True}, "notes": []}, "flatter"),
        ("started", {"plan": plan, "baseline": score, "notes": [], "resumed_at": 1200}, "1,200"),
        ("evaluation", {"episode": 0, "best": True, **score}, "closed form"),
        ("evaluation", {"episode": 1500, "best": True, **score}, "New best: 85.9 %"),
        ("evaluation", {"episode": 1500, "best": False, **score}, "not better"),
        ("saved", {"episode": 10}, "Checkpoint"),
        ("finished", {"notes": ["Training gained 2 points."]}, "gained"),
        ("preparing", {"done": 60, "total": 60}, "60 photos are ready"),
        ("photos", {"counts": {"accepted": 3, "refused": 1}}, "3 photos accepted"),
        ("prototypes", {"version": 4}, "version 4"),
        ("predictions", {"done": 3, "total": 4}, "3 of 4"),
        ("failed", {}, "failed"),
        ("unheard-of", {"message": "Whatever it says."}, "Whatever"),
    ]
    for type, data, words in said:
        lines = tell([Event(job=job, number=1, type=type, data=data)])
        text = " ".join(line.text for line in lines).replace("\N{NO-BREAK SPACE}", " ")
        assert words in text, type
    assert tell([Event(job=job, number=1, type="unheard-of", data={})]) == []


def test_shares_are_rounded_not_cut() -> None:
    assert percent(0.8589) == "85.9\N{NO-BREAK SPACE}%"
