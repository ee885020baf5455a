"""What is classified with a label set: how batches begin, how results read, what a person's answers do."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from django.test import Client

from fewshot_engine.config import ENGINE_VERSION
from fewshot_engine.inference import verdict as engine_verdict
from tests import factories
from tests.webapp.kitchen import SCRIPT, Kitchen, many, post_json, predict
from webapp.jobs.models import Job
from webapp.labelsets import results, services
from webapp.labelsets.models import (
    Classification,
    Example,
    PrototypeSet,
    QueryImage,
)

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("plain_parts")]


# Classifying ----------------------------------------------------------------------------------------------------------


def test_drop_opens_a_batch_with_an_address(kitchen: Kitchen, owner_client: Client) -> None:
    url, files = (
        kitchen.url("classify-drop", kitchen.set.pk),
        [{"path": "a.jpg", "size": 3}, {"path": "b.txt", "size": 3}],
    )
    answer = post_json(owner_client, url, {"files": files, "topK": 4})
    said, batch = answer.json(), Classification.objects.latest("created")
    assert answer.status_code == 201
    assert (batch.top_k, batch.source) == (4, Classification.Source.DROP)
    assert said["pageUrl"] == batch.get_absolute_url()
    assert said["classificationJob"] == str(batch.job_id)
    assert [file["state"] for file in said["files"]] == ["wanted", "skipped"]
    assert owner_client.get(said["pageUrl"]).status_code == 200
    again = post_json(owner_client, url, {"archive": {"name": "c.zip", "size": 10}, "batch": said["batch"]}).json()
    assert again["batch"] == said["batch"]
    assert again["chunks"]["missing"] == [0]


@pytest.mark.parametrize("top_k", [0, 11, "x", None, -1])
def test_top_k_is_small(kitchen: Kitchen, owner_client: Client, top_k: Any) -> None:
    said = {"files": [{"path": "a.jpg", "size": 3}], "topK": top_k}
    assert post_json(owner_client, kitchen.url("classify-drop", kitchen.set.pk), said).status_code == 400


def test_more_best_labels_answer_the_batch_anew(kitchen: Kitchen, owner_client: Client) -> None:
    owner_client.post(kitchen.url("top-k", kitchen.batch.pk), {"top_k": "1"})
    kitchen.batch.refresh_from_db()
    assert (kitchen.batch.top_k, kitchen.batch.prototypes_id) == (1, kitchen.prototypes.pk)
    owner_client.post(kitchen.url("top-k", kitchen.batch.pk), {"top_k": "5"})
    kitchen.batch.refresh_from_db()
    assert (kitchen.batch.top_k, kitchen.batch.prototypes_id, kitchen.batch.revision) == (5, None, 1)


# How results read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", [0.1, 0.5, 0.51, 0.99])
@pytest.mark.parametrize("confidence", [0.3, 0.59, 0.6, 0.99])
def test_verdict_is_the_engines(kitchen: Kitchen, confidence: float, stranger: float) -> None:
    kitchen.add(kitchen.mango, confidence, stranger)
    row = results.judged(kitchen.batch).values("verdict").get()
    assert row["verdict"] == engine_verdict(confidence, stranger)


def test_groups_come_in_order(kitchen: Kitchen) -> None:
    QueryImage.objects.create(classification=kitchen.batch, photo=factories.make_photo(kitchen.collection))
    kitchen.add(kitchen.mango, 0.9, 0.1)
    kitchen.add(kitchen.papaya, 0.9, 0.1)
    kitchen.add(kitchen.papaya, 0.95, 0.1)
    kitchen.add(kitchen.papaya, 0.5, 0.1)
    kitchen.add(kitchen.papaya, 0.5, 0.9)
    found = results.read_results(kitchen.batch)
    assert [(group.name, group.count) for group in found.groups] == [
        ("Being looked at", 1),
        ("Not sure", 1),
        ("None of these", 1),
        ("Papaya", 2),
        ("Mango", 1),
    ]
    assert [tile.caption for tile in found.groups[3].tiles] == ["95\u00a0%", "90\u00a0%"]
    assert (found.done, found.total) == (5, 6)


def test_threshold_regroups_without_a_new_version(kitchen: Kitchen, owner_client: Client) -> None:
    kitchen.add(kitchen.mango, 0.9, 0.4)
    before = kitchen.version()
    assert "None of these" not in owner_client.get(kitchen.results_url).content.decode()
    owner_client.post(kitchen.url("threshold", kitchen.set.pk), {"reject_above": "0.35"})
    assert "None of these" in owner_client.get(kitchen.results_url).content.decode()
    assert kitchen.version() == before


def test_pins_survive_revisions(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.55, 0.1)
    url = kitchen.url("answer", kitchen.batch.pk, query.photo_id)
    said = post_json(owner_client, url, {"label": str(kitchen.papaya.pk), "becomesExample": False}).json()
    Classification.objects.update(revision=2)
    predict(query, kitchen.mango, 0.99, 0.0, kitchen, revision=2)
    kitchen.batch.refresh_from_db()
    (group,) = results.read_results(kitchen.batch).groups
    assert (group.name, group.tiles[0].is_answered, group.tiles[0].caption) == ("Papaya", True, "by you")
    owner_client.post(said["undo"], **SCRIPT)
    (group,) = results.read_results(kitchen.batch).groups
    assert group.name == "Mango"


def test_none_of_these_is_an_answer(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    post_json(
        owner_client, kitchen.url("answer", kitchen.batch.pk, query.photo_id), {"label": None, "becomesExample": True}
    )
    assert results.read_results(kitchen.batch).groups[0].key == "none"
    assert not Example.objects.filter(photo=query.photo).exists()


def test_an_answer_teaches_and_is_taken_back(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    url, before = kitchen.url("answer", kitchen.batch.pk, query.photo_id), kitchen.version()
    said = post_json(owner_client, url, {"label": str(kitchen.papaya.pk), "becomesExample": True}).json()
    assert kitchen.version() == before + 1
    assert Example.objects.current().get(photo=query.photo).label == kitchen.papaya
    owner_client.post(said["undo"], **SCRIPT)
    assert not Example.objects.current().filter(photo=query.photo).exists()
    owner_client.post(said["undo"], **SCRIPT)  # once more changes nothing
    assert kitchen.version() == before + 2


def test_second_answer_replaces_what_the_first_taught(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    url = kitchen.url("answer", kitchen.batch.pk, query.photo_id)
    post_json(owner_client, url, {"label": str(kitchen.papaya.pk), "becomesExample": True})
    post_json(owner_client, url, {"label": None, "becomesExample": False})
    assert not Example.objects.current().filter(photo=query.photo).exists()


def test_older_batch_follows_its_corrections(kitchen: Kitchen, owner_client: Client) -> None:
    from webapp.jobs.services import Claim

    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    services.classify_collection(kitchen.set, kitchen.collection)
    services.answer(query, kitchen.papaya, becomes_example=True)
    Job.objects.filter(pk=kitchen.batch.job_id).update(state=Job.State.IDLE, wanted=0)
    Job.objects.filter(pk=kitchen.set.job_id).update(state=Job.State.RUNNING, attempt=7)
    fresh = PrototypeSet(
        label_set=kitchen.set,
        version=kitchen.version(),
        model=kitchen.set.model,
        engine_version=ENGINE_VERSION,
        labels=[],
        examples=[],
        data=b"y",
    )
    services.save_prototypes(Claim(job_id=kitchen.set.job_id, attempt=7, wanted=1), fresh)
    assert Job.objects.get(pk=kitchen.batch.job_id).wanted == 1


def test_evidence_says_why(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.54, 0.2)
    url = kitchen.url("evidence", kitchen.batch.pk, query.photo_id)
    text = owner_client.get(url).content.decode()
    assert "Mango has 54\u00a0% against 46\u00a0% for Papaya" in text
    assert text.count("<figure") == 2
    assert "is-rival" in text
    assert "It is Mango" in text
    gone = kitchen.examples[0][0]
    services.remove_example(gone)
    gone.photo.delete()
    assert owner_client.get(url).content.decode().count("<figure") == 1


def test_evidence_of_a_stranger(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.99, 0.72)
    text = owner_client.get(kitchen.url("evidence", kitchen.batch.pk, query.photo_id)).content.decode()
    assert "The chance that it is none of your labels is 72\u00a0%, above your limit of 50\u00a0%" in text


def test_selected_photo_survives_a_reload(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    page = owner_client.get(kitchen.batch.get_absolute_url(), {"photo": str(query.photo_id)}).content.decode()
    assert 'aria-current="true" aria-label="query.jpg' in page
    assert "Why “Mango”?" in page
    assert owner_client.get(kitchen.batch.get_absolute_url(), {"photo": "x"}).status_code == 404


def test_fragment_is_bounded_and_pages_on(
    kitchen: Kitchen, owner_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = many(kitchen, 60)
    text = owner_client.get(kitchen.results_url).content.decode()
    assert text.count('class="photo') - text.count('class="photos') == 48
    assert "Show all 60" in text
    monkeypatch.setattr(results, "GROUP_PAGE", 25)
    seen: list[str] = []
    after: int | None = None
    for _page in range(3):
        (group,) = results.read_results(kitchen.batch, shown_group=str(kitchen.mango.pk), after=after).groups
        seen += [tile.name for tile in group.tiles]
        after = group.next_after
    assert after is None
    assert seen == [query.photo.name for query in reversed(queries)]


def test_more_groups_than_fit_have_a_link(
    kitchen: Kitchen, owner_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    kitchen.add(kitchen.mango, 0.9, 0.1)
    kitchen.add(kitchen.papaya, 0.9, 0.1)
    kitchen.add(kitchen.papaya, 0.9, 0.1)
    monkeypatch.setattr(results, "GROUPS", 1)
    text = owner_client.get(kitchen.results_url).content.decode()
    assert "?from=1" in text
    assert ">Papaya<" in text
    assert ">Mango<" not in text
    assert ">Mango<" in owner_client.get(kitchen.results_url, {"from": 1}).content.decode()


@pytest.mark.parametrize(
    "query",
    ["group=nothing", f"group={UUID(int=0)}", "from=x", "from=-1", "after=99&group=unsure", "from=9999999999999"],
)
def test_odd_pages_are_no_errors(kitchen: Kitchen, owner_client: Client, query: str) -> None:
    kitchen.add(kitchen.mango, 0.9, 0.1)
    assert owner_client.get(f"{kitchen.results_url}?{query}").status_code == 200
