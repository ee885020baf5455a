"""Pages of collections and the files of photos: what they show, to whom, and with how many queries."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from tests import factories
from webapp.accounts.models import User
from webapp.library import shelf
from webapp.library.models import Category, Collection, Photo

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _own_files(settings: Any, tmp_path: Any) -> None:
    settings.MEDIA_ROOT = tmp_path / "media"
    settings.STATIC_ROOT = tmp_path
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }


@pytest.fixture
def shelves(owner: User) -> Collection:
    """Fruit with three photos, two of them in Fruit/Lemon; one photo without a category."""
    made = factories.make_collection(owner, "Shelves")
    factories.make_photo(made, "Fruit", name="fruit.jpg")
    parent = Category.objects.get(path="Fruit")
    for n in range(2):
        factories.make_photo(made, "Fruit/Lemon", name=f"lemon {n}.jpg")
    Category.objects.filter(path="Fruit/Lemon").update(parent=parent)
    factories.make_photo(made, name="loose.jpg")
    return made


def page(client: Client, url: str) -> str:
    answer = client.get(url)
    assert answer.status_code == 200
    return answer.content.decode()


def queries_of(client: Client, url: str) -> int:
    client.get(url)  # what is cached for good, such as content types, is no part of the figure
    with CaptureQueriesContext(connection) as queries:
        assert client.get(url).status_code == 200
    return len(queries)


# What is shown ------------------------------------------------------------------------------------


def test_counts_of_a_category_include_those_below_it(shelves: Collection) -> None:
    tree = shelf.read_tree(shelves)
    assert [(b.category.path, b.own, b.total) for b in tree.branches] == [("Fruit", 1, 3), ("Fruit/Lemon", 2, 2)]
    assert (tree.photos, tree.unlabelled) == (4, 1)


def test_a_category_shows_the_photos_below_it(owner_client: Client, shelves: Collection) -> None:
    fruit = Category.objects.get(path="Fruit")
    html = page(owner_client, f"{shelves.get_absolute_url()}?category={fruit.pk}")
    assert all(name in html for name in ("fruit.jpg", "lemon 0.jpg", "lemon 1.jpg"))
    assert "loose.jpg" not in html
    unlabelled = page(owner_client, f"{shelves.get_absolute_url()}?category=none")
    assert "loose.jpg" in unlabelled
    assert "lemon 0.jpg" not in unlabelled


def test_a_category_whose_name_begins_like_another_is_not_below_it(owner: User, owner_client: Client) -> None:
    made = factories.make_collection(owner)
    factories.make_photo(made, "Pear", name="pear.jpg")
    factories.make_photo(made, "Pearl", name="pearl.jpg")
    pear = Category.objects.get(path="Pear")
    assert "pearl.jpg" not in page(owner_client, f"{made.get_absolute_url()}?category={pear.pk}")


def test_more_than_a_page_of_photos_come_in_order_and_each_once(
    owner: User, owner_client: Client, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shelf, "PAGE", 3)
    made = factories.make_collection(owner)
    photos = [factories.make_photo(made, name=f"number {n}.jpg") for n in range(7)]
    seen: list[str] = []
    after = 0
    for _ in range(3):
        found = shelf.read_photos(made, None, unlabelled=False, after=after)
        seen += [photo.name for photo in found.photos]
        after = found.last
    assert seen == [photo.name for photo in photos]
    assert not found.has_more
    html = page(owner_client, reverse("library:photos", args=[made.pk]) + f"?after={photos[2].serial}")
    assert "number 3.jpg" in html
    assert "number 2.jpg" not in html
    assert f"after={photos[5].serial}" in html


@pytest.mark.parametrize("query", ["category=abc", "category=999999", "category=" + "9" * 40, "category=-1"])
def test_a_category_that_is_not_there_is_a_404(owner_client: Client, shelves: Collection, query: str) -> None:
    assert owner_client.get(f"{shelves.get_absolute_url()}?{query}").status_code == 404


@pytest.mark.parametrize("after", ["x", "-1", "9" * 40, "²"])
def test_a_place_that_is_no_number_is_the_beginning(owner_client: Client, shelves: Collection, after: str) -> None:
    assert "fruit.jpg" in page(owner_client, f"{shelves.get_absolute_url()}?after={after}")


def test_a_category_of_another_collection_is_a_404(owner: User, owner_client: Client, shelves: Collection) -> None:
    other = factories.make_collection(owner, "Other")
    factories.make_photo(other, "Hats")
    hats = Category.objects.get(path="Hats")
    assert owner_client.get(f"{shelves.get_absolute_url()}?category={hats.pk}").status_code == 404


@pytest.mark.parametrize(
    ("sizes", "level"),
    [
        ([], "none"),
        ([100] * 4, "none"),
        ([5] * 30, "none"),
        ([6] * 5, "small"),
        ([20] * 14, "small"),
        ([20] * 15, "minimum"),
        ([50] * 29, "minimum"),
        ([50] * 30, "good"),
        ([100] * 50, "excellent"),
    ],
)
def test_readiness_follows_the_specification(sizes: list[int], level: str) -> None:
    found = shelf.readiness(sizes, photos=sum(sizes), names=[f"class {n}" for n in range(len(sizes))])
    assert found.level == level
    assert bool(found.open_points) == (level != "excellent")


def test_readiness_names_what_is_missing() -> None:
    found = shelf.readiness([9, 12, *[20] * 13], photos=281, names=["Celery", "Chives", *"abcdefghijklm"])
    texts = " ".join(point.text for point in found.points if not point.is_done)
    assert "so far in 13" in texts
    assert "Celery 9, Chives 12" in texts


def test_home_leads_a_newcomer_through_three_steps(owner_client: Client) -> None:
    html = page(owner_client, reverse("home"))
    assert "Upload photos" in html
    assert "Name your labels" in html
    assert "Drop new photos" in html


def test_home_says_the_next_step(owner: User, owner_client: Client, shelves: Collection) -> None:
    assert "Make a label set" in page(owner_client, reverse("home"))
    _label_set, (lemon, _lime) = factories.make_label_set(owner, "Kitchen", ("Lemon", "Lime"))
    assert "Give examples" in page(owner_client, reverse("home"))
    from webapp.labelsets import services as labelsets

    for label in _label_set.labels.all():
        labelsets.add_examples(label, [factories.make_photo(shelves) for _ in range(2)])
    assert "Train on it" not in page(owner_client, reverse("home"))
    for category in range(5):
        for _ in range(6):
            factories.make_photo(shelves, f"Base {category}")
    assert "Train on it" in page(owner_client, reverse("home"))
    assert lemon.name


def test_names_with_script_are_text_on_every_page(owner: User, owner_client: Client) -> None:
    name = '"><script>alert(1)</script>'
    made = factories.make_collection(owner, name)
    photo = factories.make_photo(made, name, name=name)
    factories.make_label_set(owner, name, (name,))
    for url in (reverse("home"), reverse("library:collections"), made.get_absolute_url()):
        assert "<script>alert" not in page(owner_client, url), url
    assert photo.name == name


# Making, naming, putting away ---------------------------------------------------------------------


def test_a_collection_is_made_renamed_put_away_and_brought_back(owner_client: Client, owner: User) -> None:
    owner_client.post(reverse("library:new"), {"name": "  Herbs "})
    made = Collection.objects.get(owner=owner)
    assert made.name == "Herbs"
    owner_client.post(reverse("library:rename", args=[made.pk]), {"name": "Spices"})
    assert "Spices" in page(owner_client, made.get_absolute_url())
    answer = owner_client.post(reverse("library:put-away", args=[made.pk]), follow=True)
    assert reverse("library:restore", args=[made.pk]) in answer.content.decode(), "the toast leads back"
    assert owner_client.get(made.get_absolute_url()).status_code == 404
    owner_client.post(reverse("library:restore", args=[made.pk]))
    assert owner_client.get(made.get_absolute_url()).status_code == 200


@pytest.mark.parametrize("name", ["", "   ", "x" * 121])
def test_a_collection_without_a_proper_name_is_not_made(owner_client: Client, name: str) -> None:
    answer = owner_client.post(reverse("library:new"), {"name": name}, follow=True)
    assert "needs a name" in answer.content.decode()
    assert not Collection.objects.exists()


# Who may ------------------------------------------------------------------------------------------


def pages_of(collection: Collection) -> list[tuple[str, str]]:
    gets = [("get", reverse(f"library:{name}", args=[collection.pk])) for name in ("collection", "overview", "photos")]
    posts = [("post", reverse(f"library:{name}", args=[collection.pk])) for name in ("rename", "put-away", "restore")]
    return gets + posts


def test_an_outsider_finds_nothing(shelves: Collection, outsider_client: Client) -> None:
    for method, url in pages_of(shelves):
        assert getattr(outsider_client, method)(url, {"name": "Mine"}).status_code == 404, url
    shelves.refresh_from_db()
    assert (shelves.name, shelves.deleted_at) == ("Shelves", None)


def test_nobody_is_led_to_the_login(shelves: Collection, client: Client) -> None:
    for method, url in [*pages_of(shelves), ("get", reverse("home")), ("get", reverse("library:collections"))]:
        answer = getattr(client, method)(url)
        assert answer.status_code == 302, url
        assert answer["Location"].startswith(reverse("account_login")), url


def test_a_wrong_method_is_a_405(shelves: Collection, owner_client: Client) -> None:
    for method, url in pages_of(shelves):
        wrong = "post" if method == "get" else "get"
        assert getattr(owner_client, wrong)(url).status_code == 405, url


def test_nothing_of_others_is_listed(shelves: Collection, outsider_client: Client) -> None:
    for url in (reverse("home"), reverse("library:collections")):
        assert "Shelves" not in page(outsider_client, url)


def test_a_label_sets_own_collection_has_no_page(owner: User, owner_client: Client) -> None:
    label_set, _labels = factories.make_label_set(owner, "Kitchen")
    assert owner_client.get(reverse("library:collection", args=[label_set.drops_id])).status_code == 404
    assert "Kitchen" not in page(owner_client, reverse("library:collections"))


# The files of photos ------------------------------------------------------------------------------


@pytest.fixture
def photo(shelves: Collection) -> Photo:
    return factories.make_photo(shelves, name='a "b".png', content=factories.picture())


@pytest.mark.parametrize("what", ["thumb", "work"])
def test_a_photo_is_shown_as_a_jpeg_that_can_do_nothing(owner_client: Client, photo: Photo, what: str) -> None:
    answer = owner_client.get(reverse("library:photo-file", args=[photo.pk, what]))
    assert answer.content == factories.picture()
    assert answer["Content-Type"] == "image/jpeg"
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer["Content-Security-Policy"]
    assert "private" in answer["Cache-Control"]
    assert "immutable" in answer["Cache-Control"]


def test_an_original_is_a_download_under_its_name(owner_client: Client, photo: Photo) -> None:
    answer = owner_client.get(reverse("library:photo-file", args=[photo.pk, "original"]))
    assert answer["Content-Disposition"] == 'attachment; filename="a \\"b\\".png"'
    photo.blob.format = "weird"
    photo.blob.save()
    answer = owner_client.get(reverse("library:photo-file", args=[photo.pk, "original"]))
    assert answer["Content-Type"] == "application/octet-stream"


def test_a_browser_that_has_the_photo_does_not_get_it_again(owner_client: Client, photo: Photo) -> None:
    url = reverse("library:photo-file", args=[photo.pk, "thumb"])
    etag = owner_client.get(url)["ETag"]
    again = owner_client.get(url, headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")


def test_photos_are_for_their_owner_alone(photo: Photo, outsider_client: Client, client: Client) -> None:
    for what in ("thumb", "work", "original"):
        url = reverse("library:photo-file", args=[photo.pk, what])
        etag = {"If-None-Match": f'"{photo.blob.sha256[:32]}-{what}"'}
        assert outsider_client.get(url).status_code == 404
        assert outsider_client.get(url, headers=etag).status_code == 404
        assert client.get(url).status_code == 302


def test_a_photo_or_size_that_is_not_there_is_a_404(owner_client: Client, photo: Photo, shelves: Collection) -> None:
    without_file = factories.make_photo(shelves)
    for pk, what in ((photo.pk, "huge"), (uuid4(), "thumb"), (without_file.pk, "thumb")):
        assert owner_client.get(reverse("library:photo-file", args=[pk, what])).status_code == 404


def test_a_photo_costs_three_queries(owner_client: Client, photo: Photo) -> None:
    url = reverse("library:photo-file", args=[photo.pk, "thumb"])
    assert queries_of(owner_client, url) <= 3  # session, person, photo with its blob


# How many queries ---------------------------------------------------------------------------------


def fill(owner: User, n: int) -> Collection:
    for k in range(n):
        made = factories.make_collection(owner, f"Collection {k}")
        for category in ("a", "b", "b/c"):
            for _ in range(n):
                factories.make_photo(made, category)
        _one, labels = factories.make_label_set(owner, f"Set {k}", ("x", "y"))
        from webapp.labelsets import services as labelsets

        for label in labels:
            labelsets.add_examples(label, made.photos.all()[:2])
    return made


@pytest.mark.parametrize(
    ("name", "most"), [("home", 13), ("library:collections", 9), ("library:collection", 12), ("library:photos", 4)]
)
def test_pages_take_as_many_queries_for_much_as_for_little(
    owner: User, owner_client: Client, name: str, most: int
) -> None:
    made = fill(owner, 2)
    args = [made.pk] if name in ("library:collection", "library:photos") else []
    few = queries_of(owner_client, reverse(name, args=args))
    made = fill(owner, 5)
    many = queries_of(owner_client, reverse(name, args=[made.pk] if args else []))
    assert few == many <= most, (few, many)
