"""The playground's files as they are served."""

from __future__ import annotations

import re

import httpx
import pytest

from app.routes.playground import FOLDER

FILES = sorted(file.name for file in FOLDER.iterdir())


async def test_the_page_is_served_at_the_root_without_a_worker(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>Darkroom</title>" in answer.text


async def test_the_policy_lets_nothing_in_from_elsewhere_and_no_inline_script(client: httpx.AsyncClient) -> None:
    headers = (await client.get("/")).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".js", "text/javascript; charset=utf-8"),
        (".css", "text/css; charset=utf-8"),
        (".svg", "image/svg+xml"),
        (".html", "text/html; charset=utf-8"),
    ],
)
async def test_every_file_has_its_type(client: httpx.AsyncClient, suffix: str, kind: str) -> None:
    names = [name for name in FILES if name.endswith(suffix)]
    assert names
    for name in names:
        answer = await client.get(f"/playground/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind


async def test_a_browser_that_has_a_file_is_told_so(client: httpx.AsyncClient) -> None:
    first = await client.get("/playground/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = await client.get("/playground/main.js", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]


async def test_head_answers_as_get_does_without_the_body(client: httpx.AsyncClient) -> None:
    head, get = await client.head("/"), await client.get("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    "name",
    ["none.js", "..%2Froutes%2Fplayground.py", "%2e%2e", "..%5Csettings.py", "main.js%00", "main", ".", "a/b.js"],
)
async def test_nothing_but_its_own_files_is_served(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/playground/{name}")
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_server(name: str) -> None:
    urls = re.findall(r"\b(?:https?:|wss?:)?//[\w.-]+\.\w+[^\s\"'`]*", (FOLDER / name).read_text())
    assert set(urls) <= {"http://www.w3.org/2000/svg"}


def test_every_module_that_is_imported_is_there_and_every_file_is_used() -> None:
    texts = {name: (FOLDER / name).read_text() for name in FILES}
    imported = {found for text in texts.values() for found in re.findall(r'from "\./([\w.]+)"', text)}
    linked = set(re.findall(r'(?:src|href)="playground/([\w.]+)"', texts["index.html"]))
    assert imported | linked | {"index.html"} == set(FILES)
