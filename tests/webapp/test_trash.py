"""What was put away can be brought back for 30 days; then it goes, and takes nothing along that somebody uses."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.files.storage import default_storage
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from fewshot_engine.config import EpisodeConfig, TrainConfig
from tests import factories
from webapp import queue, trash
from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.labelsets import services as labelsets
from webapp.labelsets.models import Classification, Example, LabelSet
from webapp.library import services as library
from webapp.library.models import Blob, Collection, Embedding, ImportFile, Photo, Shard
from webapp.training import services as training

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _plain_parts(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    monkeypatch.setattr(queue, "send", lambda *_arguments: True)


@pytest.fixture
def collection(owner: User) -> Collection:
    made = factories.make_collection(owner, "Holiday")
    for n in range(4):
        factories.make_photo(made, "beach", name=f"{n}.jpg", content=b"bytes %d" % n)
    return made


def put_away(thing: trash.Thing, *, days_ago: float = 31) -> None:
    type(thing)._default_manager.filter(pk=thing.pk).update(deleted_at=timezone.now() - timedelta(days=days_ago))


def age_blobs() -> None:
    Blob.objects.update(created=timezone.now() - timedelta(hours=1))


def taught(owner: User, *photos: Photo, name: str = "Trips") -> tuple[LabelSet, list[Example]]:
    label_set, (label,) = factories.make_label_set(owner, name, ("sea",))
    return label_set, labelsets.add_examples(label, photos)


def test_what_is_put_away_stays_for_thirty_days(collection: Collection) -> None:
    put_away(collection, days_ago=29)
    assert trash.delete_due() == 0
    assert trash.bring_back(collection)
    assert Collection.objects.get().deleted_at is None


def test_a_collection_goes_with_its_photos_and_their_files(collection: Collection) -> None:
    names = [blob.original_name for blob in Blob.objects.all()]
    batch = library.open_import(collection)
    put_away(collection)
    age_blobs()
    assert trash.delete_due() == 1
    assert not Collection.objects.exists() and not Photo.objects.exists() and not Blob.objects.exists()
    assert not Job.objects.filter(pk=batch.job_id).exists()
    assert not any(default_storage.exists(name) for name in names)


def test_photos_that_label_sets_learn_from_stay_with_them(owner: User, collection: Collection) -> None:
    used, *_others = collection.photos.all()
    label_set, (example,) = taught(owner, used)
    version = label_set.version
    put_away(collection)
    age_blobs()
    trash.delete_due()
    example.refresh_from_db()
    assert example.photo is not None and example.photo.pk == used.pk
    assert example.photo.collection_id == label_set.drops_id
    assert default_storage.exists(example.photo.blob.original_name)
    assert Blob.objects.count() == 1
    label_set.refresh_from_db()
    assert label_set.version == version


def test_two_sets_may_share_a_photo_and_go_one_after_the_other(owner: User, collection: Collection) -> None:
    photo = collection.photos.first()
    assert photo is not None
    first, _examples = taught(owner, photo, name="First")
    second, (example,) = taught(owner, photo, name="Second")
    put_away(collection)
    trash.delete_due()
    put_away(first)
    assert trash.delete_due() == 1
    example.refresh_from_db()
    assert example.photo is not None and example.photo.collection_id == second.drops_id
    put_away(second)
    age_blobs()
    trash.delete_due()
    assert not Photo.objects.exists() and not Blob.objects.exists() and not Collection.objects.exists()


def test_a_picture_that_was_dropped_on_the_set_as_well_is_not_doubled(owner: User, collection: Collection) -> None:
    photo = collection.photos.first()
    assert photo is not None
    label_set, _examples = taught(owner, photo)
    twin = Photo.objects.create(blob=photo.blob, collection=label_set.drops, name="twin.jpg", serial=1)
    label = label_set.labels.get()
    labelsets.add_examples(label, [twin])
    put_away(collection)
    trash.delete_due()
    assert [e.photo_id for e in Example.objects.current().filter(label=label)] == [twin.pk]


def test_old_versions_keep_a_named_gap(owner: User, collection: Collection) -> None:
    photo = collection.photos.get(name="2.jpg")
    _label_set, (example,) = taught(owner, photo)
    labelsets.remove_example(example)
    put_away(collection)
    trash.delete_due()
    example.refresh_from_db()
    assert (example.photo, example.gap) == (None, "2.jpg")
    with pytest.raises(labelsets.LabelSetError, match=r"“2\.jpg” was deleted for good"):
        labelsets.restore_example(example)


def test_no_current_example_loses_its_photo_unheard(owner: User, collection: Collection) -> None:
    photo = collection.photos.first()
    assert photo is not None
    taught(owner, photo)
    with pytest.raises(IntegrityError), transaction.atomic():
        photo.delete()


def test_a_label_set_goes_with_its_batches_and_drops(owner: User, collection: Collection) -> None:
    photo = collection.photos.first()
    assert photo is not None
    label_set, _examples = taught(owner, photo)
    batch = labelsets.classify_collection(label_set, collection)
    put_away(label_set)
    assert trash.delete_due() == 1
    assert not Classification.objects.exists()
    assert not Job.objects.filter(pk__in=(batch.job_id, label_set.job_id)).exists()
    assert list(Collection.objects.all()) == [collection]
    assert collection.photos.count() == 4


def test_a_collection_that_is_trained_on_waits(owner: User) -> None:
    made = factories.make_collection(owner)
    for n in range(4):
        for _photo in range(4):
            factories.make_photo(made, f"class {n}")
    run = training.start_run(owner, made, TrainConfig(episode=EpisodeConfig(2, 1, 2)))
    put_away(made)
    assert trash.delete_due() == 0
    Job.objects.filter(pk=run.job_id).update(state=Job.State.CANCELLED)
    assert trash.delete_due() == 1
    run.refresh_from_db()
    assert run.collection is None
    with pytest.raises(training.TrainingError, match="deleted for good"):
        training.continue_run(run)


def test_bytes_that_an_upload_waits_for_stay(owner: User, collection: Collection) -> None:
    batch = library.open_import(factories.make_collection(owner, "Next"))
    blob = Blob.objects.all()[0]
    library.add_to_manifest(batch, [library.Entry("again.jpg", blob.size, blob.sha256)])
    put_away(collection)
    age_blobs()
    trash.delete_due()
    assert list(Blob.objects.all()) == [blob]
    assert default_storage.exists(blob.original_name)


def test_bytes_that_have_just_come_stay(owner: User) -> None:
    batch = library.open_import(factories.make_collection(owner))
    (file,) = library.add_to_manifest(batch, [library.Entry("new.jpg", 5)])
    library.store_photo(file, [b"bytes"])
    ImportFile.objects.all().delete()
    assert trash.delete_orphans() == 0
    age_blobs()
    assert trash.delete_orphans() == 3


def test_bytes_that_come_again_while_they_go_are_there(owner: User, collection: Collection) -> None:
    """The row was deleted, the files not yet: a new upload of the same bytes brings the row back, and keeps them."""
    batch = library.open_import(factories.make_collection(owner))
    (file,) = library.add_to_manifest(batch, [library.Entry("new.jpg", 5)])
    library.store_photo(file, [b"again"])
    (blob,) = Blob.objects.filter(sha256=file.sha256)
    trash._delete_files([blob])
    assert default_storage.exists(blob.original_name)


def test_shards_without_vectors_go(owner: User, collection: Collection) -> None:
    shards = [Shard.objects.create(backbone="toy", dim=2, sealed=sealed) for sealed in (True, False)]
    for shard, photo in zip(shards, collection.photos.all(), strict=False):
        Embedding.objects.create(blob=photo.blob, backbone="toy", shard=shard, row=0)
    put_away(collection)
    age_blobs()
    trash.delete_due()
    assert list(Shard.objects.all()) == [shards[1]]  # somebody may be writing to it


# The pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["collection", "label set"])
def test_delete_for_good_can_be_undone_for_a_moment(
    kind: str, owner: User, owner_client: Client, collection: Collection
) -> None:
    thing: trash.Thing = collection if kind == "collection" else factories.make_label_set(owner, "Holiday")[0]
    area = "library" if kind == "collection" else "labelsets"
    trash.put_away(thing)
    page = owner_client.get(reverse("library:collections" if kind == "collection" else "labelsets:list"))
    assert "1 put away" in page.content.decode() and "deleted for good on" in page.content.decode()
    gone = owner_client.post(reverse(f"{area}:delete-for-good", args=[thing.pk]), follow=True).content.decode()
    assert "“Holiday” is deleted for good in 2 minutes." in gone
    assert "being deleted for good" in gone
    assert reverse(f"{area}:restore", args=[thing.pk]) in gone
    assert trash.delete_due() == 0
    back = owner_client.post(reverse(f"{area}:restore", args=[thing.pk]), follow=True).content.decode()
    assert "“Holiday” is back." in back
    put_away(thing)
    late = owner_client.post(reverse(f"{area}:restore", args=[thing.pk]), follow=True).content.decode()
    assert "It is too late: “Holiday” is being deleted." in late
    assert trash.delete_due() == 1


def test_it_is_said_what_goes_and_what_stays(owner: User, owner_client: Client, collection: Collection) -> None:
    taught(owner, *collection.photos.all()[:2])
    trash.put_away(collection)
    url = reverse("library:delete-for-good", args=[collection.pk])
    said = owner_client.post(url, follow=True).content.decode()
    assert "4 photos go with it. 2 of them stay, as examples in “Trips”." in said


@pytest.mark.parametrize("area", ["library", "labelsets"])
def test_only_what_is_put_away_and_ones_own_is_deleted(
    area: str, owner: User, owner_client: Client, outsider_client: Client, collection: Collection
) -> None:
    thing: trash.Thing = collection if area == "library" else factories.make_label_set(owner)[0]
    url = reverse(f"{area}:delete-for-good", args=[thing.pk])
    assert owner_client.post(url).status_code == 404
    trash.put_away(thing)
    assert outsider_client.post(url).status_code == 404
    assert owner_client.get(url).status_code == 405
    thing.refresh_from_db()
    assert thing.deleted_at is not None and thing.deleted_at > timezone.now() - timedelta(minutes=5)
