"""Label sets: every door for owner, outsider and nobody; gestures, versions, undo; how results read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from fewshot_engine.config import ENGINE_VERSION
from fewshot_engine.inference import verdict as engine_verdict
from tests import factories
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.labelsets import cards, results, services
from webapp.labelsets.models import (
    Classification,
    Example,
    Intake,
    Label,
    LabelSet,
    Prediction,
    PrototypeSet,
    QueryImage,
)
from webapp.library.models import Import, ImportFile, Photo
from webapp.training.models import Model

pytestmark = pytest.mark.django_db
SCRIPT = {"HTTP_X_REQUESTED_WITH": "fetch", "HTTP_ACCEPT": "application/json"}


@pytest.fixture(autouse=True)
def _plain_parts(settings: Any, tmp_path: Any) -> None:
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }


class Kitchen:
    """A label set of mango and papaya with two examples each, and a classified batch of photos."""

    def __init__(self, owner: User) -> None:
        self.owner = owner
        self.collection = factories.make_collection(owner, "Groceries")
        self.set, (self.mango, self.papaya) = factories.make_label_set(owner, "Kitchen", ("Mango", "Papaya"))
        self.examples = [
            services.add_examples(label, [factories.make_photo(self.collection, str(label)) for _ in range(2)])
            for label in (self.mango, self.papaya)
        ]
        self.batch = services.classify_collection(self.set, self.collection, top_k=2)
        self.set.refresh_from_db()
        self.prototypes = learn(self.set)
        self.batch.revision, self.batch.prototypes = 1, self.prototypes
        self.batch.save()

    def add(self, label: Label, confidence: float, stranger: float, name: str = "query.jpg") -> QueryImage:
        photo = factories.make_photo(self.collection, "Market", name=name)
        query = QueryImage.objects.create(classification=self.batch, photo=photo)
        predict(query, label, confidence, stranger, self)
        return query

    def version(self) -> int:
        return LabelSet.objects.get(pk=self.set.pk).version

    def url(self, name: str, *args: object) -> str:
        return reverse(f"labelsets:{name}", args=args)

    @property
    def results_url(self) -> str:
        return self.url("results", self.batch.pk)


def learn(label_set: LabelSet, health: dict[str, Any] | None = None) -> PrototypeSet:
    labels = list(Label.objects.current().filter(label_set=label_set))
    told = {
        str(label.pk): {
            "examples": label.examples.current().count(),
            "expected": 0.95,
            "confused_with": None,
            "outlier": None,
        }
        for label in labels
    }
    return PrototypeSet.objects.create(
        label_set=label_set,
        version=label_set.version,
        model=label_set.model,
        engine_version=ENGINE_VERSION,
        labels=list(told),
        examples=[],
        data=b"x",
        health={"expected": 0.91, "ci": 0.03, "labels": told | (health or {})},
    )


def predict(query: QueryImage, label: Label, confidence: float, stranger: float, k: Kitchen, revision: int = 1) -> None:
    other = k.papaya if label == k.mango else k.mango
    Prediction.objects.create(
        query=query,
        revision=revision,
        label=label,
        confidence=confidence,
        distance=0.2,
        stranger=stranger,
        top_k=[[str(label.pk), confidence, 0.2], [str(other.pk), 1 - confidence, 0.6]],
        evidence=[
            [str(k.examples[0][0].photo_id), str(k.mango.pk), 0.9],
            [str(k.examples[1][0].photo_id), str(k.papaya.pk), 0.4],
        ],
    )


@pytest.fixture
def kitchen(owner: User) -> Kitchen:
    return Kitchen(owner)


def post_json(client: Client, url: str, said: Any) -> Any:
    return client.post(url, json.dumps(said), content_type="application/json", **SCRIPT)


def upload(name: str = "new.jpg", content: bytes = b"a picture") -> SimpleUploadedFile:
    return SimpleUploadedFile(name, content, content_type="image/jpeg")


# Who may --------------------------------------------------------------------------------------------------------------


def doors(k: Kitchen) -> list[tuple[str, str, Any]]:
    query = k.add(k.mango, 0.9, 0.1)
    example = k.examples[0][0]
    files = {"files": [{"path": "a.jpg", "size": 3}]}
    return [
        ("get", k.set.get_absolute_url(), None),
        ("get", k.url("labels", k.set.pk), None),
        ("get", k.batch.get_absolute_url(), None),
        ("get", k.results_url, None),
        ("get", k.url("evidence", k.batch.pk, query.photo_id), None),
        ("get", k.url("pick", k.mango.pk), None),
        ("get", k.url("export", k.batch.pk, "csv"), None),
        ("post", k.url("rename", k.set.pk), {"name": "x"}),
        ("post", k.url("delete", k.set.pk), {}),
        ("post", k.url("restore", k.set.pk), {}),
        ("post", k.url("use-model", k.set.pk), {"model": str(k.set.model_id)}),
        ("post", k.url("threshold", k.set.pk), {"reject_above": "0.4"}),
        ("post", k.url("add-label", k.set.pk), {"name": "Kiwi"}),
        ("post", k.url("rename-label", k.mango.pk), {"name": "Kiwi"}),
        ("post", k.url("remove-label", k.mango.pk), {}),
        ("post", k.url("restore-label", k.mango.pk), {}),
        ("post", k.url("add-examples", k.mango.pk), {"photos": [str(query.photo_id)]}),
        ("post", k.url("upload-examples", k.mango.pk), {"photos": upload()}),
        ("post", k.url("remove-example", example.pk), {}),
        ("post", k.url("restore-example", example.pk), {}),
        ("json", k.url("label-examples", k.mango.pk), files),
        ("json", k.url("classify-drop", k.set.pk), files),
        ("post", k.url("classify-collection", k.set.pk), {"collection": str(k.collection.pk), "top_k": "3"}),
        ("json", k.url("answer", k.batch.pk, query.photo_id), {"label": str(k.mango.pk), "becomesExample": False}),
        ("post", k.url("take-answer-back", k.batch.pk, query.photo_id), {}),
        ("post", k.url("top-k", k.batch.pk), {"top_k": "5"}),
        ("post", k.url("sort-again", k.batch.pk), {}),
    ]


def knock(client: Client, method: str, url: str, said: Any) -> Any:
    if method == "get":
        return client.get(url)
    return post_json(client, url, said) if method == "json" else client.post(url, said)


def test_owner_may_use_every_door(kitchen: Kitchen, owner_client: Client) -> None:
    for method, url, said in doors(kitchen):
        assert knock(owner_client, method, url, said).status_code in (200, 201, 302), url


def test_outsider_finds_nothing(kitchen: Kitchen, outsider_client: Client) -> None:
    before = kitchen.version()
    for method, url, said in doors(kitchen):
        assert knock(outsider_client, method, url, said).status_code == 404, url
    assert kitchen.version() == before


def test_nobody_is_sent_to_log_in(kitchen: Kitchen, client: Client) -> None:
    for method, url, said in doors(kitchen):
        answer = knock(client, method, url, said)
        assert answer.status_code == (401 if method == "json" and "answer" not in url else 302), url


def test_gestures_are_no_links(kitchen: Kitchen, owner_client: Client) -> None:
    for method, url, _said in doors(kitchen):
        answer = owner_client.post(url) if method == "get" else owner_client.get(url)
        assert answer.status_code == 405, url


def test_strangers_things_in_bodies_are_not_there(kitchen: Kitchen, outsider: User, owner_client: Client) -> None:
    theirs = Kitchen(outsider)
    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    photo = factories.make_photo(theirs.collection)
    refused = [
        post_json(owner_client, kitchen.url("add-examples", kitchen.mango.pk), {"photos": [str(photo.pk)]}),
        post_json(
            owner_client,
            kitchen.url("add-examples", kitchen.mango.pk),
            {"photos": [str(query.photo_id)], "replaces": str(theirs.examples[0][0].pk)},
        ),
        post_json(
            owner_client, kitchen.url("answer", kitchen.batch.pk, query.photo_id), {"label": str(theirs.mango.pk)}
        ),
        owner_client.post(
            kitchen.url("classify-collection", kitchen.set.pk), {"collection": str(theirs.collection.pk), "top_k": "3"}
        ),
        post_json(
            owner_client,
            kitchen.url("classify-drop", kitchen.set.pk),
            {"files": [{"path": "a.jpg", "size": 3}], "batch": str(theirs.batch.pk)},
        ),
        owner_client.get(kitchen.url("evidence", kitchen.batch.pk, photo.pk)),
        owner_client.get(kitchen.url("pick", kitchen.mango.pk), {"collection": str(theirs.collection.pk)}),
        owner_client.get(kitchen.url("classification", kitchen.set.pk, theirs.batch.pk)),
    ]
    assert [answer.status_code for answer in refused] == [404] * len(refused)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["", "[]", "{", '{"files": 3}', '{"files": []}', '{"files": [{"path": 1}]}', "null"])
def test_broken_manifests_are_sentences(kitchen: Kitchen, owner_client: Client, body: str) -> None:
    for url in (kitchen.url("classify-drop", kitchen.set.pk), kitchen.url("label-examples", kitchen.mango.pk)):
        answer = owner_client.post(url, body, content_type="application/json")
        assert answer.status_code == 400
        assert answer.json()["error"]
    assert Classification.objects.count() == 1


@pytest.mark.parametrize("photos", [None, [], "x", ["not-an-id"], [str(uuid4())]])
def test_photos_that_are_none_are_refused(kitchen: Kitchen, owner_client: Client, photos: Any) -> None:
    answer = post_json(owner_client, kitchen.url("add-examples", kitchen.mango.pk), {"photos": photos})
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "1.5", "nan"])
def test_thresholds_are_shares(kitchen: Kitchen, owner_client: Client, value: str) -> None:
    answer = owner_client.post(kitchen.url("threshold", kitchen.set.pk), {"reject_above": value}, **SCRIPT)
    assert answer.status_code == 400
    assert LabelSet.objects.get().reject_above == 0.5


def test_an_answer_says_something(kitchen: Kitchen, owner_client: Client) -> None:
    query = kitchen.add(kitchen.mango, 0.9, 0.1)
    url = kitchen.url("answer", kitchen.batch.pk, query.photo_id)
    assert post_json(owner_client, url, {}).status_code == 400
    assert post_json(owner_client, url, []).status_code == 400
    assert post_json(owner_client, url, {"label": "x"}).status_code == 404


def test_label_set_without_labels_says_so(owner: User, owner_client: Client) -> None:
    one, _labels = factories.make_label_set(owner)
    answer = post_json(
        owner_client, reverse("labelsets:classify-drop", args=[one.pk]), {"files": [{"path": "a.jpg", "size": 3}]}
    )
    assert answer.status_code == 400
    assert "no labels yet" in answer.json()["error"]
    services.add_label(one, "Mango")
    answer = post_json(
        owner_client, reverse("labelsets:classify-drop", args=[one.pk]), {"files": [{"path": "a.jpg", "size": 3}]}
    )
    assert "no example yet" in answer.json()["error"]


def test_empty_collection_is_a_sentence_in_place(kitchen: Kitchen, owner: User, owner_client: Client) -> None:
    empty = factories.make_collection(owner, "Nothing")
    url = kitchen.url("classify-collection", kitchen.set.pk)
    said = {"collection": str(empty.pk), "top_k": "3"}
    assert "no photos yet" in owner_client.post(url, said, **SCRIPT).json()["error"]
    page = owner_client.post(url, said, HTTP_REFERER=f"http://testserver{kitchen.set.get_absolute_url()}", follow=True)
    assert "no photos yet" in page.content.decode()


def test_referer_elsewhere_is_not_followed(kitchen: Kitchen, owner_client: Client) -> None:
    answer = owner_client.post(
        kitchen.url("add-label", kitchen.set.pk), {"name": "mango"}, HTTP_REFERER="https://evil.example/x"
    )
    assert answer["Location"] == reverse("labelsets:list")


# Pages ----------------------------------------------------------------------------------------------------------------


def test_names_are_text(owner: User, owner_client: Client) -> None:
    bad = "<script>alert(1)</script>"
    one, (label,) = factories.make_label_set(owner, bad, (bad,))
    collection = factories.make_collection(owner, bad)
    services.add_examples(label, [factories.make_photo(collection, name=bad)])
    batch = services.classify_collection(one, collection)
    QueryImage.objects.create(classification=batch, photo=Photo.objects.get())
    pages = [one.get_absolute_url(), batch.get_absolute_url(), reverse("labelsets:list")]
    pages += [
        reverse("labelsets:pick", args=[label.pk]),
        reverse("labelsets:evidence", args=[batch.pk, Photo.objects.get().pk]),
    ]
    for page in pages:
        assert bad not in owner_client.get(page).content.decode(), page


def test_list_says_what_to_do_first(owner_client: Client) -> None:
    assert "Teach it your own categories" in owner_client.get(reverse("labelsets:list")).content.decode()


def test_create_leads_to_the_page(owner_client: Client) -> None:
    answer = owner_client.post(reverse("labelsets:create"), {"name": "  Kitchen  counter "})
    assert answer["Location"] == LabelSet.objects.get().get_absolute_url()
    assert LabelSet.objects.get().name == "Kitchen counter"
    assert owner_client.post(reverse("labelsets:create"), {"name": " "}, **SCRIPT).status_code == 400


def test_card_tells_its_state(kitchen: Kitchen, owner_client: Client) -> None:
    page = owner_client.get(kitchen.set.get_absolute_url()).content.decode()
    assert "Expected accuracy 91\u00a0%\u00a0±\u00a03" in page
    assert "expected 95\u00a0%" in page
    assert "2 of 1–10" in page
    assert "Learning…" not in page
    services.add_examples(kitchen.mango, [factories.make_photo(kitchen.collection)])
    page = owner_client.get(kitchen.url("labels", kitchen.set.pk)).content.decode()
    assert page.count("Learning…") == 2  # the set, and the label that changed; Papaya keeps what is known of it


@pytest.mark.parametrize(
    ("expected", "ci", "said"),
    [(0.75, 0.222, "75\u00a0%\u00a0±\u00a022"), (1.0, 0.2, "80–100\u00a0%"), (0.5, None, "50\u00a0%")],
)
def test_no_expectation_reaches_beyond_a_hundred_percent(expected: float, ci: float | None, said: str) -> None:
    chip = cards.set_health(PrototypeSet(health={"expected": expected, "ci": ci}), 9)
    assert chip is not None and chip.text == f"Expected accuracy {said}"


def test_card_tells_whom_it_mixes_with(kitchen: Kitchen, owner_client: Client) -> None:
    outlier = kitchen.examples[0][1].photo_id
    told = {"examples": 2, "expected": 0.5, "confused_with": str(kitchen.papaya.pk), "outlier": str(outlier)}
    PrototypeSet.objects.all().delete()
    learn(kitchen.set, {str(kitchen.mango.pk): told})
    page = owner_client.get(kitchen.set.get_absolute_url()).content.decode()
    assert "Mixes with Papaya" in page
    assert page.count("is-outlier") == 1


# Gestures and versions ------------------------------------------------------------------------------------------------


def test_each_gesture_is_one_version(kitchen: Kitchen, owner_client: Client) -> None:
    example = kitchen.examples[0][0]
    photos = [str(factories.make_photo(kitchen.collection).pk) for _ in range(3)]
    gestures = [
        ("add-label", kitchen.set.pk, {"name": "Kiwi"}),
        ("add-examples", kitchen.mango.pk, {"photos": photos}),
        ("remove-example", example.pk, {}),
        ("restore-example", example.pk, {}),
        ("remove-label", kitchen.mango.pk, {}),
        ("restore-label", kitchen.mango.pk, {}),
    ]
    for name, pk, said in gestures:
        before = kitchen.version()
        assert owner_client.post(kitchen.url(name, pk), said, **SCRIPT).status_code == 200
        assert kitchen.version() == before + 1, name
    for name, pk, said in [
        ("rename-label", kitchen.mango.pk, {"name": "Big mango"}),
        ("restore-label", kitchen.mango.pk, {}),
    ]:
        before = kitchen.version()
        assert owner_client.post(kitchen.url(name, pk), said, **SCRIPT).status_code == 200
        assert kitchen.version() == before, name


def test_replacing_is_one_version(kitchen: Kitchen, owner_client: Client) -> None:
    old, photo = kitchen.examples[0][0], factories.make_photo(kitchen.collection)
    before = kitchen.version()
    post_json(
        owner_client,
        kitchen.url("add-examples", kitchen.mango.pk),
        {"photos": [str(photo.pk)], "replaces": str(old.pk)},
    )
    assert kitchen.version() == before + 1
    now = set(Example.objects.current().filter(label=kitchen.mango).values_list("photo", flat=True))
    assert now == {photo.pk, kitchen.examples[0][1].photo_id}


def test_upload_replaces_an_example(kitchen: Kitchen, owner_client: Client) -> None:
    old = kitchen.examples[0][0]
    said = {"files": [{"path": "new.jpg", "size": 3}], "replaces": str(old.pk)}
    answer = post_json(owner_client, kitchen.url("label-examples", kitchen.mango.pk), said).json()
    assert answer["files"][0]["url"]
    batch = Intake.objects.get().batch
    photo = factories.make_photo(kitchen.set.drops)
    batch.files.update(photo=photo, state=ImportFile.State.ACCEPTED)
    before = kitchen.version()
    services.photos_ready(batch, [photo], is_last=True)
    assert kitchen.version() == before + 1
    assert not Example.objects.current().filter(pk=old.pk).exists()
    assert Example.objects.current().filter(label=kitchen.mango, photo=photo).exists()


def test_examples_come_by_plain_forms_too(kitchen: Kitchen, owner_client: Client) -> None:
    pick = kitchen.url("pick", kitchen.mango.pk)
    old = kitchen.examples[0][0]
    page = owner_client.get(f"{pick}?replaces={old.pk}").content.decode()
    assert f'action="{kitchen.url("upload-examples", kitchen.mango.pk)}"' in page
    assert page.count(f'name="replaces" value="{old.pk}"') == 3
    fragment = owner_client.get(pick, **SCRIPT).content.decode()
    assert "<html" not in fragment and 'name="photos"' in fragment

    photo = factories.make_photo(kitchen.collection)
    where = kitchen.url("add-examples", kitchen.mango.pk)
    assert owner_client.post(where, {"photos": [str(photo.pk)], "replaces": str(old.pk)}).status_code == 302
    now = set(Example.objects.current().filter(label=kitchen.mango).values_list("photo", flat=True))
    assert now == {photo.pk, kitchen.examples[0][1].photo_id}


def test_a_form_of_files_is_a_whole_upload(kitchen: Kitchen, owner_client: Client) -> None:
    files = [upload("a.jpg", b"one"), upload("a.jpg", b"two"), upload("notes.txt", b"none")]
    answer = owner_client.post(kitchen.url("upload-examples", kitchen.mango.pk), {"photos": files}, follow=True)
    batch = Intake.objects.get().batch
    assert batch.state == Import.State.CLOSED
    assert {f.path: f.state for f in batch.files.all()} == {
        "a.jpg": "stored",
        "2 a.jpg": "stored",
        "notes.txt": "skipped",
    }
    assert "3 photos are being looked at" in answer.content.decode()


def test_too_many_files_in_a_form_are_no_crash(kitchen: Kitchen, owner_client: Client) -> None:
    files = [upload(f"{n}.jpg") for n in range(101)]
    answer = owner_client.post(kitchen.url("upload-examples", kitchen.mango.pk), {"photos": files})
    assert answer.status_code == 400
    assert "more than 100 files" in answer.content.decode()


def test_a_form_without_files_is_a_sentence(kitchen: Kitchen, owner_client: Client) -> None:
    answer = owner_client.post(kitchen.url("upload-examples", kitchen.mango.pk), {}, follow=True)
    assert "Choose one photo or more." in answer.content.decode()
    assert not Intake.objects.exists()


def test_undo_of_a_removal_brings_it_back(kitchen: Kitchen, owner_client: Client) -> None:
    example = kitchen.examples[0][0]
    said = owner_client.post(kitchen.url("remove-example", example.pk), **SCRIPT).json()
    assert not Example.objects.current().filter(photo=example.photo).exists()
    owner_client.post(said["undo"], **SCRIPT)
    assert Example.objects.current().filter(photo=example.photo, label=kitchen.mango).exists()
    said = owner_client.post(kitchen.url("remove-label", kitchen.mango.pk), **SCRIPT).json()
    assert services.current_support(kitchen.set)[1] == [kitchen.papaya]
    owner_client.post(said["undo"], **SCRIPT)
    assert services.current_support(kitchen.set)[1] == [kitchen.mango, kitchen.papaya]
    said = owner_client.post(kitchen.url("delete", kitchen.set.pk), **SCRIPT).json()
    assert owner_client.get(kitchen.set.get_absolute_url()).status_code == 404
    owner_client.post(said["undo"])
    assert owner_client.get(kitchen.set.get_absolute_url()).status_code == 200


def test_same_name_is_refused_in_any_case(kitchen: Kitchen, owner_client: Client) -> None:
    answer = owner_client.post(kitchen.url("add-label", kitchen.set.pk), {"name": "MANGO"}, **SCRIPT)
    assert answer.status_code == 400
    assert "already" in answer.json()["error"]


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
    from webapp.jobs.models import Job
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


def many(k: Kitchen, n: int) -> Sequence[QueryImage]:
    photos = [factories.make_photo(k.collection, name=f"{i}.jpg") for i in range(n)]
    queries = QueryImage.objects.bulk_create([QueryImage(classification=k.batch, photo=photo) for photo in photos])
    for i, query in enumerate(queries):
        predict(query, k.mango, 0.7 + 0.2 * i / n, 0.1, k)
    return queries


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


# Numbers of queries ---------------------------------------------------------------------------------------------------


def count(client: Client, url: str) -> int:
    with CaptureQueriesContext(
        connection,
    ) as found:
        assert client.get(url).status_code == 200
    return len(found)


def test_pages_take_few_queries_whatever_they_show(kitchen: Kitchen, owner_client: Client, owner: User) -> None:
    urls = [
        reverse("labelsets:list"),
        kitchen.set.get_absolute_url(),
        kitchen.batch.get_absolute_url(),
        kitchen.results_url,
    ]
    kitchen.add(kitchen.mango, 0.9, 0.1)
    before = [count(owner_client, url) for url in urls]
    Kitchen(owner)
    many(kitchen, 60)
    for n in range(5):
        label = services.add_label(kitchen.set, f"Label {n}")
        services.add_examples(label, [factories.make_photo(kitchen.collection) for _ in range(3)])
        kitchen.add(label, 0.9, 0.1)
    assert [count(owner_client, url) for url in urls] == before
    assert before[0] <= 9
    assert before[1] <= 14
    assert before[2] <= 20
    assert before[3] <= 9


def test_what_a_new_model_has_to_look_at_is_counted_on_the_page(kitchen: Kitchen, owner_client: Client) -> None:
    services.use_model(kitchen.set, Model.objects.exclude(pk=kitchen.set.model_id).get())
    message = "Looking at the photos: 32 of 200"
    Job.objects.filter(pk__in=(kitchen.set.job_id, kitchen.batch.job_id)).update(
        state=Job.State.RUNNING, message=message
    )
    assert message in owner_client.get(kitchen.url("labels", kitchen.set.pk)).content.decode()
    assert message in owner_client.get(kitchen.results_url).content.decode()
