"""What only a bucket does: links, signatures, its neighbours' keys, an outage."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import httpx
import obstore
import pytest

from tests.bucket import BUCKET, S3Server
from worker.contract.errors import CannotStart, StoreUnavailable
from worker.contract.settings import ContractSettings
from worker.contract.store import PictureStore, open_store

KEY = "gen_1/abc/0.png"
SOON_S = 9.0
"""A store that is down is noticed by then; `ANSWER_S` and a retry, and some seconds for a busy machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def opened(server, tmp_path):
    """Stores in a folder of the bucket that is this test's own; settings: others than the usual ones."""

    def open_with(**settings: Any) -> PictureStore:
        place = {"s3_prefix": f"{tmp_path.name}"}
        return open_store(ContractSettings(**server.settings(**place | settings)))

    return open_with


def test_object_has_the_type_and_the_name_that_browsers_show(opened, server, tmp_path):
    opened().put("gen_1/abc/2.webp", b"x")
    headers = obstore.get(server.client(), f"{tmp_path.name}/gen_1/abc/2.webp").attributes
    assert headers["Content-Type"] == "image/webp"
    assert headers["Content-Disposition"] == 'inline; filename="gen_1-2.webp"'


def test_prefixes_that_begin_alike_keep_apart(opened, server):
    one, other, whole = opened(s3_prefix="house/a"), opened(s3_prefix="house/ab/"), opened(s3_prefix="house")
    for store, data in ((one, b"one"), (other, b"other"), (whole, b"whole")):
        store.put(KEY, data)
    assert server.keys("house") == {f"house/a/{KEY}", f"house/ab/{KEY}", f"house/{KEY}"}
    one.delete_prefix("gen_1")
    assert one.sweep(-50) == 0
    assert (one.get(KEY), other.get(KEY), whole.get(KEY)) == (None, b"other", b"whole")


def test_delete_prefix_and_sweep_take_more_than_fit_one_answer(tmp_path):
    server, names = S3Server(tmp_path), [f"{n}.png" for n in range(1100)]
    for job in ("gen_1", "gen_2"):
        server.fill(f"{job}/abc", names)
    server.start()
    try:
        store = open_store(ContractSettings(**server.settings()))
        store.delete_prefix("gen_1")
        assert server.keys() == {f"gen_2/abc/{name}" for name in names}
        assert store.sweep(-50) == 1100
        assert server.keys() == set()
    finally:
        server.stop()


def test_sweep_takes_old_pictures_and_nothing_else_of_the_bucket(opened, server, tmp_path):
    ours, place = opened(), tmp_path.name
    old = [f"{place}/{key}" for key in ("gen_1/abc/0.png", "gen_1/abc/1.jpeg")]
    foreign = [
        f"{place}/{key}" for key in ("backup/db.png", "gen_1/notes.txt", "gen_1/abc/0.png.bak", "x/gen_1/a/0.png")
    ]
    for key in [*old, *foreign]:
        server.put_old(key, 100)
    ours.put("gen_2/abc/0.png", b"new")
    assert ours.sweep(50) == 2
    assert server.keys(place) == {*foreign, f"{place}/gen_2/abc/0.png"}


def test_sweep_is_left_to_the_lifecycle_rule_where_the_settings_say_so(opened, server, tmp_path):
    server.put_old(f"{tmp_path.name}/{KEY}", 100)
    assert opened(s3_sweep=False).sweep(50) == 0
    assert server.keys(tmp_path.name) == {f"{tmp_path.name}/{KEY}"}


def test_link_gives_the_bytes_to_anybody_and_to_nobody_once_changed(opened):
    store = opened(s3_presign=True)
    store.put(KEY, b"picture")
    link = store.link(KEY, 60)
    answer = httpx.get(link)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"picture", "image/png")
    end = "0" if link[-1] != "0" else "1"
    assert httpx.get(link[:-1] + end).status_code == 403
    assert httpx.get(link.replace("/0.png?", "/1.png?")).status_code == 403
    assert httpx.get(link.replace("Expires=60", "Expires=6000")).status_code == 403
    assert httpx.get(link.partition("?")[0]).status_code == 400


def test_link_ends_when_its_time_is_up(opened):
    store = opened(s3_presign=True)
    store.put(KEY, b"picture")
    link, deadline = store.link(KEY, 1), time.monotonic() + 20
    while httpx.get(link).status_code == 200:
        assert time.monotonic() < deadline, "it never ends"
        time.sleep(0.2)
    assert httpx.get(link).status_code == 400


def test_link_leads_to_the_public_endpoint(opened, server):
    public = f"http://localhost:{server.port}"
    store = opened(s3_presign=True, s3_public_endpoint=public)
    store.put(KEY, b"picture")
    link = store.link(KEY, 60)
    assert link.startswith(f"{public}/{BUCKET}/")
    assert store.origin == public
    assert httpx.get(link).content == b"picture"


def test_there_is_no_link_to_what_is_not_there_nor_without_being_asked_for(opened):
    assert opened(s3_presign=True).link(KEY, 60) is None
    store = opened()
    store.put(KEY, b"picture")
    assert store.link(KEY, 60) is None
    assert store.origin is None


@pytest.mark.parametrize(
    ("settings", "origin"),
    [
        ({}, "https://pictures.s3.eu-west-3.amazonaws.com"),
        ({"s3_path_style": True}, "https://s3.eu-west-3.amazonaws.com"),
        ({"s3_endpoint": "http://s3.test:9000"}, "http://s3.test:9000"),
        ({"s3_endpoint": "https://s3.test", "s3_path_style": False}, "https://pictures.s3.test"),
        ({"s3_endpoint": "http://s3", "s3_public_endpoint": "https://cdn.test/"}, "https://cdn.test"),
    ],
)
def test_links_name_the_host_as_the_settings_say(settings, origin):
    asked = {"s3_bucket": "pictures", "s3_region": "eu-west-3", "s3_presign": True, **settings}
    assert open_store(ContractSettings(**asked)).origin == origin


def test_wrong_secret_is_refused_by_every_call_and_not_told(opened, server):
    store = opened(s3_secret_access_key="wrong-secret", s3_presign=True)
    told = refusals(store)
    assert all("it answered SignatureDoesNotMatch" in text for text in told[:-1])
    assert "it answered 403" in told[-1]  # of the link, which asks by HEAD: such answers have no body
    assert not any("wrong-secret" in text or str(server.port) in text for text in told)


def test_bucket_that_does_not_exist_is_no_empty_one(opened):
    store = opened(s3_bucket="nowhere-to-be-found")
    for text in refusals(store):
        assert "it answered NoSuchBucket" in text


def refusals(store: PictureStore) -> list[str]:
    """What every call says of a store that does not take it; the cause, for logs, holds no query."""
    told = []
    calls = [lambda: store.put(KEY, b"x"), lambda: store.get(KEY), lambda: store.delete_prefix("gen_1")]
    calls += [lambda: store.sweep(1), store.check]
    calls += [lambda: store.link(KEY, 60)] if store.origin else []
    for call in calls:
        with pytest.raises(StoreUnavailable) as refused:
            call()
        told.append(str(refused.value))
        assert "?" not in str(refused.value.__cause__)
    return told


def test_outage_is_noticed_soon_and_over_when_the_server_is_back(tmp_path):
    server = S3Server(tmp_path)
    server.start()
    try:
        store = open_store(ContractSettings(**server.settings(s3_presign=True)))
        store.put(KEY, b"before")
        server.stop()
        before = time.monotonic()
        assert all("(no answer)" in text for text in refusals(store))
        assert time.monotonic() - before < SOON_S
        server.start()
        assert store.get(KEY) == b"before"
        store.put(KEY, b"after")
        assert store.get(KEY) == b"after"
    finally:
        server.stop()


@pytest.mark.slow
def test_server_that_takes_connections_and_says_nothing_is_noticed_soon(tmp_path):
    server = S3Server(tmp_path)
    server.start()
    try:
        store = open_store(ContractSettings(**server.settings()))
        server.pause()
        before = time.monotonic()
        with pytest.raises(StoreUnavailable, match="no answer"):
            store.check()
        assert time.monotonic() - before < SOON_S
        server.resume()
        store.check()
    finally:
        server.stop()


def test_without_a_bucket_nothing_of_obstore_is_loaded(tmp_path):
    code = (
        "import sys; from worker.contract.store import open_store; "
        "from worker.contract.settings import ContractSettings; "
        f"open_store(ContractSettings(store_dir={str(tmp_path)!r})).check(); sys.exit('obstore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bucket_without_obstore_says_what_to_install(tmp_path):
    (tmp_path / "obstore.py").write_text("raise ImportError('not installed')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from worker.contract.settings import ContractSettings; "
        "from worker.contract.store import open_store; open_store(ContractSettings(s3_bucket='pictures'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"{CannotStart.__module__}.CannotStart: DARKROOM_S3_BUCKET is set, and obstore, which speaks S3, is not "
        "installed: pip install 'darkroom[s3]'"
    )
