"""What hands do on the pages: drag and drop, pick, replace, take a photo; and what is left without scripts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.drawings import fruit_folder
from tests.e2e.conftest import card_of, drop, examples_of, learned, log_in, make_label_set, snap, upload
from tests.studio import Studio

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_folder_dropped_on_home_becomes_a_collection(page: Page, account: None, tmp_path: Path) -> None:
    folder = fruit_folder(tmp_path / "market stall", ("Apple", "Plum"), each=4)
    log_in(page)
    drop(page, page.locator("#drop-zone"), folder)
    expect(page.locator("#what-for [data-chosen]")).to_have_text("8 files")
    expect(page.locator("#new-name")).to_have_value("market stall")
    page.locator("#what-for").get_by_role("button", name="Upload").click()
    page.wait_for_url(re.compile(r"/collections/[0-9a-f-]+/"))
    expect(page.locator("#import")).to_contain_text("8 accepted", timeout=60_000)
    for name in ("Apple", "Plum"):
        expect(page.locator("#tree a").filter(has_text=name)).to_contain_text("4")


def test_examples_are_dropped_picked_replaced_and_removed(page: Page, account: None, orchard: Path) -> None:
    log_in(page)
    upload(page, orchard)
    address = make_label_set(page, "Fruit bowl", "Apple", "Lemon")

    # Dropped on a card
    apple = card_of(page, "Apple")
    drop(page, apple, *sorted((orchard / "Apple").iterdir())[:3])
    expect(examples_of(apple)).to_have_count(3, timeout=60_000)

    # Picked from a collection
    lemon = card_of(page, "Lemon")
    lemon.locator("[data-add]").click()
    page.locator("#pick-example").click()
    page.locator("#pick-collection").select_option(label="orchard")
    expect(page.locator("#pick-collection option[selected]").first).to_have_text("orchard")
    page.locator("#pick-category").select_option(label="Lemon")
    expect(page.locator("#picker [name=photos]")).to_have_count(6)
    snap(page, "20-picker")
    for box in page.locator("#picker [name=photos]").all()[:3]:
        box.check()
    page.locator("#picker-add").click()
    expect(examples_of(lemon)).to_have_count(3)

    # One replaced by another file, and one removed and brought back
    learned(page)
    before = examples_of(apple).evaluate_all("nodes => nodes.map((node) => node.id)")
    apple.locator("[data-replace]").first.click()
    snap(page, "21-replace")
    with page.expect_file_chooser() as chooser:
        page.locator("#add-examples .file-choice").click()
    chooser.value.set_files(str(orchard / "Apple" / "apple-05.jpg"))
    expect(page.locator(f"#{before[0]}")).to_have_count(0, timeout=60_000)
    expect(examples_of(apple)).to_have_count(3)
    lemon.locator("[id^=drop-]").first.click()
    expect(examples_of(lemon)).to_have_count(2)
    page.locator("#toasts").get_by_role("button", name="Undo").click()
    expect(examples_of(lemon)).to_have_count(3)
    learned(page)

    # It was all kept, and it answers photos that are dropped on the results
    page.goto(address)
    expect(examples_of(card_of(page, "Apple"))).to_have_count(3)
    drop(page, page.locator("#results-pane"), orchard / "Lemon" / "lemon-05.jpg", orchard / "Apple" / "apple-04.jpg")
    expect(page.locator("#results .photo:not(.is-waiting)")).to_have_count(2, timeout=60_000)
    snap(page, "22-dropped-results")


def test_a_photo_taken_on_home_becomes_an_example_of_a_new_label(page: Page, account: None) -> None:
    log_in(page)
    make_label_set(page, "Desk", "Cup")
    page.goto("/")
    page.locator("#use-camera").click()
    page.locator("#camera-shoot:enabled").click()
    dialog = page.locator("#what-for")
    expect(dialog.locator("[value=classify]")).to_be_checked()
    dialog.get_by_text("Examples of a label").click()
    dialog.locator("#examples-set").select_option(label="Desk")
    dialog.locator("#examples-label").select_option(label="A new label…")
    dialog.get_by_role("button", name="Upload").click()
    expect(dialog.get_by_role("alert")).to_contain_text("A label needs a name.")  # and the photo is still there
    dialog.locator("#examples-name").fill("Lamp")
    snap(page, "23-camera-what-for")
    dialog.get_by_role("button", name="Upload").click()
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]+/"))
    expect(examples_of(card_of(page, "Lamp"))).to_have_count(1, timeout=60_000)
    expect(examples_of(card_of(page, "Cup"))).to_have_count(0)


def test_examples_can_be_added_without_scripts(
    browser: Browser, page: Page, account: None, studio: Studio, orchard: Path
) -> None:
    log_in(page)
    address = make_label_set(page, "Plain", "Pear")
    state = page.context.storage_state()
    context = browser.new_context(base_url=studio.url, java_script_enabled=False, storage_state=state)
    plain = context.new_page()
    plain.goto(address)
    plain.locator(".label .thumb.add").click()
    plain.locator("#plain-photos").set_input_files([str(p) for p in sorted((orchard / "Pear").iterdir())[:2]])
    snap(plain, "24-plain-examples")
    plain.get_by_role("button", name="Add").first.click()
    expect(plain.locator(".toast")).to_contain_text("2 photos are being looked at")
    context.close()
    page.goto(address)
    expect(examples_of(card_of(page, "Pear"))).to_have_count(2, timeout=60_000)


def test_a_label_set_is_put_away_deleted_and_brought_back(page: Page, account: None) -> None:
    log_in(page)
    make_label_set(page, "Passing fancy", "Thing")
    page.get_by_label("More for this label set").click()
    page.get_by_role("button", name="Put away").click()
    page.wait_for_url("**/label-sets/")
    page.locator(".put-away summary").click()
    row = page.locator(".put-away li").filter(has_text="Passing fancy")
    expect(row).to_contain_text("deleted for good on")
    snap(page, "28-put-away")
    row.get_by_role("button", name="Delete for good").click()
    expect(page.locator(".toast")).to_contain_text("“Passing fancy” is deleted for good in 2 minutes.")
    page.locator("#toasts").get_by_role("button", name="Undo").click()
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]{36}/"))
    expect(card_of(page, "Thing")).to_be_visible()
