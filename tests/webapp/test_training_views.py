"""Training's doors: who may pass, what bad numbers are answered with, and one run however often one presses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from fewshot_engine.config import EpisodeConfig, TrainConfig
from tests import factories
from webapp import queue
from webapp.accounts.models import User
from webapp.jobs import services as jobs
from webapp.jobs.models import Job
from webapp.labelsets.services import create_label_set
from webapp.library.models import Collection, Import
from webapp.training import services
from webapp.training.models import Metric, Model, TrainingRun

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _plain_parts(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    monkeypatch.setattr(queue, "send", lambda *_arguments: True)


def collection_of(owner: User, *sizes: int, name: str = "Shelves") -> Collection:
    collection = factories.make_collection(owner, name)
    for number, size in enumerate(sizes):
        for _photo in range(size):
            factories.make_photo(collection, f"class {number}")
    return collection


def numbers(collection: Collection, **changes: Any) -> dict[str, Any]:
    values = {
        "collection": collection.pk,
        "kind": "adapt",
        "way": 2,
        "shot": 1,
        "query": 2,
        "epochs": 2,
        "episodes_per_epoch": 10,
        "episodes_per_step": 1,
        "learning_rate": "",
        "eval_every": 1,
        "backbone": "conv4",
        "image_size": 84,
        "key": "train-one",
    }
    return values | changes


@pytest.fixture
def collection(owner: User) -> Collection:
    return collection_of(owner, 4, 4, 4, 4)


@pytest.fixture
def run(owner: User, collection: Collection) -> TrainingRun:
    config = TrainConfig(episode=EpisodeConfig(2, 1, 2), epochs=2, episodes_per_epoch=10)
    return services.start_run(owner, collection, config, name="First")


def score(accuracy: float, **values: Any) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "ci95": 0.01,
        "episodes": 600,
        "way": 2,
        "shot": 1,
        "query": 2,
        "optimistic": False,
        **values,
    }


def begin(run: TrainingRun, **values: Any) -> jobs.Claim:
    claim = jobs.claim(run.job_id, worker="test")
    assert claim is not None
    plan = {"base_classes": ["class 0", "class 1"], "validation_classes": ["class 2", "class 3"], "left_out": []}
    services.save_start(claim, run, plan=plan, baseline=score(0.6, **values), notes=[], resumed_at=0)
    step = {"epoch": 1, "loss": 0.5, "accuracy": 0.7, "episodes_per_s": 40.0, "seconds_left": 70.0}
    services.save_metric(claim, run, Metric.Kind.STEP, episode=5, changes={"done": 5}, event=step)
    return claim


def evaluate(claim: jobs.Claim, run: TrainingRun, episode: int, accuracy: float) -> None:
    event = {"epoch": 1, "loss": 0.5, "best": True, **score(accuracy)}
    services.save_metric(claim, run, Metric.Kind.EVALUATION, episode=episode, changes={}, event=event)


def end(claim: jobs.Claim, run: TrainingRun, *, best: float, recommends: str) -> Model:
    event = {"best": score(best), "baseline": score(0.6), "recommends": recommends, "notes": ["A note."]}
    model = services.save_model(claim, run, folder="runs/x/model", card=event, event=event)
    jobs.finish(claim, Job.State.SUCCEEDED, message="Finished.")
    return model


def test_the_final_figure_is_that_of_classes_used_for_nothing_else(run: TrainingRun, owner_client: Client) -> None:
    claim = begin(run)
    event = {"best": score(0.9), "baseline": score(0.6), "recommends": "trained", "notes": []}
    tested = {"test": score(0.81), "test_baseline": score(0.7)}
    services.save_model(claim, run, folder="runs/x/model", card=event | tested, event=event)
    jobs.finish(claim, Job.State.SUCCEEDED, message="Finished.")
    page = owner_client.get(run.get_absolute_url()).content.decode()
    assert "81.0\u00a0% ± 1.0" in page and "70.0\u00a0% ± 1.0" in page
    assert "11.0 above the untrained backbone" in page
    assert "90.0\u00a0% ± 1.0" not in page
    assert "kept for this figure alone" in page


def test_a_gain_within_the_noise_is_no_yes(run: TrainingRun, owner_client: Client) -> None:
    end(begin(run), run, best=0.613, recommends="trained")  # each score is ± 1.0
    page = owner_client.get(run.get_absolute_url()).content.decode()
    assert "Hardly." in page
    assert "kept for this figure alone" not in page


PAGES = ["run", "panel", "curves"]
GESTURES = ["cancel", "continue", "rename"]


# Who may pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_only_the_owner_sees_a_run(name: str, run: TrainingRun, owner_client: Client, outsider_client: Client) -> None:
    url = reverse(f"training:{name}", args=[run.pk])
    assert owner_client.get(url).status_code == 200
    assert owner_client.post(url).status_code == 405
    assert outsider_client.get(url).status_code == 404
    assert Client().get(url).status_code == 302


@pytest.mark.parametrize("name", GESTURES)
def test_only_the_owner_does_something_to_a_run(
    name: str, run: TrainingRun, owner_client: Client, outsider_client: Client
) -> None:
    url = reverse(f"training:{name}", args=[run.pk])
    assert owner_client.get(url).status_code == 405
    assert outsider_client.post(url, {"name": "Theirs"}).status_code == 404
    assert Client().post(url).status_code == 302
    run.refresh_from_db()
    assert (run.name, run.job.state) == ("First", Job.State.QUEUED)


def test_an_outsider_cannot_train_on_another_s_collection(collection: Collection, outsider_client: Client) -> None:
    url = reverse("training:new")
    assert outsider_client.get(url, {"collection": collection.pk}).status_code == 404
    assert outsider_client.post(url, numbers(collection)).status_code == 404
    assert outsider_client.get(reverse("training:notes"), numbers(collection)).status_code == 404
    assert outsider_client.get(url, {"collection": "nonsense"}).status_code == 404
    assert not TrainingRun.objects.exists()


def test_lists_show_one_s_own_only(run: TrainingRun, owner_client: Client, outsider_client: Client) -> None:
    assert b"First" in owner_client.get(reverse("training:list")).content
    assert b"First" not in outsider_client.get(reverse("training:list")).content
    assert b"Shelves" in owner_client.get(reverse("training:new")).content
    assert b"Shelves" not in outsider_client.get(reverse("training:new")).content


# Beginning ----------------------------------------------------------------------------------------


def test_pressing_twice_makes_one_run(collection: Collection, owner_client: Client) -> None:
    first = owner_client.post(reverse("training:new"), numbers(collection))
    second = owner_client.post(reverse("training:new"), numbers(collection))
    run = TrainingRun.objects.get()
    assert first.status_code == second.status_code == 302
    assert first["Location"] == second["Location"] == run.get_absolute_url()
    assert Job.objects.filter(kind=Job.Kind.TRAIN).count() == 1


def test_the_usual_learning_rate_goes_with_the_kind(collection: Collection, owner_client: Client) -> None:
    owner_client.post(reverse("training:new"), numbers(collection))
    owner_client.post(reverse("training:new"), numbers(collection, kind="full", key="train-two"))
    rates = {run.config["kind"]: run.config["learning_rate"] for run in TrainingRun.objects.all()}
    assert rates == {"adapt": 0.0001, "full": 0.001}


def test_the_form_offers_the_specification_s_values(collection: Collection, owner_client: Client) -> None:
    form = owner_client.get(reverse("training:new"), {"collection": collection.pk}).context["form"]
    names = ("way", "shot", "query", "epochs", "eval_every", "kind")
    assert [form[name].value() for name in names] == [5, 5, 15, 5, 1, "adapt"]


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"way": 1}, "way", "Way is 1"),
        ({"shot": 0}, "shot", "Shot is 0"),
        ({"query": 101}, "query", "Query is 101"),
        ({"epochs": 0}, "epochs", "Epochs is 0"),
        ({"episodes_per_epoch": 100_001}, "episodes_per_epoch", "100,000"),
        ({"episodes_per_step": 65}, "episodes_per_step", "1 to 64"),
        ({"learning_rate": 0}, "learning_rate", "above 0"),
        ({"learning_rate": "fast"}, "learning_rate", "such as 0.001"),
        ({"eval_every": 9}, "eval_every", "1 to 2"),
        ({"kind": "full", "image_size": 1000}, "image_size", "28 to 384"),
        ({"kind": "full", "backbone": "resnet"}, "backbone", "resnet"),
        ({"way": "many"}, "way", "such as 5"),
        ({"way": ""}, "way", "required"),
        ({"kind": "magic"}, "kind", "magic"),
    ],
)
def test_a_bad_number_is_answered_at_its_field(
    changes: dict[str, Any], field: str, words: str, collection: Collection, owner_client: Client
) -> None:
    answer = owner_client.post(reverse("training:new"), numbers(collection, **changes))
    assert answer.status_code == 400
    assert words in " ".join(answer.context["form"].errors[field])
    assert not TrainingRun.objects.exists()


def test_all_bad_numbers_are_told_at_once(collection: Collection, owner_client: Client) -> None:
    answer = owner_client.post(reverse("training:new"), numbers(collection, way=1, epochs=0, learning_rate=7))
    assert {"way", "epochs", "learning_rate"} <= set(answer.context["form"].errors)


def test_too_few_categories_are_refused_with_the_numbers(owner: User, owner_client: Client) -> None:
    few = collection_of(owner, 6, 6, 1, name="Few")
    answer = owner_client.post(reverse("training:new"), numbers(few, way=5, shot=3))
    text = answer.content.decode()
    assert answer.status_code == 400
    assert "5-way 3-shot needs 5 categories with at least 4 photos each" in text
    assert "has 2 of 3" in text
    assert not TrainingRun.objects.exists()


def test_what_a_collection_makes_of_the_numbers_is_said_before_it_starts(owner: User, owner_client: Client) -> None:
    uneven = collection_of(owner, 8, 8, 8, 1, name="Uneven")
    text = owner_client.get(reverse("training:notes"), numbers(uneven, shot=3, query=15)).content.decode()
    assert "1 categor" in text
    assert "class 3 (1)" in text
    assert "5 query images a class" in text
    assert "too few are left to hold out" in text


def test_notes_tell_a_bad_number_too(collection: Collection, owner_client: Client) -> None:
    answer = owner_client.get(reverse("training:notes"), numbers(collection, way=1))
    assert answer.status_code == 200
    assert b"Way is 1" in answer.content


def test_a_collection_without_categories_is_told_what_it_lacks(owner: User, owner_client: Client) -> None:
    empty = factories.make_collection(owner, "Empty")
    answer = owner_client.get(reverse("training:new"), {"collection": empty.pk})
    assert answer.status_code == 200
    assert "has 0 of 0" in answer.content.decode()


# Meanwhile and after ------------------------------------------------------------------------------


def test_the_page_says_what_there_is_at_each_stage(run: TrainingRun, owner_client: Client) -> None:
    url = run.get_absolute_url()
    assert "Waiting for the training worker" in owner_client.get(url).content.decode()
    claim = begin(run)
    evaluate(claim, run, 10, 0.75)
    text = owner_client.get(url).content.decode()
    assert "75.0" in text
    assert "15.0 above the untrained backbone" in text
    assert "Yes, so far" in text
    assert "1 min 10 s" in text
    end(claim, run, best=0.75, recommends="trained")
    assert "New label set with it" in owner_client.get(url).content.decode()


def test_when_the_frozen_backbone_wins_the_page_says_so(run: TrainingRun, owner_client: Client) -> None:
    end(begin(run), run, best=0.59, recommends="frozen")
    text = owner_client.get(run.get_absolute_url()).content.decode()
    assert "The backbone as it came does as well or better" in text
    assert "no better than untrained" in owner_client.get(reverse("training:list")).content.decode()


def test_optimistic_figures_say_so(run: TrainingRun, owner_client: Client) -> None:
    begin(run, optimistic=True)
    text = owner_client.get(run.get_absolute_url()).content.decode()
    assert "These figures flatter" in text
    assert "Accuracy on held-out classes" not in text


def test_the_best_score_keeps_its_episode(run: TrainingRun) -> None:
    evaluate(begin(run), run, 10, 0.75)
    run.refresh_from_db()
    assert run.best["episode"] == 10


def test_curves_are_what_was_measured(run: TrainingRun, owner_client: Client) -> None:
    claim = begin(run)
    evaluate(claim, run, 10, 0.75)
    curves = owner_client.get(reverse("training:curves", args=[run.pk])).json()
    assert curves["evaluations"] == [[10, 0.75, 0.01]]
    assert curves["steps"] == [[5, 0.5]]
    assert (curves["total"], curves["way"], curves["baseline"]) == (20, 2, 0.6)


def test_a_long_run_keeps_its_curves_and_few_lines_of_steps(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "KEPT_STEPS", 10)
    monkeypatch.setattr(services, "THINNED_EVERY", 5)
    claim = jobs.claim(run.job_id, worker="test")
    assert claim is not None
    for episode in range(1, 41):
        step = {"epoch": 1, "loss": 1.0, "episodes_per_s": 9.0, "seconds_left": 1.0}
        services.save_metric(claim, run, Metric.Kind.STEP, episode=episode, changes={}, event=step)
        if episode % 10 == 0:
            services.save_metric(
                claim, run, Metric.Kind.EVALUATION, episode=episode, changes={}, event=score(0.5, epoch=1, loss=1.0)
            )
    events = run.job.events
    assert run.metrics.filter(kind=Metric.Kind.STEP).count() == 40
    assert events.filter(type="step").count() <= 15
    assert events.filter(type="evaluation").count() == 4
    newest = events.filter(type="step").order_by("-number").first()
    assert newest is not None and newest.data["episode"] == 40


def test_long_curves_are_thinned_by_averaging(run: TrainingRun) -> None:
    run.config["episodes_per_epoch"] = 6000
    rows = [Metric(run=run, kind="step", episode=n, epoch=1, loss=n % 2) for n in range(1, 6001)]
    Metric.objects.bulk_create(rows)
    steps = services.curves(run)["steps"]
    assert len(steps) <= services.CURVE_POINTS + 1
    assert steps[-1][0] == 6000
    assert steps[1][1] == pytest.approx(0.5)


def test_a_cancelled_run_goes_on_and_a_running_one_does_not_twice(run: TrainingRun, owner_client: Client) -> None:
    owner_client.post(reverse("training:cancel", args=[run.pk]))
    run.job.refresh_from_db()
    assert run.job.state == Job.State.CANCELLED
    owner_client.post(reverse("training:continue", args=[run.pk]))
    owner_client.post(reverse("training:continue", args=[run.pk]))
    run.job.refresh_from_db()
    assert (run.job.state, run.job.wanted) == (Job.State.QUEUED, 2)
    assert run.job.events.filter(type="continued").count() == 1


def test_a_finished_run_does_not_begin_anew(run: TrainingRun, owner_client: Client) -> None:
    end(begin(run), run, best=0.7, recommends="trained")
    owner_client.post(reverse("training:continue", args=[run.pk]))
    run.job.refresh_from_db()
    assert run.job.state == Job.State.SUCCEEDED


def test_a_failed_run_says_why(run: TrainingRun, owner_client: Client) -> None:
    jobs.finish(begin(run), Job.State.FAILED, error="The memory did not suffice.")
    assert "The memory did not suffice." in owner_client.get(run.get_absolute_url()).content.decode()


def test_renaming_names_the_model_too(run: TrainingRun, owner_client: Client) -> None:
    model = end(begin(run), run, best=0.7, recommends="trained")
    owner_client.post(reverse("training:rename", args=[run.pk]), {"name": "  Better   name "})
    run.refresh_from_db()
    model.refresh_from_db()
    assert run.name == model.name == "Better name"
    owner_client.post(reverse("training:rename", args=[run.pk]), {"name": " "})
    run.refresh_from_db()
    assert run.name == "Better name"


def test_names_are_never_markup(run: TrainingRun, owner_client: Client) -> None:
    services.rename_run(run, "<script>alert(1)</script>")
    assert b"<script>alert" not in owner_client.get(run.get_absolute_url()).content


# Queries ------------------------------------------------------------------------------------------


def queries(client: Client, url: str) -> int:
    with CaptureQueriesContext(
        connection,
    ) as caught:
        assert client.get(url).status_code == 200
    return len(caught)


def test_the_list_takes_as_many_queries_for_many_runs(
    owner: User, collection: Collection, owner_client: Client
) -> None:
    config = TrainConfig(episode=EpisodeConfig(2, 1, 2), epochs=1, episodes_per_epoch=5)
    services.start_run(owner, collection, config)
    few = queries(owner_client, reverse("training:list"))
    for _run in range(8):
        services.start_run(owner, collection, config)
    assert queries(owner_client, reverse("training:list")) == few <= 8


def test_choosing_takes_as_many_queries_for_many_collections(owner: User, owner_client: Client) -> None:
    collection_of(owner, 1)
    few = queries(owner_client, reverse("training:new"))
    for _collection in range(5):
        collection_of(owner, 2, 2)
    assert queries(owner_client, reverse("training:new")) == few <= 8


def test_a_run_takes_as_many_queries_however_long_it_is(run: TrainingRun, owner: User, owner_client: Client) -> None:
    claim = begin(run)
    few = queries(owner_client, run.get_absolute_url())
    for episode in range(1, 15):
        evaluate(claim, run, episode, 0.7)
    for _set in range(3):
        create_label_set(owner, "Set")
    assert queries(owner_client, run.get_absolute_url()) == few <= 10


def test_what_will_happen_is_what_the_fields_say(owner: User, owner_client: Client) -> None:
    page = owner_client.get("/training/new/", {"collection": collection_of(owner, *[20] * 12).pk}, follow=True)
    form = page.context["form"]
    epochs, each = form["epochs"].value(), form["episodes_per_epoch"].value()
    assert f"{epochs * each:,} episodes in {epochs} epochs" in page.content.decode()


def test_a_collection_that_is_still_being_filled_says_so(owner: User, collection: Collection) -> None:
    config = TrainConfig(episode=EpisodeConfig(2, 1, 2))
    batch = Import.objects.create(
        collection=collection, job=jobs.create_job(owner, Job.Kind.INGEST, queue=Job.Queue.INGEST, title="x")
    )
    assert any("the 16 photos" in note for note in services.notes_for(collection, config))
    Import.objects.filter(pk=batch.pk).update(state=Import.State.DONE)
    assert not any("upload" in note for note in services.notes_for(collection, config))
