from __future__ import annotations

import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.bucket import Moto, S3Server
from worker.contract.errors import StoreUnavailable
from worker.contract.settings import ContractSettings
from worker.contract.store import FolderStore, open_store, picture_key

KEY = "gen_1/abc/0.png"
ALL = ["folder", "s3", pytest.param("moto", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Servers by kind, started when first asked for."""
    running = {}

    def serve(kind):
        if kind not in running:
            running[kind] = {"s3": S3Server, "moto": Moto}[kind](tmp_path_factory.mktemp(kind))
            running[kind].start()
        return running[kind]

    yield serve
    for server in running.values():
        server.stop()


@pytest.fixture(params=ALL)
def store(request, tmp_path, servers):
    """Each kind of store in turn, empty, each in a place of its own."""
    if request.param == "folder":
        return open_store(ContractSettings(store_dir=tmp_path / "pictures"))
    place = {"s3_prefix": f"tests/{tmp_path.name}"}
    return open_store(ContractSettings(**servers(request.param).settings(**place)))


@pytest.fixture
def folder(tmp_path):
    return FolderStore(tmp_path / "pictures")


def test_put_bytes_are_got_until_deleted(store):
    store.put(KEY, b"one")
    store.put(KEY, b"two")
    assert store.get(KEY) == b"two"
    store.delete_prefix("gen_1")
    assert store.get(KEY) is None


@pytest.mark.parametrize("key", ["gen_1/abc/0.png", "gen_1/abc", "gen_1/abc/0.png/x"])
def test_get_of_what_is_not_there_is_none(store, key):
    assert store.get(key) is None
    store.put("gen_1/abc/0.png", b"one")
    assert store.get(key) == (b"one" if key == KEY else None)


def test_picture_key_names_job_execution_and_number():
    assert picture_key("gen_1", "abc", 2, "webp") == "gen_1/abc/2.webp"


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "a//b", "a/", "../a", "a/../b", "a/./b", ".hidden", "a\\b", "a b", "é", "a\n", "a\0b"],
)
def test_key_that_is_not_a_key_is_refused(store, key):
    for call in (lambda: store.put(key, b""), lambda: store.get(key)):
        with pytest.raises(ValueError, match="picture key is"):
            call()


@pytest.mark.parametrize("prefix", ["", "..", "gen_1/..", "*"])
def test_prefix_that_is_not_a_key_deletes_nothing(store, prefix):
    store.put(KEY, b"one")
    with pytest.raises(ValueError, match="picture key is"):
        store.delete_prefix(prefix)
    assert store.get(KEY) == b"one"


def test_delete_prefix_takes_one_execution_and_leaves_the_others(store):
    store.put("gen_1/abc/0.png", b"a")
    store.put("gen_1/abd/0.png", b"b")
    store.put("gen_10/abc/0.png", b"c")
    store.delete_prefix("gen_1/abc/")
    store.delete_prefix("gen_2")
    assert [store.get(f"{key}/0.png") for key in ("gen_1/abc", "gen_1/abd", "gen_10/abc")] == [None, b"b", b"c"]


@pytest.mark.parametrize("key", ["gen_1/-x/_.png", "a..b/-/0.", "_/a-b_c.d/3.WEBP", "1", "gen_1/" + "x" * 200])
def test_odd_but_legal_keys_are_kept_as_they_are(store, key):
    store.put(key, b"odd")
    store.put(f"other/{key}", b"other")
    assert store.get(key) == b"odd"
    store.delete_prefix("other")
    assert (store.get(key), store.get(f"other/{key}")) == (b"odd", None)


def test_put_of_what_is_no_bytes_leaves_the_old_bytes(store):
    store.put(KEY, b"old")
    with pytest.raises(TypeError):
        store.put(KEY, "not bytes")
    assert store.get(KEY) == b"old"


def test_empty_and_large_pictures_come_back_as_they_were(store):
    for data in (b"", os.urandom(12_000_000)):
        store.put(KEY, data)
        assert store.get(KEY) == data


def test_sweep_takes_what_is_older_and_counts_it(store):
    store.put("gen_1/abc/0.png", b"a")
    store.put("gen_1/abc/1.webp", b"b")
    assert store.sweep(50) == 0
    assert store.sweep(-50) == 2
    assert store.get("gen_1/abc/0.png") is None
    assert store.sweep(-50) == 0


def test_check_of_a_store_that_is_there_leaves_nothing(store):
    store.check()
    assert store.sweep(-50) == 0


def test_failed_put_leaves_the_old_bytes_and_no_rest(folder, tmp_path):
    folder.put(KEY, b"old")
    with pytest.raises(TypeError):
        folder.put(KEY, "not bytes")
    assert folder.get(KEY) == b"old"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0.png"]


def test_reader_never_sees_half_a_picture(store):
    pictures = [bytes([n]) * 300_000 for n in range(2)]
    store.put(KEY, pictures[0])
    done = threading.Event()

    def write():
        for n in range(30):
            store.put(KEY, pictures[n % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(store.get(KEY))
    writer.join()
    assert seen <= set(pictures)


def test_sweep_takes_the_old_and_empty_folders_and_counts(folder, tmp_path):
    folder.put("gen_1/abc/0.png", b"old")
    folder.put("gen_1/abc/1.png", b"old")
    folder.put("gen_2/abc/0.png", b"new")
    for n in range(2):
        os.utime(tmp_path / f"pictures/gen_1/abc/{n}.png", (1, time.time() - 100))
    assert folder.sweep(50) == 2
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["gen_2"]
    assert folder.get("gen_2/abc/0.png") == b"new"
    assert folder.sweep(50) == 0


def test_sweep_of_a_folder_takes_nothing_that_is_not_ours(folder, tmp_path):
    pictures = tmp_path / "pictures"
    names = [
        "model.safetensors", "gen_1.png", ".tmp-notes", "holiday/1.png", "holiday/gen_1/abc/0.png", "gen_1/notes.txt",
        "gen_1/abc/0.png.bak", "gen_1/abc/deep/0.png", "holiday/.tmp-abcd1234",
    ]  # fmt: skip
    for name in names:
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(b"theirs")
    (pictures / "empty/gen_1").mkdir(parents=True)
    assert folder.sweep(-50) == 0
    assert {str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.is_file()} == set(names)
    assert (pictures / "empty/gen_1").is_dir()


def test_sweep_takes_what_a_put_that_died_has_left_and_does_not_count_it(folder, tmp_path):
    folder.check()
    handle, left = tempfile.mkstemp(prefix=".tmp-", dir=tmp_path / "pictures")
    os.close(handle)
    assert folder.sweep(50) == 0
    assert Path(left).exists()
    assert folder.sweep(-50) == 0
    assert not Path(left).exists()


def test_sweep_passes_over_what_may_not_be_removed_and_says_so_once(folder, tmp_path, monkeypatch):
    keys = [f"gen_{job}/abc/{n}.png" for job in (1, 2) for n in range(3)]
    for key in keys:
        folder.put(key, b"old")
    unlink = Path.unlink

    def refuse(path, *how):
        if path.name in ("0.png", "1.png"):
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, *how)

    monkeypatch.setattr(Path, "unlink", refuse)
    with capture_logs() as lines:
        assert folder.sweep(-50) == 2
    assert [folder.get(key) for key in keys] == [b"old", b"old", None] * 2
    ((line),) = lines
    assert (line["log_level"], line["files"]) == ("warning", 4)
    assert "0.png" in line["cause"] or "1.png" in line["cause"]


def test_put_survives_a_sweep_that_takes_its_empty_folder(folder):
    stop = threading.Event()

    def sweep():
        while not stop.is_set():
            folder.sweep(1000)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for n in range(50):
            folder.put(f"gen_{n}/abc/0.png", b"x")
    finally:
        stop.set()
        sweeper.join()
    assert all(folder.get(f"gen_{n}/abc/0.png") == b"x" for n in range(50))


def test_put_and_delete_of_the_same_prefix_do_not_fail_each_other(store):
    with ThreadPoolExecutor(2) as pool:
        puts = pool.submit(lambda: [store.put(f"gen_1/a/{n}.png", b"red") for n in range(200)])
        while not puts.done():
            store.delete_prefix("gen_1")
        assert len(puts.result()) == 200
    store.delete_prefix("gen_1")
    assert store.get("gen_1/a/199.png") is None


def test_sweep_of_a_folder_not_made_yet_finds_nothing(store):
    assert store.sweep(1) == 0


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = FolderStore(tmp_path / "file")
    for call in (store.check, lambda: store.put(KEY, b"x")):
        with pytest.raises(StoreUnavailable, match="the picture store is not reachable right now") as refused:
            call()
        assert str(tmp_path) not in str(refused.value)
        assert str(tmp_path) in str(refused.value.__cause__)


def test_check_makes_the_folder_and_leaves_nothing_in_it(folder, tmp_path):
    folder.check()
    assert list((tmp_path / "pictures").iterdir()) == []
