"""From a prompt to its pictures: progress, previews, waiting, canceling, refusals, comparing, code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import PICTURE_MS, develop, expect_pictures, shoot, use_key
from tests.e2e.conftest import ROOT, Up, darkroom_env
from tests.presigned import PICTURE, presigned

MOON = "a yellow moon above a purple cloud, night sky"
CIRCLE = "a red circle on a white background"
LANGUAGES = ("curl", "Python", "OpenAI client")
CLIPBOARD = ("clipboard-read", "clipboard-write")


def queue(site: Up, *arguments: str) -> None:
    env = darkroom_env() | {"DARKROOM_DATA_DIR": str(site.data)}
    subprocess.run([sys.executable, "-m", "app.cli", "queue", *arguments], cwd=ROOT, env=env, check=True, timeout=60)


def latest(site: Up) -> dict[str, object]:
    answer: dict[str, list[dict[str, object]]] = httpx.get(f"{site.url}/v1/generations?limit=1").json()
    return answer["generations"][0]


def test_a_prompt_becomes_a_picture_while_previews_and_steps_are_shown(page: Page) -> None:
    develop(page, MOON, steps=8)
    expect(page.get_by_alt_text("The picture so far")).to_be_visible(timeout=PICTURE_MS)
    expect(page.locator(".print-state")).to_have_text(re.compile(r"Developing, step \d of 8"))
    expect(page.get_by_role("progressbar")).to_be_visible()
    shoot(page, "developing")
    expect_pictures(page, 1)
    expect(page.get_by_role("status").filter(has_text="demo: the picture is ready")).to_be_attached()
    expect(page.get_by_role("progressbar")).to_be_hidden()
    expect(page.locator("#frames img")).to_have_count(1)
    page.get_by_role("button", name="Look at it large").click()
    expect(page.get_by_role("dialog").get_by_alt_text(MOON)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_job_that_waits_shows_its_place_and_is_canceled(page: Page, site: Up) -> None:
    queue(site, "pause", "second")
    try:
        page.get_by_role("radio", name="second").check()
        develop(page, CIRCLE)
        state = page.locator(".print-state")
        expect(state).to_have_text("Waiting, next in line")
        develop(page, CIRCLE)
        expect(state).to_have_text("Waiting, 1 ahead")
        page.get_by_role("button", name="Cancel", exact=True).click()
        expect(state).to_have_text("Canceled")
        assert latest(site)["status"] == "canceled"
    finally:
        queue(site, "resume", "second")
    page.locator(".frame").nth(1).click()
    expect_pictures(page, 1)


def test_a_running_job_is_canceled(page: Page, site: Up) -> None:
    develop(page, CIRCLE, steps=100)
    expect(page.locator(".print-state")).to_contain_text("Developing", timeout=PICTURE_MS)
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".print-state")).to_have_text("Canceled", timeout=PICTURE_MS)
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_hidden()


def test_what_cannot_be_asked_is_said_at_its_field(page: Page) -> None:
    page.get_by_label("Width", exact=True).fill("100")
    page.get_by_role("button", name="Develop").click()
    prompt, width = page.get_by_label("Prompt", exact=True), page.get_by_label("Width", exact=True)
    expect(prompt).to_have_accessible_description("Say what the picture shall show.")
    expect(prompt).to_be_focused()
    expect(width).to_have_accessible_description("A multiple of 16 from 64 to 1536, please.")
    expect(width).to_have_attribute("aria-invalid", "true")
    width.fill("512")
    expect(width).not_to_have_attribute("aria-invalid", "true")
    expect(page.locator(".print")).to_have_count(0)


def test_what_the_server_refuses_is_shown_at_its_field(page: Page) -> None:
    develop(page, "red " * 2_600)
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_have_accessible_description(re.compile("at most 10,000 characters"))
    expect(prompt).to_be_focused()
    expect(page.get_by_role("button", name="Develop")).to_be_enabled()


def test_keys_pressed_again_while_it_is_asked_for_ask_for_no_more(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/generations", lambda route: held.append(route))
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill(CIRCLE)
    for _ in range(3):
        prompt.press("Control+Enter")
    expect(page.get_by_role("button", name="Develop")).to_be_disabled()
    held[0].continue_()
    expect(page.get_by_role("button", name="Develop")).to_be_enabled()
    expect_pictures(page, 1)
    assert len(held) == 1


def test_keys_held_down_ask_once(page: Page) -> None:
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append((route.request.post_data_json or {})["prompt"])
        route.fulfill(status=422, json={"error": {"message": f"Not {asked[-1]}.", "field": "prompt"}})

    page.route("**/v1/generations", refuse)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("once")
    page.keyboard.down("Control")
    page.keyboard.down("Enter")
    expect(prompt).to_have_accessible_description("Not once.")
    expect(page.get_by_role("button", name="Develop")).to_be_enabled()
    page.keyboard.down("Enter")  # that it is still held: the browser says so again and again
    page.keyboard.up("Enter")
    page.keyboard.up("Control")
    expect(page.get_by_role("button", name="Develop")).to_be_enabled()
    prompt.fill("again")
    prompt.press("Control+Enter")
    expect(prompt).to_have_accessible_description("Not again.")
    assert asked == ["once", "again"]


def test_a_server_that_is_away_is_said_and_the_form_can_be_sent_again(page: Page) -> None:
    page.context.set_offline(True)
    develop(page, CIRCLE)
    expect(page.get_by_role("alert")).to_have_text("The server does not answer. Is it running?")
    page.context.set_offline(False)
    page.get_by_role("button", name="Develop").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect_pictures(page, 1)


def test_an_answer_that_cannot_be_read_is_said_and_the_form_can_be_sent_again(page: Page) -> None:
    page.route("**/v1/generations", lambda route: route.fulfill(status=202, body="<html>a proxy's"))
    develop(page, CIRCLE)
    expect(page.get_by_role("alert")).to_have_text("The server does not answer. Is it running?")
    page.unroute("**/v1/generations")
    page.get_by_role("button", name="Develop").click()
    expect_pictures(page, 1)


def test_a_script_that_fails_leaves_the_form_to_be_sent_again(page: Page, failures: list[str]) -> None:
    page.evaluate("Crypto.prototype.getRandomValues = () => { throw new Error('no dice') }; 0")
    with page.expect_event("pageerror"):
        develop(page, CIRCLE)
    expect(page.get_by_role("button", name="Develop")).to_be_enabled()
    assert failures.pop() == "no dice"


def test_a_lost_connection_is_taken_up_again(page: Page) -> None:
    develop(page, CIRCLE, steps=30)
    expect(page.locator(".print-state")).to_contain_text("Developing", timeout=PICTURE_MS)
    page.context.set_offline(True)
    page.context.set_offline(False)
    expect_pictures(page, 1)


def test_two_models_are_compared_side_by_side_with_one_seed(page: Page) -> None:
    page.get_by_role("checkbox", name="Compare").check()
    page.get_by_role("checkbox", name="second").check()
    develop(page, CIRCLE, steps=None)
    expect(page.get_by_text("Each model with its own steps and guidance.")).to_be_visible()
    expect_pictures(page, 2)
    expect(page.locator(".print-title")).to_have_text(["demo", "second"])
    first, second = page.locator("[data-fact=Seed]").all_inner_texts()
    assert first == second
    shoot(page, "compare-models")


def test_several_seeds_are_compared_and_a_kept_one_is_used_again(page: Page, site: Up) -> None:
    page.get_by_label("Seed", exact=True).fill("7")
    expect(page.get_by_role("button", name="Keep this seed")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("group", name="Pictures").get_by_text("2").click()
    develop(page, CIRCLE)
    expect_pictures(page, 2)
    expect(page.locator("figcaption")).to_have_text(["seed 7", "seed 8"])
    assert latest(site)["seeds"] == [7, 8]
    page.get_by_role("button", name="Compare pictures").click()
    page.locator(".frame").nth(0).click()
    page.locator(".frame").nth(1).click()
    page.get_by_role("button", name="Compare 2").click()
    expect(page.locator(".print")).to_have_count(2)
    expect(page.locator(".differs")).to_have_text(["7", "8"])
    shoot(page, "compare-seeds")


def test_seed_is_another_each_time_until_it_is_kept(page: Page) -> None:
    def seed() -> int:
        with page.expect_response(lambda answer: answer.request.method == "POST") as answer:
            develop(page, CIRCLE, steps=1)
        used = int(answer.value.json()["params"]["seed"])
        expect(page.get_by_label("Seed", exact=True)).to_have_value(str(used))
        return used

    drawn = [seed(), seed()]
    assert drawn[0] != drawn[1]
    lock = page.get_by_role("button", name="Keep this seed")
    lock.click()
    assert [seed(), seed()] == [drawn[1], drawn[1]]
    lock.click()
    assert seed() != drawn[1]
    expect_pictures(page, 1)


def test_a_picture_fills_the_form_to_be_used_again(page: Page) -> None:
    page.get_by_role("button", name="16:9").click()
    develop(page, MOON, steps=3)
    expect_pictures(page, 1)
    seed = page.locator("[data-fact=Seed]").inner_text()
    page.get_by_role("button", name="1:1").click()
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Use again").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(MOON)
    expect(page.get_by_label("Seed", exact=True)).to_have_value(seed)
    expect(page.get_by_role("spinbutton", name="Steps")).to_have_value("3")
    expect(page.get_by_role("button", name="16:9")).to_have_attribute("aria-pressed", "true")


def run_code(language: str, code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code that the page gives; curl's as a shell does into which it is pasted, which goes on after a failure."""
    if language == "curl" and not (shutil.which("curl") and shutil.which("jq")):
        pytest.skip("no curl, or no jq: apt install curl jq")
    run = ["bash", "-c"] if language == "curl" else [sys.executable, "-c"]
    env = darkroom_env() | env
    return subprocess.run([*run, code], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def copied(page: Page, language: str) -> str:
    """The code that the page gives for its form."""
    page.get_by_role("button", name="Code").first.click()
    page.get_by_role("tab", name=language).click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    code: str = page.evaluate("navigator.clipboard.readText()")
    return code


def run_copied(page: Page, language: str, folder: Path, **env: str) -> None:
    """Runs the code that the page gives for its form."""
    ran = run_code(language, copied(page, language), folder, **env)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("language", LANGUAGES)
def test_copied_code_makes_the_picture(open_page: Callable[..., Page], site: Up, language: str, tmp_path: Path) -> None:
    page = open_page(site.url, permissions=CLIPBOARD)
    page.get_by_label("Prompt", exact=True).fill('a "red" circle, c\'est tout\n\\n')
    page.get_by_role("spinbutton", name="Steps").fill("2")
    page.get_by_label("Seed", exact=True).fill("5")
    run_copied(page, language, tmp_path)
    with Image.open(tmp_path / "picture-0.png") as picture:
        assert picture.size == (512, 512)
    params = latest(site)["params"]
    assert isinstance(params, dict)
    assert (params["prompt"], params["steps"], params["seed"]) == ('a "red" circle, c\'est tout\n\\n', 2, 5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_copied_code_sends_the_key_and_fetches_every_picture(
    open_page: Callable[..., Page], keyed: tuple[Up, str], language: str, tmp_path: Path
) -> None:
    up, key = keyed
    page = open_page(up.url, permissions=CLIPBOARD)
    use_key(page, key)
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_role("group", name="Pictures").get_by_text("2").click()
    run_copied(page, language, tmp_path, DARKROOM_API_KEY=key)
    pictures = [(tmp_path / f"picture-{n}.png").read_bytes() for n in range(2)]
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_copied_code_ends_where_it_is_refused(
    open_page: Callable[..., Page], keyed: tuple[Up, str], language: str, tmp_path: Path
) -> None:
    up, key = keyed
    page = open_page(up.url, permissions=CLIPBOARD)
    use_key(page, key)
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    ran = run_code(language, copied(page, language), tmp_path, DARKROOM_API_KEY="dr_000000000000_wrong")
    assert ran.returncode != 0
    assert ("unauthorized" if language == "curl" else "401") in ran.stderr
    assert list(tmp_path.glob("picture-*")) == []


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_copied_code_follows_urls_of_pictures_that_redirect(page: Page, language: str, tmp_path: Path) -> None:
    ask = "async url => (await import('/playground/snippets.js')).snippets({ model: 'demo', prompt: 'a' }, url, false)"
    with presigned() as url:
        ran = run_code(language, dict(page.evaluate(ask, url))[language], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "picture-0.png").read_bytes() == PICTURE


def test_languages_of_code_are_changed_by_arrow_keys(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    page.get_by_role("button", name="Code").click()
    expect(page.get_by_role("tab", name="curl")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Python")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_contain_text("import httpx")
