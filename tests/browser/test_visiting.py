"""Coming back, small windows, keyboards, screen readers, keys."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import PICTURE_MS, add_key, develop, expect_pictures, shoot, use_key
from tests.e2e.conftest import Up

CIRCLE = "a red circle on a white background"
AUDIT = (Path(__file__).parent / "audit.js").read_text()


def test_a_reload_keeps_form_stage_and_gallery(page: Page) -> None:
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    page.reload()
    expect_pictures(page, 1)
    expect(page.locator("#frames img")).to_have_count(1)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(CIRCLE)
    expect(page.get_by_role("spinbutton", name="Steps")).to_have_value("4")


def test_a_second_reload_keeps_the_form_too(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    page.get_by_role("spinbutton", name="Steps").fill("5")
    page.get_by_role("spinbutton", name="Steps").blur()
    for _ in range(2):
        page.reload()
        expect(page.get_by_role("radio", name="demo")).to_be_checked()
        expect(page.get_by_role("spinbutton", name="Steps")).to_have_value("5")


def test_what_is_typed_before_the_models_are_known_stays_and_becomes_code(page: Page) -> None:
    held: list[Route] = []
    released = threading.Event()
    page.route("**/v1/models", lambda route: route.continue_() if released.is_set() else held.append(route))
    page.reload()
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    page.get_by_role("spinbutton", name="Steps").fill("3")
    page.get_by_role("button", name="Code").first.click()
    expect(page.get_by_role("radio", name="demo")).to_have_count(0)
    released.set()
    for route in held:
        route.continue_()
    expect(page.locator("#code-text")).to_contain_text('"steps": 3')
    page.keyboard.press("Escape")
    expect(page.get_by_role("spinbutton", name="Steps")).to_have_value("3")


def test_a_browser_that_keeps_nothing_makes_pictures_all_the_same(page: Page) -> None:
    page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage"]) {
            const get = () => { throw new DOMException("Access is denied.", "SecurityError"); };
            Object.defineProperty(window, name, { get });
        }"""
    )
    page.reload()
    expect(page.get_by_role("radio", name="demo")).to_be_checked()
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    expect(page.locator("#frames img")).to_have_count(1)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".frame")).to_have_count(0)


def test_a_key_lasts_as_long_as_the_page_where_the_browser_keeps_nothing(
    open_page: Callable[..., Page], keyed: tuple[Up, str]
) -> None:
    up, key = keyed
    page = open_page(up.url)
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }")
    page.reload()
    use_key(page, key)
    expect(page.get_by_role("radio", name="tiny")).to_be_checked()
    page.get_by_role("button", name="Key").click()
    expect(page.get_by_label("Remember it")).not_to_be_checked()


def test_a_reload_goes_on_with_what_runs(page: Page) -> None:
    develop(page, CIRCLE, steps=16)
    expect(page.locator(".print-state")).to_contain_text("Developing", timeout=PICTURE_MS)
    page.reload()
    expect(page.get_by_alt_text("The picture so far")).to_be_visible(timeout=PICTURE_MS)
    expect_pictures(page, 1)


def test_a_deleted_picture_is_gone_here_and_there(page: Page, site: Up) -> None:
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    newest = httpx.get(f"{site.url}/v1/generations?limit=1").json()["generations"][0]
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".frame")).to_have_count(0)
    assert httpx.get(newest["urls"]["self"]).status_code == 404
    page.reload()
    expect(page.get_by_text("Nothing developed yet.")).to_be_visible()


def test_what_could_not_be_deleted_is_still_followed(page: Page) -> None:
    def refuse_to_delete(route: Route) -> None:
        if route.request.method == "DELETE":
            route.fulfill(status=503, json={"error": {"code": "unavailable", "message": "Not now."}})
        else:
            route.continue_()

    page.route("**/v1/generations/*", refuse_to_delete)
    develop(page, CIRCLE, steps=30)
    expect(page.locator(".print-state")).to_contain_text("Developing", timeout=PICTURE_MS)
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("alert")).to_have_text("Not now.")
    expect_pictures(page, 1)


def test_what_another_tab_asks_for_is_followed_here_too(page: Page) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.get_by_role("radio", name="demo")).to_be_checked()
    develop(page, CIRCLE, steps=30)
    expect(other.locator(".frame")).to_have_count(1)
    page.close()
    expect(other.locator("#frames img")).to_have_count(1, timeout=PICTURE_MS)


def test_what_another_tab_deletes_stays_deleted(page: Page) -> None:
    develop(page, CIRCLE, steps=100)
    expect(page.locator(".print-state")).to_contain_text("Developing", timeout=PICTURE_MS)
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_role("button", name="Delete").click()
    expect(page.locator(".frame")).to_have_count(0)
    expect(other.locator(".frame")).to_have_count(0)
    kept = "Object.keys(localStorage).filter(name => name.startsWith('darkroom.generation'))"
    assert page.evaluate(kept) == []


def test_what_another_tab_keeps_and_cannot_be_read_is_passed_over(page: Page, site: Up) -> None:
    other = page.context.new_page()
    other.goto(f"{site.url}/playground/icon.svg")
    for text in ("undefined", "{", "null", "{}"):
        other.evaluate("text => localStorage.setItem('darkroom.generation.0', text)", text)
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    expect(page.locator(".frame")).to_have_count(1)
    page.reload()
    expect_pictures(page, 1)
    assert page.evaluate("localStorage['darkroom.generation.0'] ?? null") is None


def test_a_full_gallery_takes_no_earlier_ones(page: Page, site: Up) -> None:
    develop(page, CIRCLE, steps=1)
    expect_pictures(page, 1)
    newest = httpx.get(f"{site.url}/v1/generations?limit=1").json()["generations"][0]
    page.evaluate(
        """generation => {
            for (let n = 100; n < 298; n++) {
                const record = { generation: { ...generation, id: `later-${n}` }, gone: false };
                localStorage.setItem(`darkroom.generation.later-${n}`, JSON.stringify(record));
            }
        }""",
        newest,
    )
    earlier = [newest | {"id": f"0{n}"} for n in (3, 2, 1)]
    answer = {"generations": earlier, "next": "cursor"}
    page.route("**/v1/generations?*", lambda route: route.fulfill(json=answer))
    page.reload()
    expect(page.locator(".frame")).to_have_count(199)
    button = page.get_by_role("button", name="Earlier ones from the server")
    button.click()
    expect(button).to_be_hidden()
    expect(page.locator(".frame")).to_have_count(200)
    kept = page.evaluate("Object.keys(localStorage).filter(name => name.startsWith('darkroom.generation.'))")
    assert len(kept) == 200
    assert [name for name in kept if name.startswith("darkroom.generation.0")] == ["darkroom.generation.03"]
    page.get_by_role("button", name="Delete").click()
    expect(button).to_be_visible()


def test_a_picture_that_the_server_lost_is_said_so(page: Page, site: Up) -> None:
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    newest = httpx.get(f"{site.url}/v1/generations?limit=1").json()["generations"][0]
    assert httpx.delete(newest["urls"]["self"]).status_code == 204
    session = page.context.new_cdp_session(page)
    session.send("Network.clearBrowserCache")
    page.reload()
    expect(page.locator(".print-state")).to_have_text("The server no longer knows it")
    expect(page.locator(".frame")).to_contain_text("Gone")


def test_an_expired_picture_is_said_so_and_when(page: Page) -> None:
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    page.clock.install(time=page.evaluate("Date.now() + 2 * 24 * 3600 * 1000"))
    page.reload()
    expect(page.locator(".print-state")).to_contain_text("then deleted")
    expect(page.locator(".frame")).to_contain_text("Expired")
    expect(page.get_by_role("button", name="Use again")).to_be_visible()


def test_another_browser_finds_earlier_pictures_on_the_server(page: Page, open_page: Callable[..., Page]) -> None:
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    other = open_page(page.url)
    other.get_by_role("button", name="Earlier ones from the server").click()
    expect(other.locator("#frames img").first).to_be_visible()
    expect_pictures(other, 1)


def test_the_size_map_is_moved_by_keys_pointer_and_numbers(page: Page) -> None:
    width, height = page.get_by_label("Width", exact=True), page.get_by_label("Height", exact=True)
    ratio = page.get_by_role("slider", name="Aspect ratio")
    page.get_by_role("button", name="3:2").click()
    expect(page.get_by_role("button", name="3:2")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="1:1").click()
    expect(page.locator("#size-text")).to_have_text("512 × 512 · 1:1 · 0.25 MP")
    ratio.focus()
    page.keyboard.press("ArrowRight")
    assert int(width.input_value()) > int(height.input_value())
    for _ in range(40):
        page.keyboard.press("PageUp")
    pixels = int(width.input_value()) * int(height.input_value())
    assert 2_097_152 * 0.97 < pixels <= 2_097_152
    said = ratio.get_attribute("aria-valuetext") or ""
    assert said.startswith(f"{width.input_value()} by {height.input_value()}, ")
    box = page.locator("#map").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.8)
    assert int(width.input_value()) < int(height.input_value())
    width.fill("1024")
    height.fill("768")
    expect(page.get_by_role("button", name="4:3")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#size-text")).to_have_text("1024 × 768 · 4:3 · 0.75 MP")
    page.get_by_role("button", name="Swap width and height").click()
    expect(page.get_by_role("button", name="3:4")).to_have_attribute("aria-pressed", "true")


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    assert dark != light
    page.get_by_role("button", name="Switch to dark colours").click()
    assert page.evaluate(background) == dark
    page.reload()
    assert page.evaluate(background) == dark


def test_the_page_works_on_a_phone(open_page: Callable[..., Page], site: Up) -> None:
    page = open_page(site.url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    page.get_by_role("spinbutton", name="Steps").fill("4")
    page.get_by_role("button", name="Develop").tap()
    expect_pictures(page, 1)
    expect(page.locator("#stage .paper img")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.evaluate(
        """[...document.querySelectorAll('button, select, summary, .counts label')]
        .filter(node => node.checkVisibility() && node.getBoundingClientRect().height < 28)
        .map(node => node.outerHTML.slice(0, 80))"""
    )
    assert small == []
    shoot(page, "phone")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_everything_has_a_name_and_can_be_read(page: Page, theme: str) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    assert page.evaluate(AUDIT) == []
    develop(page, CIRCLE)
    expect_pictures(page, 1)
    shoot(page, theme)
    for fold in page.locator("details").all():
        fold.evaluate("fold => fold.open = true")
    page.get_by_role("button", name="Compare pictures").click()
    page.get_by_label("Width", exact=True).fill("1")
    page.get_by_role("button", name="Develop").click()
    assert page.evaluate(AUDIT) == []
    page.get_by_label("Width", exact=True).fill("512")
    page.get_by_role("button", name="Code").first.click()
    shoot(page, f"{theme}-code")
    assert page.evaluate(AUDIT) == []


def test_the_keyboard_alone_makes_a_picture(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type(CIRCLE)
    seen = []
    while page.evaluate("document.activeElement.id") != "develop":
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        assert len(seen) < 60, seen
    order = [name for name in seen if name in ("width", "height", "steps", "guidance_scale", "seed", "develop")]
    assert order == ["width", "height", "steps", "guidance_scale", "seed", "develop"]
    page.get_by_role("spinbutton", name="Steps").fill("4")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#stage")).to_be_focused()
    expect_pictures(page, 1)


def test_a_key_is_asked_for_and_kept_until_the_tab_is_closed(
    open_page: Callable[..., Page], keyed: tuple[Up, str]
) -> None:
    up, key = keyed
    page = open_page(up.url)
    dialog = page.get_by_role("dialog", name="This darkroom needs a key")
    use_key(page, "dr_000000000000_wrong")
    expect(dialog.locator("#key-reason")).to_contain_text("key")
    use_key(page, key)
    expect(dialog).to_be_hidden()
    develop(page, CIRCLE, steps=1)
    expect_pictures(page, 1)  # by signed urls
    page.reload()
    expect_pictures(page, 1)
    expect(dialog).to_be_hidden()
    assert page.evaluate("[sessionStorage['darkroom.key'], localStorage['darkroom.key']]") == [key, None]
    assert key not in page.content()


def test_a_key_is_remembered_if_asked_and_forgotten(open_page: Callable[..., Page], keyed: tuple[Up, str]) -> None:
    up, key = keyed
    page = open_page(up.url)
    dialog = page.get_by_role("dialog", name="This darkroom needs a key")
    dialog.get_by_role("button", name="Not now").click()
    expect(page.locator("#server-state")).to_have_text("Needs a key")
    expect(page.get_by_role("button", name="Key")).to_be_visible()
    develop(page, CIRCLE, steps=None)
    dialog.get_by_label("API key").fill(key)
    dialog.get_by_label("Remember it").check()
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("radio", name="tiny")).to_be_checked()
    assert page.evaluate("localStorage['darkroom.key']") == key
    page.get_by_role("button", name="Key").click()
    shoot(page, "key")
    dialog.get_by_role("button", name="Forget the key").click()
    expect(dialog.locator("#key-reason")).to_have_text("It was started with API keys on.")
    assert page.evaluate("sessionStorage['darkroom.key'] ?? localStorage['darkroom.key'] ?? null") is None


def test_the_gallery_is_forgotten_with_the_key(open_page: Callable[..., Page], keyed: tuple[Up, str]) -> None:
    up, key = keyed
    page = open_page(up.url)
    use_key(page, key)
    develop(page, CIRCLE, steps=1)
    expect_pictures(page, 1)
    develop(page, CIRCLE, steps=100)  # this one is on its way
    expect(page.locator(".frame")).to_have_count(2)
    page.get_by_role("button", name="Key").click()
    page.get_by_role("button", name="Forget the key and the gallery").click()
    expect(page.locator(".frame")).to_have_count(0)
    expect(page.get_by_text("Nothing developed yet.")).to_be_visible()
    page.get_by_role("button", name="Not now").click()
    assert "signature" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("Object.keys(localStorage).filter(name => name.startsWith('darkroom.generation'))") == []
    page.reload()
    page.get_by_role("button", name="Not now").click()
    expect(page.locator(".frame")).to_have_count(0)


def test_another_key_shows_another_gallery(open_page: Callable[..., Page], keyed: tuple[Up, str]) -> None:
    up, key = keyed
    page = open_page(up.url)
    use_key(page, key)
    develop(page, CIRCLE, steps=1)
    expect_pictures(page, 1)
    older = page.get_by_role("button", name="Earlier ones from the server")
    older.click()
    expect(older).to_be_hidden()
    page.get_by_role("button", name="Key").click()
    use_key(page, add_key(up, "another"))
    expect(page.locator(".frame")).to_have_count(0)
    with page.expect_request("**/v1/generations?*") as request:
        older.click()
    assert "cursor" not in request.value.url
    expect(older).to_be_hidden()
    expect(page.get_by_text("Nothing developed yet.")).to_be_visible()


def test_a_key_that_was_mistyped_costs_no_gallery(open_page: Callable[..., Page], keyed: tuple[Up, str]) -> None:
    up, key = keyed
    page = open_page(up.url)
    use_key(page, key)
    develop(page, CIRCLE, steps=1)
    expect_pictures(page, 1)
    page.evaluate("sessionStorage.clear()")  # as if the tab was closed
    page.reload()
    use_key(page, "dr_000000000000_wrong")
    expect(page.get_by_role("dialog").locator("#key-reason")).not_to_have_text("It was started with API keys on.")
    use_key(page, key)
    expect_pictures(page, 1)
