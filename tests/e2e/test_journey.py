"""The main job, end to end: from a stranger's first look to sorted photos and a trained model."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import log_in, snap

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def upload_folder(page: Page, folder: Path) -> None:
    """From home: choose a folder, say what it is for, and wait until all of it is taken in."""
    page.goto("/")
    page.set_input_files("#choose-folder", str(folder))
    dialog = page.locator("#what-for")
    expect(dialog).to_be_visible()
    snap(page, "03-what-for")
    dialog.get_by_role("button", name="Upload").click()


def photos_of(folder: Path, count: int | None = None, *, skip: int = 0) -> list[str]:
    """Paths of the photos in it, in order: all after the skipped ones, or so many of them."""
    found = sorted(folder.rglob("*.jpg"))[skip:]
    return [str(p) for p in found[:count]]


def test_from_a_folder_to_sorted_photos(page: Page, account: None, clothing: Path) -> None:
    log_in(page)
    snap(page, "02-home-empty")
    names = sorted(p.name for p in clothing.iterdir() if p.is_dir())[:3]
    count = len(photos_of(clothing))

    take_in_collection(page, clothing, names, count)
    label_set_url = create_label_set(page, "Wardrobe")
    for name in names:
        teach_label_by_upload(page, name, photos_of(clothing / name, 4))
    expect(page.locator(".label progress")).to_have_count(0, timeout=60_000)
    teach_by_camera_and_take_it_out(page, names[0], before=4)
    snap(page, "08-label-set")

    dropped = photos_of(clothing / names[0], 4, skip=6) + photos_of(clothing / names[1], 4, skip=6)
    batch_url = classify_drop(page, dropped)
    correct_first_photo(page)
    page.goto(batch_url)
    expect(page.locator("#results .photo")).to_have_count(8)
    expect(page.locator("#results .photo .mark")).to_have_count(1)

    page.goto(label_set_url)
    classify_collection(page, count)
    assert len(list(csv.DictReader(io.StringIO(exported(page, "csv"))))) == count
    assert len(json.dumps(json.loads(exported(page, "json")))) > count

    page.goto("/")
    snap(page, "11-home")


def take_in_collection(page: Page, folder: Path, names: list[str], count: int) -> None:
    """Upload it, read the report, and find its categories in the tree."""
    upload_folder(page, folder)
    page.wait_for_url(re.compile(r"/collections/[0-9a-f-]+/"))
    expect(page.locator("body")).to_contain_text(f"{count} accepted", timeout=240_000)
    snap(page, "04-collection-report")
    page.goto(page.url)
    for name in names:
        expect(page.locator(".tree")).to_contain_text(name)
    snap(page, "05-collection")


def create_label_set(page: Page, name: str) -> str:
    """From the empty list to the empty set; returns its address."""
    page.goto("/label-sets/")
    snap(page, "06-label-sets-empty")
    page.get_by_role("button", name="New label set").first.click()
    page.locator("#new-set input[name=name]").fill(name)
    page.locator("#new-set").get_by_role("button", name="Create").click()
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]+/"))
    snap(page, "07-label-set-empty")
    return page.url


def card_of(page: Page, name: str) -> Locator:
    return page.locator(f".label[data-name='{name}']")


def teach_label_by_upload(page: Page, name: str, photos: list[str]) -> None:
    page.locator("#new-label-name").fill(name)
    page.locator("#new-label-name").press("Enter")
    card = card_of(page, name)
    expect(card).to_be_visible()
    card.locator("[data-add]").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#add-examples .file-choice").click()
    chooser.value.set_files(photos)
    expect(card.locator("[id^=example-]")).to_have_count(len(photos), timeout=60_000)


def teach_by_camera_and_take_it_out(page: Page, name: str, *, before: int) -> None:
    card = card_of(page, name)
    card.locator("[data-add]").click()
    page.locator("#shoot-example").click()
    page.locator("#camera-shoot:enabled").click()
    expect(card.locator("[id^=example-]")).to_have_count(before + 1, timeout=60_000)
    page.keyboard.press("Escape")
    card.locator("[id^=drop-]").last.click()
    expect(card.locator("[id^=example-]")).to_have_count(before)


def classify_drop(page: Page, photos: list[str]) -> str:
    """Watch them get their answers; returns the address of the batch."""
    with page.expect_file_chooser() as chooser:
        page.locator("#classify-drop label.pick").click()
    chooser.value.set_files(photos)
    expect(page.locator("#results .photo:not(.is-waiting)")).to_have_count(len(photos), timeout=60_000)
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]+/[a-z/]*[0-9a-f-]+/"))
    return page.url


def correct_first_photo(page: Page) -> None:
    """Look why it was answered so, then press the second label's key."""
    page.locator("#results .photo").first.click()
    expect(page.locator("#evidence .subject")).to_be_visible()
    snap(page, "09-results")
    page.keyboard.press("2")
    expect(page.locator("#results .photo .mark")).to_have_count(1)


def classify_collection(page: Page, count: int) -> None:
    """From the page of the label set, until the whole collection is sorted."""
    before = page.url
    page.get_by_role("button", name="choose from a collection").click()
    page.locator("#choose-collection").get_by_role("button", name="Classify").click()
    page.wait_for_url(lambda url: url != before)
    expect(page.locator("#live-chip")).to_contain_text(f"{count} photos", timeout=120_000)
    snap(page, "10-results-collection")


def exported(page: Page, kind: str) -> str:
    links = [a.get_attribute("href") or "" for a in page.locator("a[href*='export']").all()]
    return page.request.get(next(link for link in links if kind in link)).text()


def test_from_a_tree_of_folders_to_a_trained_model(page: Page, account: None, grocery: Path) -> None:
    log_in(page)
    upload_folder(page, grocery)
    page.wait_for_timeout(3000)
    snap(page, "12-home-uploading")
    page.wait_for_url(re.compile(r"/collections/[0-9a-f-]+/"), timeout=400_000)
    count = len(list(grocery.rglob("*.jpg")))
    snap(page, "12-collection-uploading")
    expect(page.locator("body")).to_contain_text(re.compile(rf"{count:,} accepted|{count} accepted"), timeout=600_000)
    page.goto(page.url.split("?")[0])
    snap(page, "13-collection-tree")
    page.get_by_role("link", name="Train on it").click()
    page.wait_for_url(re.compile(r"/training/new/"))
    snap(page, "14-training-new")
    page.locator("input[name=episodes_per_epoch]").fill("400")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile(r"/training/[0-9a-f-]{36}/"))
    run_url = page.url
    expect(page.locator("body")).to_contain_text("Finished", timeout=300_000)
    snap(page, "15-run")
    page.goto(run_url)
    expect(page.locator("canvas").first).to_be_visible()
    page.goto("/training/")
    snap(page, "16-training-list")
    page.goto("/activity/")
    snap(page, "17-activity")
    page.goto("/collections/")
    snap(page, "18-collections")
