"""axe-core finds nothing on any page, wide and light or narrow and dark; and keys alone do the main job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import drop, examples_of, learned, log_in, make_label_set, upload
from tests.studio import ROOT, Studio

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"


def violations(page: Page) -> Iterator[str]:
    """What axe-core objects to on a page as it stands, one line for each kind of element."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations)")
    for violation in found:
        for node in violation["nodes"][:3]:
            yield f"{page.url} {violation['id']} ({violation['impact']}): {node['target']} {node['html'][:120]}"


def examined(page: Page) -> list[str]:
    troubles: list[str] = []
    for width, scheme in ((1440, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        troubles += violations(page)
    return troubles


def test_the_doors_are_accessible(browser: Browser, studio: Studio, account: None) -> None:
    page = browser.new_page(base_url=studio.url)
    troubles: list[str] = []
    for address in ("/accounts/login/", "/accounts/signup/", "/accounts/password/reset/"):
        page.goto(address)
        troubles += examined(page)
    page.close()
    assert not troubles, "\n".join(troubles)


def test_pages_are_accessible(page: Page, account: None, orchard: Path) -> None:
    log_in(page)
    collection = upload(page, orchard)
    troubles = examined(page)
    label_set = make_label_set(page, "Examined", "Apple", "Plum")
    troubles += examined(page)
    page.set_viewport_size({"width": 1440, "height": 900})
    for label in ("Apple", "Plum"):
        drop(page, page.locator(f".label[data-name='{label}']"), *sorted((orchard / label).iterdir())[:2])
        expect(examples_of(page.locator(f".label[data-name='{label}']"))).to_have_count(2, timeout=60_000)
    learned(page)
    drop(page, page.locator("#results-pane"), orchard / "Plum" / "plum-05.jpg", orchard / "Pear" / "pear-01.jpg")
    expect(page.locator("#results .photo:not(.is-waiting)")).to_have_count(2, timeout=60_000)
    page.locator("#results .photo").first.click()
    expect(page.locator("#evidence .subject")).to_be_visible()
    troubles += examined(page)
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(label_set)
    page.locator("[data-add]").first.click()
    troubles += examined(page)
    new_run = f"/training/new/?collection={collection.rstrip('/').split('/')[-1]}"
    for address in ("/", "/collections/", "/label-sets/", "/training/", "/training/new/", new_run, "/activity/",
                    "/account/", "/people/", "/not-there/"):  # fmt: skip
        page.goto(address)
        troubles += examined(page)
    assert not troubles, "\n".join(troubles)


def test_keys_alone_make_a_label_set_and_correct_an_answer(page: Page, account: None, orchard: Path) -> None:
    page.on("filechooser", lambda _chooser: None)  # so that they are caught however fast the keys follow
    log_in(page)
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.wait_for_url("**/label-sets/")
    page.locator("[data-open=new-set]").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.type("By keys")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]{36}/"))
    page.locator("#new-label-name").focus()
    for label in ("Apple", "Lemon"):
        page.keyboard.type(label)
        page.keyboard.press("Enter")
        card = page.locator(f".label[data-name='{label}']")
        expect(card.locator("[data-add]")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#example-files")).to_be_focused()
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Space")
        chooser.value.set_files([str(path) for path in sorted((orchard / label).iterdir())[:2]])
        expect(examples_of(card)).to_have_count(2, timeout=60_000)
        page.locator("#new-label-name").focus()
    learned(page)
    page.locator("#classify-files").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files([str(orchard / "Lemon" / "lemon-04.jpg"), str(orchard / "Apple" / "apple-04.jpg")])
    expect(page.locator("#results .photo:not(.is-waiting)")).to_have_count(2, timeout=60_000)
    page.locator("#results .photo").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#evidence .subject")).to_be_visible()
    page.keyboard.press("2")
    expect(page.locator("#results .photo .mark")).to_have_count(1)
    expect(page.locator("#toasts .toast .act")).to_be_visible()  # the answer's own event can be faster than its answer
    page.keyboard.press("z")
    expect(page.locator("#results .photo .mark")).to_have_count(0)
