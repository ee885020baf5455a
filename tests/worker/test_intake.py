"""From bytes to photos with embeddings, whatever the bytes are."""

from __future__ import annotations

import hashlib
import io
import zipfile

import numpy as np
import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from PIL import Image

from tests.factories import make_collection, picture
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.jobs.services import claim, create_job, wake
from webapp.library import services
from webapp.library.models import Blob, Collection, Embedding, Import, ImportFile, Photo
from webapp.training.models import ACCURATE, DEFAULT_ENCODER
from worker import vectors
from worker.intake import embed_missing
from worker.tasks import run_job

pytestmark = pytest.mark.django_db


@pytest.fixture
def collection(owner: User) -> Collection:
    return make_collection(owner)


def send(batch: Import, files: dict[str, bytes]) -> None:
    entries = [services.Entry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()]
    for row in services.add_to_manifest(batch, entries):
        if row.state == ImportFile.State.WANTED:
            services.store_photo(row, [files[row.path]])


def take_in(collection: Collection, files: dict[str, bytes]) -> Import:
    batch = services.open_import(collection)
    send(batch, files)
    services.close_import(batch)
    run_job(str(batch.job_id))
    batch.refresh_from_db()
    return batch


def take_in_zip(collection: Collection, data: bytes, name: str = "photos.zip") -> Import:
    batch = services.open_import(collection, archive_name=name, archive_size=len(data))
    services.put_chunk(batch, 0, [data], sha256=hashlib.sha256(data).hexdigest())
    services.close_import(batch)
    run_job(str(batch.job_id))
    batch.refresh_from_db()
    return batch


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_class_folders_become_a_tree_of_categories_with_embedded_photos(collection: Collection) -> None:
    batch = take_in(
        collection,
        {"Fruit/Apple/1.jpg": picture(0, 1), "Fruit/Pear/2.jpg": picture(1, 2), "stray.jpg": picture(2, 3)},
    )
    assert batch.state == Import.State.DONE
    assert batch.counts()["accepted"] == 3
    assert list(collection.categories.values_list("path", flat=True)) == ["Fruit", "Fruit/Apple", "Fruit/Pear"]
    apple = collection.categories.get(name="Apple")
    assert apple.parent is not None and apple.parent.path == "Fruit"
    photo = Photo.objects.get(category=apple)
    assert photo.name == "1.jpg"
    assert Photo.objects.get(name="stray.jpg").category is None
    there, embeddings = vectors.read(DEFAULT_ENCODER, [photo.blob_id])
    assert there.all() and embeddings.shape == (1, 1280 * len(vectors.members(DEFAULT_ENCODER)))
    assert default_storage.exists(photo.blob.thumbnail_name)
    assert default_storage.exists(photo.blob.working_name)


def test_each_file_gets_its_reason_and_the_rest_survives(collection: Collection) -> None:
    good = picture(0, 1)
    batch = take_in(
        collection,
        {
            "a/good.jpg": good,
            "a/again.jpg": good,
            "a/text.jpg": b"this is no picture at all",
            "a/cut.jpg": good[: len(good) // 2],
            "a/empty.jpg": b"",
            "a/notes.txt": b"hello",
            "a/.DS_Store": b"x",
        },
    )
    found = {f.path: (f.state, f.reason) for f in batch.files.all()}
    assert {path: state for path, (state, _reason) in found.items()} == {
        "a/good.jpg": "accepted",
        "a/again.jpg": "duplicate",
        "a/text.jpg": "refused",
        "a/cut.jpg": "refused",
        "a/empty.jpg": "refused",
        "a/notes.txt": "skipped",
        "a/.DS_Store": "skipped",
    }
    assert all(reason for path, (_state, reason) in found.items() if path != "a/good.jpg")
    assert batch.job.state in (Job.State.QUEUED, Job.State.SUCCEEDED)
    assert Photo.objects.filter(collection=collection).count() == 1


def test_a_second_upload_of_the_same_folder_is_all_duplicates_and_sends_nothing(collection: Collection) -> None:
    files = {f"a/{n}.jpg": picture(0, n) for n in range(4)}
    take_in(collection, files)
    again = services.open_import(collection)
    entries = [services.Entry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()]
    rows = services.add_to_manifest(again, entries)
    assert {row.state for row in rows} == {ImportFile.State.STORED}
    services.close_import(again)
    run_job(str(again.job_id))
    assert again.counts()["duplicate"] == 4
    assert Photo.objects.filter(collection=collection).count() == 4


def test_folders_that_differ_in_case_or_unicode_form_become_one_and_it_is_said(collection: Collection) -> None:
    batch = take_in(
        collection,
        {
            "Apple/1.jpg": picture(0, 1),
            "apple/2.jpg": picture(0, 2),
            "Ka\u0308se/3.jpg": picture(1, 3),
            "K\u00e4se/3.jpg": picture(1, 4),
        },
    )
    assert collection.categories.count() == 2
    assert batch.counts()["accepted"] == 4
    assert len(batch.notices) == 2
    assert "“Apple” (1), “apple” (1)" in batch.notices[0]


def test_photos_are_taken_in_while_others_are_still_on_their_way(collection: Collection) -> None:
    batch = services.open_import(collection)
    send(batch, {"a/1.jpg": picture(0, 1)})
    run_job(str(batch.job_id))
    batch.job.refresh_from_db()
    assert (batch.job.state, batch.counts()["accepted"]) == (Job.State.IDLE, 1)
    send(batch, {"a/2.jpg": picture(0, 2)})
    services.close_import(batch)
    run_job(str(batch.job_id))
    batch.job.refresh_from_db()
    assert (batch.job.state, batch.counts()["accepted"]) == (Job.State.SUCCEEDED, 2)


def test_doing_the_job_again_changes_nothing(collection: Collection) -> None:
    batch = take_in(collection, {"a/1.jpg": picture(0, 1)})
    before = batch.job.last_event
    run_job(str(batch.job_id))
    batch.job.refresh_from_db()
    assert Photo.objects.count() == 1
    assert batch.job.last_event >= before


def test_a_damaged_upload_is_told_and_leaves_no_row(collection: Collection) -> None:
    batch = services.open_import(collection)
    (row,) = services.add_to_manifest(batch, [services.Entry("a.jpg", 10, "0" * 64)])
    with pytest.raises(services.UploadError, match="damaged"):
        services.store_photo(row, [b"other bytes"])
    assert not Blob.objects.exists()
    row.refresh_from_db()
    assert row.state == ImportFile.State.WANTED


def test_the_root_folder_of_a_zip_is_no_category(collection: Collection) -> None:
    data = zipped(
        {f"images/{kind}/{n}.png": picture(k, n, format="PNG") for k, kind in enumerate("ab") for n in (1, 2)}
    )
    batch = take_in_zip(collection, data)
    assert batch.counts()["accepted"] == 4
    assert sorted(collection.categories.values_list("path", flat=True)) == ["a", "b"]
    assert not default_storage.exists(batch.chunk_name(0))


def test_names_in_a_zip_lead_nowhere(collection: Collection) -> None:
    names = ["../../evil.jpg", "/etc/evil2.jpg", "C:\\evil3.jpg", "ok/../../x/evil4.jpg"]
    take_in_zip(collection, zipped({name: picture(0, n) for n, name in enumerate(names)}))
    assert Photo.objects.filter(collection=collection).count() == 4
    assert not collection.categories.filter(path__contains="..").exists()


def test_a_zip_bomb_is_refused_by_its_ratio(collection: Collection) -> None:
    batch = take_in_zip(collection, zipped({"a/bomb.jpg": b"\0" * 50_000_000, "a/good.jpg": picture(0, 1)}))
    found = {f.path: (f.state, f.reason) for f in batch.files.all()}
    assert found["a/bomb.jpg"][0] == "refused" and "times its size" in found["a/bomb.jpg"][1]
    assert found["a/good.jpg"][0] == "accepted"


def test_an_entry_larger_than_it_says_is_cut_off(collection: Collection) -> None:
    data = bytearray(zipped({"a/liar.jpg": picture(0, 1, size=300)}))
    place = data.rfind(b"PK\x01\x02")
    data[place + 24 : place + 28] = (100).to_bytes(4, "little")  # the directory's word for the unpacked size
    batch = take_in_zip(collection, bytes(data))
    assert batch.counts()["refused"] == 1
    assert not Photo.objects.exists()


def test_links_and_encrypted_entries_are_refused(collection: Collection) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    batch = take_in_zip(collection, out.getvalue())
    assert batch.files.get(path="a/link.jpg").reason.startswith("A link")


@pytest.mark.parametrize("data", [b"PK\x03\x04 no zip", b"x" * 1000])
def test_what_is_no_zip_is_said(collection: Collection, data: bytes) -> None:
    batch = take_in_zip(collection, data, name="broken.zip")
    assert batch.counts()["refused"] == 1
    assert "damaged" in batch.files.get().reason


def test_two_entries_of_one_name_are_both_kept(collection: Collection) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/1.jpg", picture(0, 1))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/1.jpg", picture(0, 2))
    assert take_in_zip(collection, out.getvalue()).counts()["accepted"] == 2


def test_an_unfinished_zip_cannot_be_closed(collection: Collection) -> None:
    batch = services.open_import(collection, archive_name="a.zip", archive_size=20_000_000)
    with pytest.raises(services.UploadError, match="3 chunks"):
        services.close_import(batch)


def test_bombs_are_refused(collection: Collection) -> None:
    out = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(out, "PNG")
    batch = take_in(collection, {"bomb.png": out.getvalue()})
    assert batch.counts()["refused"] == 1
    assert "megapixels" in batch.files.get().reason


def test_only_what_has_not_seen_a_photo_looks_at_it_later(owner: User, collection: Collection) -> None:
    take_in(collection, {f"a/{n}.jpg": picture(0, n) for n in range(3)})
    blobs = list(Blob.objects.all())
    job = create_job(owner, Job.Kind.CLASSIFY, queue=Job.Queue.INTERACTIVE, title="x")
    wake(job.pk)
    claimed = claim(job.pk, worker="test")
    assert claimed is not None
    embed_missing(claimed, blobs, ACCURATE)
    lite0, lite1, lite2 = vectors.members(ACCURATE)
    Embedding.objects.filter(backbone__in=(lite1, lite2)).delete()
    job.events.all().delete()
    before = {e.blob_id: e.pk for e in Embedding.objects.filter(backbone=lite0)}
    assert len(before) == 3
    there, _none = vectors.read(ACCURATE, [blob.pk for blob in blobs])
    assert not there.any()
    embed_missing(claimed, [*blobs, blobs[0]], ACCURATE)
    there, fused = vectors.read(ACCURATE, [blob.pk for blob in blobs])
    assert there.all() and fused.shape == (3, 3 * 1280)
    assert {e.blob_id: e.pk for e in Embedding.objects.filter(backbone=lite0)} == before
    assert [event.data for event in job.events.filter(type="preparing")] == [{"done": 3, "total": 3}]


def test_fused_vectors_are_those_of_the_members_side_by_side(owner: User) -> None:
    blobs = [Blob.objects.create(owner=owner, sha256=f"{n:064x}", size=1).pk for n in range(3)]
    lite0, lite1, lite2 = vectors.members(ACCURATE)
    for n, backbone in enumerate((lite0, lite1, lite2)):
        seen = blobs[n // 2 :]  # the last one has not seen the first photo
        rows = np.tile(np.eye(4, dtype=np.float32)[n] * (n + 2), (len(seen), 1))
        vectors.enter(vectors.write(backbone, seen, rows))
    there, fused = vectors.read(ACCURATE, blobs)
    assert there.tolist() == [False, True, True]
    expected = np.concatenate([np.eye(4)[n] for n in range(3)]) / np.sqrt(3)
    np.testing.assert_allclose(fused, [expected, expected], rtol=1e-6)
    there, raw = vectors.read(lite0, blobs)
    assert there.all() and raw[0].tolist() == [2, 0, 0, 0]


def test_vectors_survive_what_a_dead_writer_left(owner: User) -> None:
    blobs = [Blob.objects.create(owner=owner, sha256=f"{n:064x}", size=1) for n in range(3)]
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    vectors.write("toy", [blobs[0].pk], rows[:1] + 100)  # written, never entered: its writer died
    written = vectors.write("toy", [b.pk for b in blobs], rows)
    vectors.enter(written)
    there, read = vectors.read("toy", [blobs[2].pk, blobs[0].pk])
    assert there.all()
    np.testing.assert_array_equal(read, rows[[2, 0]])
    assert vectors.missing("toy", [b.pk for b in blobs]) == []


def test_storage_keeps_what_is_there(owner: User) -> None:
    default_storage.save("x/same", ContentFile(b"one"))
    default_storage.save("x/same", ContentFile(b"one"))
    with default_storage.open("x/same") as file:
        assert file.read() == b"one"
    assert default_storage.listdir("x")[1] == ["same"]
