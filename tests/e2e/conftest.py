"""A real studio and a real Chromium; nothing in between."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.drawings import fruit_folder
from tests.studio import ROOT, Studio

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
EMAIL, PASSWORD = "first@example.org", "correct-horse-battery"
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def studio() -> Iterator[Studio]:
    with Studio() as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
    if not path:
        words = "no Chromium: the browser journeys are skipped"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip)(words)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def account(browser: Browser, studio: Studio) -> None:
    """The first account, made on the page as a stranger makes it."""
    page = browser.new_page(base_url=studio.url)
    page.goto("/accounts/signup/")
    snap(page, "01-signup")
    page.locator("input[name=email]").fill(EMAIL)
    page.locator("input[name=password1]").fill(PASSWORD)
    page.locator("main form button").last.click()
    page.wait_for_url("**/")
    page.close()


def log_in(page: Page) -> None:
    page.goto("/accounts/login/")
    page.locator("input[name=login]").fill(EMAIL)
    page.locator("input[name=password]").fill(PASSWORD)
    page.locator("main form button").last.click()
    page.wait_for_url(lambda url: "login" not in url)


@pytest.fixture
def context(browser: Browser, studio: Studio) -> Iterator[BrowserContext]:
    opened = browser.new_context(base_url=studio.url, viewport={"width": 1440, "height": 1000}, permissions=["camera"])
    opened.set_default_timeout(60_000)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page on which nothing may go wrong unheard: script errors and refusals of the policy fail the test."""
    opened = context.new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda line: troubles.append(line.text) if "Content Security Policy" in line.text else None)
    opened.on("response", lambda r: troubles.append(f"{r.status} {r.url}") if r.status >= 500 else None)
    yield opened
    assert troubles == []


@pytest.fixture(scope="session")
def grocery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real shop photos in a three-level tree where they are there, else drawn pictures."""
    real = SHARED / "grocery"
    if real.is_dir():
        return real
    root = tmp_path_factory.mktemp("pictures") / "grocery"
    for kind in ("Fruit", "Vegetables"):
        fruit_folder(root / kind, each=8)
    return root


@pytest.fixture(scope="session")
def clothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    real = SHARED / "clothing"
    if real.is_dir():
        return real
    return fruit_folder(tmp_path_factory.mktemp("pictures") / "clothing", each=10)


@pytest.fixture(scope="session")
def orchard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn fruit in five class folders, six pictures each."""
    return fruit_folder(tmp_path_factory.mktemp("pictures") / "orchard", each=6)


def upload(page: Page, folder: Path) -> str:
    """From home: choose a folder, and wait until all of it is taken in. Returns the collection's address."""
    page.goto("/")
    page.set_input_files("#choose-folder", str(folder))
    page.locator("#what-for").get_by_role("button", name="Upload").click()
    page.wait_for_url(re.compile(r"/collections/[0-9a-f-]{36}/"))
    expect(page.locator("#import")).to_contain_text("The last upload", timeout=120_000)
    return page.url


def make_label_set(page: Page, name: str, *labels: str) -> str:
    """A label set with labels that have no examples yet; returns its address, with the page open."""
    page.goto("/label-sets/")
    page.locator("[data-open=new-set]").first.click()
    page.locator("#new-set input[name=name]").fill(name)
    page.locator("#new-set").get_by_role("button", name="Create").click()
    page.wait_for_url(re.compile(r"/label-sets/[0-9a-f-]{36}/"))
    for label in labels:
        page.locator("#new-label-name").fill(label)
        page.locator("#new-label-name").press("Enter")
        expect(card_of(page, label)).to_be_visible()
    return page.url


def card_of(page: Page, label: str) -> Locator:
    return page.locator(f".label[data-name='{label}']")


def examples_of(card: Locator) -> Locator:
    return card.locator("[id^=example-]")


def learned(page: Page) -> None:
    """Wait until the labels column has settled."""
    expect(page.locator(".label .is-arriving, .label progress")).to_have_count(0, timeout=60_000)


def drop(page: Page, place: Locator, *paths: Path) -> None:
    """Drag files or folders from the desktop over a place and let go: the browser's own events, with real entries."""
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    assert box is not None
    where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})
    devtools.detach()


def snap(page: Page, name: str) -> None:
    """Pictures of a page at two widths in both themes, into test-results/, when SCREENSHOTS=1 asks for them."""
    if os.environ.get("SCREENSHOTS") != "1":
        return
    folder = ROOT / "test-results"
    folder.mkdir(exist_ok=True)
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 1000 if width > 500 else 844})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(250)
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png")
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.emulate_media(color_scheme="light")
