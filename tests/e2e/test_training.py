"""A zip of alphabets becomes a tree, a network is trained on its pixels, and a label set is put on what came of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.drawings import alphabets_zip
from tests.e2e.conftest import log_in, snap

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_from_a_zip_to_a_network_trained_from_pixels(page: Page, account: None, tmp_path: Path) -> None:
    (tmp_path / "letters.zip").write_bytes(alphabets_zip())
    log_in(page)
    page.goto("/")
    page.set_input_files("#choose-photos", str(tmp_path / "letters.zip"))
    expect(page.locator("#what-for [data-chosen]")).to_have_text("letters.zip")
    expect(page.locator("#new-name")).to_have_value("letters")
    page.locator("#what-for").get_by_role("button", name="Upload").click()
    page.wait_for_url(re.compile(r"/collections/[0-9a-f-]+/"))
    expect(page.locator("#import")).to_contain_text("60 accepted", timeout=60_000)
    parent = page.locator("#tree a").filter(has_text="Alphabet 2")
    expect(parent).to_contain_text("30")
    parent.click()
    expect(page.locator("#grid .photo")).to_have_count(30)
    snap(page, "30-zip-tree")

    page.get_by_role("link", name="Train on it").click()
    page.get_by_text("The backbone itself learns from the pixels").click()
    expect(page.locator("[name=base]")).to_be_hidden()
    page.locator("[name=backbone]").select_option("conv4")
    for name, value in (("way", 3), ("shot", 1), ("query", 3), ("image_size", 28), ("epochs", 2)):
        page.locator(f"[name={name}]").fill(str(value))
    page.locator("[name=episodes_per_epoch]").fill("20")
    snap(page, "31-training-full")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile(r"/training/[0-9a-f-]{36}/"))
    expect(page.locator("#run")).to_contain_text("Worth it?", timeout=120_000)
    expect(page.locator("#run [data-figure=episode]")).to_have_text("40")
    expect(page.locator("#accuracy-plot canvas")).to_be_visible()
    expect(page.locator("#run")).to_contain_text("Held-out classes")
    snap(page, "32-run-full")

    use = page.get_by_role("button", name="New label set with it")
    if not use.is_visible():
        page.get_by_text("Use it nevertheless").click()
    use.click()
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]+/"))
    page.locator("details.menu summary").last.click()
    page.get_by_role("button", name="Change the model").click()
    expect(page.locator("#set-model .choice").filter(has_text="Accurate")).to_be_visible()
    expect(page.locator("#set-model .choice:has(:checked)")).to_contain_text("letters")
    snap(page, "33-models")
