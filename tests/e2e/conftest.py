"""A real studio and a real Chromium; nothing in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.factories import picture_folder
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
        picture_folder(root / kind, classes=8, each=8)
    return root


@pytest.fixture(scope="session")
def clothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    real = SHARED / "clothing"
    if real.is_dir():
        return real
    return picture_folder(tmp_path_factory.mktemp("pictures") / "clothing", classes=5, each=10)


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
