"""Doors for uploads: who may, what is refused and why, and that going on after an interruption loses nothing."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from django.core.files.storage import default_storage
from django.db import OperationalError, connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from tests import factories
from webapp import trash
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.jobs.services import claim
from webapp.library import services
from webapp.library.models import Blob, Collection, Import, ImportFile
from webapp.library.services import Outcome

pytestmark = pytest.mark.django_db
PHOTO = factories.picture(0, 1)


@pytest.fixture(autouse=True)
def _own_files(settings: Any, tmp_path: Any) -> None:
    settings.MEDIA_ROOT = tmp_path / "media"
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }


def entry(path: str, content: bytes = PHOTO, *, hashed: bool = True) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest() if hashed else ""
    return {"path": path, "size": len(content), "sha256": sha256}


def post(client: Client, url: str, said: Any) -> Any:
    return client.post(url, json.dumps(said), content_type="application/json")


def put(client: Client, url: str, content: bytes, **headers: str) -> Any:
    return client.put(url, content, content_type="application/octet-stream", headers=headers)


def begin(client: Client, *entries: dict[str, Any], name: str = "Shelves") -> dict[str, Any]:
    answer = post(client, reverse("library:start"), {"name": name, "files": list(entries)})
    assert answer.status_code == 201, answer.content
    described: dict[str, Any] = answer.json()
    return described


def take_in(answer: dict[str, Any], refuse: Callable[[ImportFile], str] = lambda file: "") -> None:
    """What the worker does with stored files, without looking at them."""
    batch = Import.objects.get(pk=answer["import"])
    held = claim(batch.job_id, worker="test")
    assert held is not None
    files = batch.files.filter(state=ImportFile.State.STORED).select_related("blob").order_by("pk")
    services.place_photos(held, batch, [Outcome(file, refuse(file), "JPEG", 96, 96) for file in files])
    services.finish_import(held, batch)


# The way through ----------------------------------------------------------------------------------


def test_a_folder_becomes_a_collection_of_categories(owner_client: Client, owner: User) -> None:
    answer = begin(owner_client, entry("Fruit/Lemon/1.jpg"), entry("Fruit/Lime/2.jpg", factories.picture(1, 2)))
    for file, content in zip(answer["files"], (PHOTO, factories.picture(1, 2)), strict=True):
        assert file["state"] == "wanted"
        assert put(owner_client, file["url"], content).json() == {"state": "stored", "reason": ""}
    assert owner_client.post(answer["closeUrl"]).status_code == 200
    take_in(answer)
    collection = Collection.objects.get(owner=owner, name="Shelves")
    assert answer["pageUrl"] == collection.get_absolute_url()
    assert set(collection.categories.values_list("path", flat=True)) == {"Fruit", "Fruit/Lemon", "Fruit/Lime"}
    assert collection.photos.count() == 2


def test_the_same_photo_sent_twice_is_taken_once(owner_client: Client) -> None:
    answer = begin(owner_client, entry("a/1.jpg"))
    url = answer["files"][0]["url"]
    assert put(owner_client, url, PHOTO).status_code == put(owner_client, url, PHOTO).status_code == 200
    assert Blob.objects.count() == 1


def test_a_manifest_repeated_asks_only_for_what_is_missing(owner_client: Client) -> None:
    entries = [entry("a/1.jpg"), entry("a/2.jpg", factories.picture(2, 2))]
    answer = begin(owner_client, *entries)
    put(owner_client, answer["files"][0]["url"], PHOTO)
    again = post(owner_client, answer["manifestUrl"], {"files": entries}).json()
    assert [file["state"] for file in again["files"]] == ["stored", "wanted"]
    assert again["files"][0]["url"] is None
    assert again["files"][1]["url"] == answer["files"][1]["url"]


def test_bytes_that_are_here_are_not_asked_for_by_another_upload(owner_client: Client) -> None:
    first = begin(owner_client, entry("a/1.jpg"))
    put(owner_client, first["files"][0]["url"], PHOTO)
    second = begin(owner_client, entry("b/other name.jpg"), name="Another")
    assert second["files"][0] == {"path": "b/other name.jpg", "state": "stored", "reason": "", "url": None}


def test_bytes_of_another_person_are_asked_for(owner_client: Client, outsider_client: Client) -> None:
    first = begin(outsider_client, entry("a/1.jpg"))
    put(outsider_client, first["files"][0]["url"], PHOTO)
    assert begin(owner_client, entry("a/1.jpg"))["files"][0]["state"] == "wanted"


def test_more_than_a_hundred_files_in_one_manifest(owner_client: Client) -> None:
    answer = begin(owner_client, *[entry(f"a/{n}.jpg", b"%d" % n) for n in range(500)])
    assert len({file["url"] for file in answer["files"]}) == 500


def test_folders_that_differ_in_case_or_unicode_form_become_one_with_a_notice(owner_client: Client) -> None:
    paths = ("Äpfel/1.jpg", "a\u0308pfel/2.jpg", "ÄPFEL/3.jpg")
    contents = [factories.picture(3, n) for n in range(3)]
    answer = begin(owner_client, *[entry(p, c) for p, c in zip(paths, contents, strict=True)])
    for file, content in zip(answer["files"], contents, strict=True):
        put(owner_client, file["url"], content)
    owner_client.post(answer["closeUrl"])
    take_in(answer)
    batch = Import.objects.get(pk=answer["import"])
    assert batch.collection.categories.count() == 1
    assert len(batch.notices) == 1
    assert "3 folders" in batch.notices[0]


def test_names_with_script_are_kept_as_text(owner_client: Client) -> None:
    name = "<script>alert(1)</script>"
    answer = begin(owner_client, entry(f"{name}/<img src=x onerror=alert(1)>.jpg"), name=name)
    put(owner_client, answer["files"][0]["url"], PHOTO)
    owner_client.post(answer["closeUrl"])
    take_in(answer)
    html = owner_client.get(answer["pageUrl"]).content.decode()
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_the_report_names_duplicates_refused_and_left_out_with_reasons(owner_client: Client) -> None:
    answer = begin(
        owner_client,
        entry("a/1.jpg"),
        entry("a/2.jpg"),
        entry("a/text.jpg", b"hello"),
        entry("notes.txt", b"x"),
        entry("empty.jpg", b""),
        entry("never sent.jpg", b"never"),
    )
    for file, content in zip(answer["files"][:3], (PHOTO, PHOTO, b"hello"), strict=True):
        put(owner_client, file["url"], content)
    owner_client.post(answer["closeUrl"])
    take_in(answer, lambda file: "This is a text file, not a photo." if file.path == "a/text.jpg" else "")
    report = owner_client.get(answer["statusUrl"]).json()
    assert report["report"]["counts"] == {
        "wanted": 0, "stored": 0, "accepted": 1, "duplicate": 1, "refused": 2, "skipped": 2,
    }  # fmt: skip
    reasons = {file["path"]: file["reason"] for file in report["files"]}
    assert set(reasons) == {"a/2.jpg", "a/text.jpg", "notes.txt", "empty.jpg", "never sent.jpg"}
    assert all(reasons.values())
    page = owner_client.get(answer["pageUrl"]).content.decode()
    assert "This is a text file, not a photo." in page
    assert reasons["a/2.jpg"] in page


def test_the_report_stays_until_it_is_dismissed(owner_client: Client) -> None:
    answer = begin(owner_client, entry("notes.txt", b"x"))
    owner_client.post(answer["closeUrl"])
    take_in(answer)
    assert "notes.txt" in owner_client.get(answer["pageUrl"]).content.decode()
    owner_client.post(reverse("library:dismiss", args=[answer["import"]]))
    assert "notes.txt" not in owner_client.get(answer["pageUrl"]).content.decode()
    full = owner_client.get(reverse("library:import-report", args=[answer["import"]]))
    assert "notes.txt" in full.content.decode()


# Zips ---------------------------------------------------------------------------------------------


def test_a_zip_comes_in_hashed_chunks_and_can_be_resumed(owner_client: Client, settings: Any) -> None:
    settings.ZIP_CHUNK_BYTES = 10
    said = {"name": "Zipped", "archive": {"name": "z.zip", "size": 25}}
    answer = post(owner_client, reverse("library:start"), said).json()
    assert answer["chunks"]["missing"] == [0, 1, 2]
    url = answer["chunks"]["urlTemplate"].replace("{n}", "1")
    sha256 = hashlib.sha256(b"b" * 10).hexdigest()
    assert put(owner_client, url, b"x" * 10, **{"X-Content-SHA256": sha256}).status_code == 422
    assert put(owner_client, url, b"b" * 10, **{"X-Content-SHA256": sha256}).status_code == 200
    assert owner_client.get(answer["statusUrl"]).json()["chunks"]["missing"] == [0, 2]
    assert owner_client.post(answer["closeUrl"]).status_code == 409
    again = post(owner_client, answer["manifestUrl"], {"files": []}).json()
    assert again["chunks"]["missing"] == [0, 2]
    for n, content in ((0, b"a" * 10), (2, b"c" * 5)):
        assert put(owner_client, answer["chunks"]["urlTemplate"].replace("{n}", str(n)), content).status_code == 200
    assert owner_client.post(answer["closeUrl"]).status_code == 200


def test_a_zip_that_is_too_large_leaves_no_collection(owner_client: Client, settings: Any) -> None:
    settings.MAX_ZIP_BYTES = 1024**3
    said = {"name": "Huge", "archive": {"name": "z.zip", "size": 2 * 1024**3}}
    answer = post(owner_client, reverse("library:start"), said)
    assert answer.status_code == 413
    assert "GB" in answer.json()["error"]
    assert not Collection.objects.exists()


# What is refused ----------------------------------------------------------------------------------


def test_bytes_that_do_not_match_their_hash_are_asked_for_again(owner_client: Client) -> None:
    answer = begin(owner_client, entry("a/1.jpg"))
    url = answer["files"][0]["url"]
    refused = put(owner_client, url, PHOTO[:-1] + b"?")
    assert refused.status_code == 422
    assert "a/1.jpg" in refused.json()["error"]
    assert not Blob.objects.exists()
    assert put(owner_client, url, PHOTO).status_code == 200


def test_a_photo_that_is_too_large_is_refused_by_its_announcement_and_by_its_bytes(
    owner_client: Client, settings: Any
) -> None:
    settings.MAX_PHOTO_BYTES = 1024**2
    announced = begin(owner_client, {"path": "a/1.jpg", "size": 3 * 1024**2})["files"][0]
    assert announced["state"] == "refused"
    assert announced["reason"]
    lying = begin(owner_client, {"path": "a/1.jpg", "size": 10})["files"][0]
    assert put(owner_client, lying["url"], b"x" * (1024**2 + 1)).status_code == 413
    assert not any(name.endswith(".part") for name in _stored())


def _stored() -> list[str]:
    from pathlib import Path

    return [path.name for path in Path(default_storage.path("")).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"files": 3}',
        b'{"files": [3]}',
        b'{"files": [{"path": "a.jpg"}]}',
        b'{"files": [{"path": "a.jpg", "size": -1}]}',
        b'{"files": [{"path": "a.jpg", "size": true}]}',
        b'{"files": [{"path": "a.jpg", "size": 1e300}]}',
        b'{"files": [{"path": "", "size": 1}]}',
        b'{"files": [{"path": "a.jpg", "size": 1, "sha256": "../../etc"}]}',
        b'{"archive": {"name": "z.zip", "size": 0}}',
        b'{"archive": "z.zip"}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_manifest_is_a_400_with_a_sentence(owner_client: Client, body: bytes) -> None:
    answer = owner_client.post(reverse("library:start"), body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert not Collection.objects.exists()


def test_a_manifest_of_more_than_500_files_is_refused(owner_client: Client) -> None:
    said = {"files": [{"path": f"{n}.jpg", "size": 1} for n in range(501)]}
    answer = post(owner_client, reverse("library:start"), said)
    assert answer.status_code == 413
    assert "501" in answer.json()["error"]


def test_odd_characters_in_paths_do_no_harm(owner_client: Client) -> None:
    paths = ["a/\ud800.jpg", "b/\0x.jpg", "../../c.jpg", "d\\e.jpg", "x" * 3000 + ".jpg", "😀/😀.jpg"]
    body = json.dumps({"name": "\udfff", "files": [{"path": p, "size": 1} for p in paths]})
    answer = owner_client.post(reverse("library:start"), body, content_type="application/json")
    assert answer.status_code == 201


def test_a_finished_upload_takes_nothing_more(owner_client: Client) -> None:
    answer = begin(owner_client, entry("a/1.jpg"))
    owner_client.post(answer["closeUrl"])
    assert post(owner_client, answer["manifestUrl"], {"files": [entry("b.jpg")]}).status_code == 409
    assert owner_client.post(answer["closeUrl"]).status_code == 200, "closing twice is one wish"


def test_a_full_disk_is_a_507_and_nothing_is_lost(owner_client: Client, monkeypatch: Any) -> None:
    answer = begin(owner_client, entry("a/1.jpg"))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("webapp.library.services.receive", full)
        refused = put(owner_client, answer["files"][0]["url"], PHOTO)
    assert refused.status_code == 507
    assert "disk is full" in refused.json()["error"]
    assert put(owner_client, answer["files"][0]["url"], PHOTO).status_code == 200


def test_a_busy_database_is_a_503_with_a_time_to_wait(owner_client: Client, monkeypatch: Any) -> None:
    answer = begin(owner_client, entry("a/1.jpg"))

    def busy(*args: Any) -> None:
        raise OperationalError("database is locked")

    monkeypatch.setattr("webapp.library.uploads.store_photo", busy)
    refused = put(owner_client, answer["files"][0]["url"], PHOTO)
    assert refused.status_code == 503
    assert int(refused["Retry-After"]) > 0


# Who may ------------------------------------------------------------------------------------------


@pytest.fixture
def doors(owner_client: Client) -> list[tuple[str, str]]:
    answer = begin(owner_client, entry("a/1.jpg"))
    collection = Collection.objects.get()
    return [
        ("post", reverse("library:open-import", args=[collection.pk])),
        ("post", answer["manifestUrl"]),
        ("put", answer["files"][0]["url"]),
        ("put", reverse("library:chunk", args=[answer["import"], 0])),
        ("get", answer["statusUrl"]),
        ("post", answer["closeUrl"]),
    ]


def call(client: Client, method: str, url: str) -> Any:
    if method == "get":
        return client.get(url)
    return getattr(client, method)(url, b'{"files": []}', content_type="application/json")


def test_an_outsider_finds_nothing(doors: list[tuple[str, str]], outsider_client: Client) -> None:
    for method, url in doors:
        answer = call(outsider_client, method, url)
        assert answer.status_code == 404, url
        assert answer.json()["error"]


def test_nobody_is_asked_to_log_in(doors: list[tuple[str, str]], client: Client) -> None:
    for method, url in doors:
        assert call(client, method, url).status_code == 401, url


def test_what_is_not_there_is_a_404(owner_client: Client) -> None:
    for name, args in (("open-import", []), ("manifest", []), ("close", []), ("chunk", [0]), ("file", [1])):
        url = reverse(f"library:{name}", args=[uuid4(), *args])
        method = "put" if name in ("chunk", "file") else "post"
        assert call(owner_client, method, url).status_code == 404, name
    huge = reverse("library:file", args=[uuid4(), 10**30])
    assert call(owner_client, "put", huge).status_code == 404


def test_a_file_is_found_only_under_its_own_import(owner_client: Client) -> None:
    one, other = begin(owner_client, entry("a/1.jpg")), begin(owner_client, entry("b/1.jpg"))
    stray = one["files"][0]["url"].replace(one["import"], other["import"])
    assert put(owner_client, stray, PHOTO).status_code == 404


def test_a_wrong_method_is_a_405(doors: list[tuple[str, str]], owner_client: Client) -> None:
    for method, url in doors:
        wrong = "post" if method != "post" else "get"
        assert call(owner_client, wrong, url).status_code == 405, url


def test_without_the_token_nothing_is_taken(doors: list[tuple[str, str]], owner: User) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(owner)
    for method, url in doors:
        if method != "get":
            assert call(strict, method, url).status_code == 403, url


def test_a_collection_put_away_takes_nothing(doors: list[tuple[str, str]], owner_client: Client) -> None:
    trash.put_away(Collection.objects.get())
    for method, url in doors:
        assert call(owner_client, method, url).status_code == 404, url


# What it costs ------------------------------------------------------------------------------------


def test_one_photo_costs_few_queries(owner_client: Client) -> None:
    answer = begin(owner_client, *[entry(f"{n}.jpg", factories.picture(4, n)) for n in range(2)])
    put(owner_client, answer["files"][0]["url"], factories.picture(4, 0))
    Job.objects.update(state=Job.State.RUNNING)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        put(owner_client, answer["files"][1]["url"], factories.picture(4, 1))
    assert len(queries) <= 9, "\n".join(query["sql"] for query in queries)
