"""The playground in a real browser, before a real stack with the demo's weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.e2e.conftest import ROOT, Up, darkroom_env

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
SCREENSHOTS = ROOT / "build" / "screenshots"
PICTURE_MS = 90_000
"""A picture on a busy CPU."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(300))
            item.add_marker(pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt install chromium"))


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The demo, by two names, so that there is something to compare."""
    up = Up(tmp_path_factory.mktemp("site"), f"demo,second={ROOT}/model/bundles/demo")
    up.wait_until_said("Darkroom is ready")
    yield up
    up.stop()


@pytest.fixture(scope="package")
def keyed(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[tuple[Up, str]]:
    """A server that asks for keys, and a key of it."""
    folder = tmp_path_factory.mktemp("keyed")
    up = Up(folder, f"tiny={tiny_bundle}", DARKROOM_AUTH="on")
    up.wait_until_said("Darkroom is ready")
    yield up, add_key(up, "browser")
    up.stop()


# A module's own: while it is open, no other event loop may run in this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def failures() -> list[str]:
    """What failed in scripts so far; a test that means it takes it out."""
    return []


@pytest.fixture
def open_page(browser: Browser, failures: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens the playground in a browser of its own; fails the test in the end if a script did."""
    contexts: list[BrowserContext] = []

    def open_page(url: str, **options: object) -> Page:
        defaults = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", "color_scheme": "dark"}
        context = browser.new_context(**defaults | options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: failures.append(message.text) if "Policy" in message.text else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert failures == []


@pytest.fixture
def page(open_page: Callable[..., Page], site: Up) -> Page:
    """The playground, its models known, as on a first visit."""
    page = open_page(site.url)
    expect(page.get_by_role("radio", name="demo")).to_be_checked()
    return page


def add_key(up: Up, name: str) -> str:
    """A new key of a server that asks for keys."""
    env = darkroom_env() | {"DARKROOM_DATA_DIR": str(up.data)}
    file = up.data.parent / f"key-{name}"
    command = [sys.executable, "-m", "app.cli", "keys", "add", name, "--write", str(file)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=60)
    return file.read_text().strip()


def develop(page: Page, prompt: str, steps: int | None = 4) -> None:
    """Fills the form and sends it."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if steps is not None:
        page.get_by_role("spinbutton", name="Steps").fill(str(steps))
    page.get_by_role("button", name="Develop").click()


def use_key(page: Page, key: str) -> None:
    """Answers the dialog that asks for a key."""
    dialog = page.get_by_role("dialog", name="This darkroom needs a key")
    dialog.get_by_label("API key").fill(key)
    dialog.get_by_role("button", name="Use this key").click()


def shoot(page: Page, name: str) -> None:
    """Leaves a picture of the page for people to look at; of a dialog, what is around it."""
    is_whole = page.locator("dialog[open]").count() == 0
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=is_whole)


def expect_pictures(page: Page, count: int) -> None:
    """Waits until that many pictures lie on the stage, loaded."""
    pictures = page.locator("#stage .paper:not(.blank) img")
    expect(pictures).to_have_count(count, timeout=PICTURE_MS)
    for picture in pictures.all():
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("img => img.naturalWidth") > 0
