"""A phone in the hand: what is to be pressed is a finger wide, nothing is wider than the screen, no button hides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import card_of, drop, examples_of, learned, log_in, make_label_set, upload
from tests.studio import Studio

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
WIDTH, HEIGHT, FINGER = 390, 844, 44

# Buttons, and links that stand alone; ::after may widen what is seen. Checkboxes count by their label or tile.
NARROW = """(finger) => [...document.querySelectorAll("main :is(button, .button, summary, select, nav a, .chip[href])")]
  .filter((node) => node.checkVisibility() && !node.matches(".visually-hidden"))
  .map((node) => {
    const { height } = node.getBoundingClientRect();
    const after = getComputedStyle(node, "::after");
    const more = after.position === "absolute" && after.content !== "none" ? Math.max(0, -parseFloat(after.top)) : 0;
    return { name: node.outerHTML.slice(0, 120), height: Math.round(height + 2 * more) };
  })
  .filter(({ height }) => height > 1 && height < finger - 1)"""


@pytest.fixture
def phone(browser: Browser, studio: Studio, account: None) -> Iterator[Page]:
    context = browser.new_context(
        base_url=studio.url, viewport={"width": WIDTH, "height": HEIGHT}, has_touch=True, is_mobile=True
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    log_in(page)
    yield page
    context.close()


def test_pages_fit_a_phone_and_a_finger(page: Page, phone: Page, orchard: Path) -> None:
    log_in(page)
    collection = upload(page, orchard)
    label_set = make_label_set(page, "In the hand: a name that is longer than a phone is wide", "Apple", "Plum")
    for label in ("Apple", "Plum"):
        drop(page, card_of(page, label), *sorted((orchard / label).iterdir())[:2])
        expect(examples_of(card_of(page, label))).to_have_count(2, timeout=60_000)
    learned(page)
    new_run = f"/training/new/?collection={collection.rstrip('/').split('/')[-1]}"
    troubles = []
    for address in ("/", collection, label_set, "/label-sets/", "/collections/", "/training/", new_run, "/activity/",
                    "/account/", "/people/", "/not-there/"):  # fmt: skip
        phone.goto(address)
        width = phone.evaluate("document.documentElement.scrollWidth")
        troubles += [f"{address} is {width} px wide"] if width > WIDTH else []
        troubles += [f"{address} {one['height']} px: {one['name']}" for one in phone.evaluate(NARROW, FINGER)]
    assert not troubles, "\n".join(troubles)


def test_the_buttons_of_a_long_dialog_are_in_sight(page: Page, phone: Page) -> None:
    log_in(page)
    make_label_set(page, "Long dialog", "Cup")
    phone.goto("/")
    phone.set_input_files("#choose-photos", {"name": "cup.jpg", "mimeType": "image/jpeg", "buffer": b"never sent"})
    phone.locator("#what-for").get_by_text("Examples of a label").click()
    phone.locator("#examples-label").select_option(label="A new label…")
    expect(phone.locator("#what-for").get_by_role("button", name="Upload")).to_be_in_viewport(ratio=1)


def test_the_offer_to_undo_covers_no_answer(page: Page, account: None, orchard: Path) -> None:
    log_in(page)
    make_label_set(page, "Undone", "Apple", "Plum")
    for label in ("Apple", "Plum"):
        drop(page, card_of(page, label), *sorted((orchard / label).iterdir())[:2])
        expect(examples_of(card_of(page, label))).to_have_count(2, timeout=60_000)
    learned(page)
    drop(page, page.locator("#results-pane"), *sorted((orchard / "Plum").iterdir())[3:5])
    expect(page.locator("#results .photo:not(.is-waiting)")).to_have_count(2, timeout=60_000)
    page.locator("#results .photo").first.click()
    expect(page.locator("#evidence .subject")).to_be_visible()
    page.keyboard.press("1")
    toast = page.locator("#toasts .toast").last
    expect(toast.get_by_role("button", name="Undo")).to_be_visible()
    covering, pane = toast.bounding_box(), page.locator("#evidence-pane").bounding_box()
    assert covering is not None
    assert pane is not None
    assert covering["x"] + covering["width"] <= pane["x"]
