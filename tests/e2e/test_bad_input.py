"""What cannot be done is said in a sentence, with the numbers and the way out; nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.drawings import fruit, fruit_folder
from tests.e2e.conftest import card_of, drop, log_in, make_label_set, snap, upload

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return fruit_folder(tmp_path / "three kinds", ("Apple", "Lemon", "Plum"), each=6)


def test_what_is_no_photo_is_refused_by_name(page: Page, account: None, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "text.jpg").write_text("this is no picture")
    (folder / "a" / "notes.txt").write_text("nor this")
    log_in(page)
    upload(page, folder)
    expect(page.locator("#import")).to_contain_text("1 refused")
    expect(page.locator("#import")).to_contain_text("text.jpg")
    expect(page.locator("#import")).to_contain_text("1 left out")
    snap(page, "19-refused")


def test_an_empty_folder_is_said_to_be_empty(page: Page, account: None, tmp_path: Path) -> None:
    (tmp_path / "nothing here").mkdir()
    log_in(page)
    drop(page, page.locator("#drop-zone"), tmp_path / "nothing here")
    expect(page.locator(".toast")).to_contain_text("“nothing here”: 0 files in it")
    expect(page.locator("#what-for")).to_be_hidden()


def test_folders_that_differ_in_case_become_one_and_it_is_said(page: Page, account: None, tmp_path: Path) -> None:
    for n, folder in enumerate(("Apple", "apple")):
        (tmp_path / "twice" / folder).mkdir(parents=True)
        for seed in range(2):
            (tmp_path / "twice" / folder / f"{seed}.jpg").write_bytes(fruit("Apple", 10 * n + seed))
    log_in(page)
    upload(page, tmp_path / "twice")
    expect(page.locator("#import")).to_contain_text("4 accepted")
    expect(page.locator("#import")).to_contain_text("2 folders whose names differ only in case")
    expect(page.locator("#import")).to_contain_text("“Apple” (2), “apple” (2)")
    snap(page, "25-merged-folders")


def test_training_names_its_numbers_and_the_way_out(page: Page, account: None, small: Path) -> None:
    log_in(page)
    collection = upload(page, small).rstrip("/").split("/")[-1]
    page.goto(f"/training/new/?collection={collection}")
    for name, value in (("way", 5), ("shot", 5), ("query", 15)):
        page.locator(f"[name={name}]").fill(str(value))
    refusal = "5-way 5-shot needs 5 categories with at least 6 photos each; “three kinds” has 3 of 3."
    expect(page.locator("#outlook")).to_contain_text(refusal)
    page.get_by_role("button", name="Start training").click()
    expect(page.locator(".notice.bad").first).to_contain_text("Choose fewer ways or shots, or add photos.")
    snap(page, "26-training-refused")
    page.locator("[name=way]").fill("3")
    page.locator("[name=shot]").fill("1")
    expect(page.locator("#outlook")).to_contain_text("an episode has 5 query images a class, not 15")
    expect(page.locator("[name=query]")).to_have_value("15")


def test_classifying_needs_labels_and_examples(page: Page, account: None, small: Path) -> None:
    log_in(page)
    make_label_set(page, "Empty")
    photo = small / "Plum" / "plum-01.jpg"
    drop(page, page.locator("#results-pane"), photo)
    expect(page.locator("#classify-problem")).to_contain_text("“Empty” has no labels yet. Add a label")
    page.locator("#new-label-name").fill("Plum")
    page.locator("#new-label-name").press("Enter")
    expect(card_of(page, "Plum")).to_contain_text("Needs a photo")
    drop(page, page.locator("#results-pane"), photo)
    expect(page.locator("#classify-problem")).to_contain_text("The label of “Empty” has no example yet.")
    expect(page).to_have_url(re.compile(r"/label-sets/[0-9a-f-]{36}/$"))
    snap(page, "27-nothing-to-classify-by")
