"""Label sets: every door for owner, outsider and nobody; gestures, versions, undo."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from tests import factories
from tests.webapp.kitchen import SCRIPT, Kitchen, learn, many, post_json
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.labelsets import cards, services
from webapp.labelsets.models import (
    Classification,
    Example,
    Intake,
    LabelSet,
    PrototypeSet,
    QueryImage,
)
from webapp.library.models import Import, ImportFile, Photo
from webapp.training.models import Model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("plain_parts")]


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


def test_empty_collections_are_not_offered(kitchen: Kitchen, owner: User, owner_client: Client) -> None:
    factories.make_collection(owner, "Nothing in it")
    label = kitchen.set.labels.first()
    assert label is not None
    for url in (kitchen.set.get_absolute_url(), kitchen.url("pick", label.pk)):
        page = owner_client.get(url).content.decode()
        assert kitchen.collection.name in page
        assert "Nothing in it" not in page


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
    assert "2 examples" in page
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
