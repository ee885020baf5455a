"""Training runs from row to model, stopped and gone on with."""

from __future__ import annotations

import pytest

from fewshot_engine.config import EpisodeConfig, TrainConfig
from tests.factories import make_collection, picture
from tests.worker.test_intake import take_in
from webapp.accounts.models import User
from webapp.jobs import services as jobs
from webapp.jobs.models import Job
from webapp.labelsets import services as labelsets
from webapp.library.models import Collection, Photo
from webapp.training import services
from webapp.training.models import Metric, Model, TrainingRun
from worker import leases, runs
from worker.tasks import run_job

pytestmark = pytest.mark.django_db

ADAPT = TrainConfig(
    episode=EpisodeConfig(3, 1, 3), epochs=2, episodes_per_epoch=10, learning_rate=1e-4, eval_episodes=50
)
FULL = TrainConfig(
    kind="full", backbone="conv4", image_size=28, episode=EpisodeConfig(3, 1, 3), epochs=3, episodes_per_epoch=4,
    eval_episodes=50,
)  # fmt: skip


@pytest.fixture
def shapes(owner: User) -> Collection:
    collection = make_collection(owner)
    take_in(collection, {f"class {k}/{n}.jpg": picture(k, n) for k in range(8) for n in range(5)})
    return collection


def finished(run: TrainingRun) -> TrainingRun:
    run_job(str(run.job_id))
    return TrainingRun.objects.select_related("job", "model").get(pk=run.pk)


@pytest.mark.parametrize("config", [ADAPT, FULL], ids=["adapt", "full"])
def test_a_run_makes_a_model_that_a_label_set_can_use(owner: User, shapes: Collection, config: TrainConfig) -> None:
    run = finished(services.start_run(owner, shapes, config))
    assert run.job.state == Job.State.SUCCEEDED, run.job.error
    assert run.model is not None
    assert run.baseline is not None and run.best is not None
    assert run.recommends in ("trained", "frozen")
    assert not set(run.plan["base_classes"]) & set(run.plan["validation_classes"])
    epochs = run.metrics.filter(kind=Metric.Kind.EVALUATION, epoch__gt=0).values_list("epoch", flat=True)
    assert list(epochs) == list(range(1, config.epochs + 1))

    label_set = labelsets.create_label_set(owner, "On my model", run.model)
    for k in range(2):
        label = labelsets.add_label(label_set, f"class {k}")
        labelsets.add_examples(label, Photo.objects.filter(category__name=f"class {k}")[:2])
    run_job(str(label_set.job_id))
    batch = labelsets.classify_collection(label_set, shapes)
    run_job(str(batch.job_id))
    batch.refresh_from_db()
    batch.job.refresh_from_db()
    assert batch.job.state == Job.State.IDLE, batch.job.error
    assert batch.query_images.filter(predictions__revision=batch.revision).count() == 40


def test_a_run_that_lost_its_worker_goes_on_from_its_checkpoint(
    owner: User, shapes: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = services.start_run(owner, shapes, FULL)
    keep = runs._keep
    evaluations = 0

    def die_after_two(lease: leases.Lease, row: TrainingRun, item: object) -> None:
        nonlocal evaluations
        if isinstance(item, runs.Evaluated):
            evaluations += 1
            if evaluations == 2:
                raise SystemExit("killed")
        keep(lease, row, item)

    monkeypatch.setattr(runs, "_keep", die_after_two)
    with pytest.raises(SystemExit):
        run_job(str(run.job_id))
    monkeypatch.setattr(runs, "_keep", keep)
    jobs.give_up_lease(run.job_id, 1)
    run = finished(run)
    assert run.job.state == Job.State.SUCCEEDED, run.job.error
    assert run.job.attempt == 2
    started = list(run.job.events.filter(type="started").values_list("data", flat=True))
    assert [data["resumed_at"] for data in started] == [0, FULL.episodes_per_epoch]
    epochs = run.metrics.filter(kind=Metric.Kind.EVALUATION).values_list("epoch", flat=True)
    assert list(epochs) == [1, 2, 3]


def test_a_cancelled_run_stops_and_can_go_on(owner: User, shapes: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LOOK_EVERY_S", 0.0)
    run = services.start_run(owner, shapes, FULL)
    keep = runs._keep

    def cancel_at_first_checkpoint(lease: leases.Lease, row: TrainingRun, item: object) -> None:
        keep(lease, row, item)
        if isinstance(item, runs.Saved):
            jobs.request_cancel(row.job)

    monkeypatch.setattr(runs, "_keep", cancel_at_first_checkpoint)
    run = finished(run)
    assert run.job.state == Job.State.CANCELLED
    assert run.model is None
    monkeypatch.setattr(runs, "_keep", keep)
    services.continue_run(run)
    run = finished(run)
    assert run.job.state == Job.State.SUCCEEDED
    assert run.model is not None


def test_a_worker_that_is_asked_to_leave_hands_the_run_back(
    owner: User, shapes: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = services.start_run(owner, shapes, FULL)
    leases.ask_to_leave()
    try:
        run = finished(run)
    finally:
        leases._leaving[0] = 0
    assert (run.job.state, run.job.tries) == (Job.State.QUEUED, 0)
    assert run.checkpoint
    run = finished(run)
    assert run.job.state == Job.State.SUCCEEDED


def test_photos_that_come_during_a_run_are_not_its_own(
    owner: User, shapes: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = services.start_run(owner, shapes, FULL)
    leases.ask_to_leave()
    try:
        before = finished(run).plan
    finally:
        leases._leaving[0] = 0
    take_in(shapes, {f"class new/{n}.jpg": picture(7, 100 + n) for n in range(5)})
    run = finished(run)
    assert run.job.state == Job.State.SUCCEEDED
    assert run.plan == before
    assert Model.objects.filter(run=run).count() == 1


@pytest.mark.parametrize(
    ("episode", "words"),
    [
        (EpisodeConfig(9, 1, 3), "9-way 1-shot needs 9 categories"),
        (EpisodeConfig(3, 5, 3), "at least 6 photos"),
    ],
)
def test_what_a_collection_does_not_allow_is_said_with_the_numbers(
    owner: User, shapes: Collection, episode: EpisodeConfig, words: str
) -> None:
    with pytest.raises(services.TrainingError, match=words):
        services.start_run(owner, shapes, TrainConfig(episode=episode))
    assert not TrainingRun.objects.exists()


def test_fewer_query_images_are_used_and_said(owner: User, shapes: Collection) -> None:
    notes = services.notes_for(shapes, TrainConfig(episode=EpisodeConfig(3, 2, 15)))
    assert any("3 query images a class, not 15" in note for note in notes)


def test_pressing_twice_starts_one_run(owner: User, shapes: Collection) -> None:
    first = services.start_run(owner, shapes, ADAPT, key="k")
    assert services.start_run(owner, shapes, ADAPT, key="k") == first
    assert TrainingRun.objects.count() == 1
