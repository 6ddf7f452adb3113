"""A user's own pictures: what is read, and what is said of folders that cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.training.pictures import Folder, Function, SourceError, fit
from model.training.sources import HELD_OUT_SEEDS, Drawings, Frame


def picture(seed: int) -> tuple[Image.Image, str]:
    """A source as a user would write one."""
    return Image.new("RGB", (80, 64), (seed % 256, 0, 255)), f"colour number {seed}"


def bare_picture(seed: int) -> Image.Image:
    """What a user might forget: the caption."""
    return picture(seed)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(3):
        Image.new("RGB", (96, 80), (80 * n, 0, 0)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"red at\n  {n}\n")
    return tmp_path


def test_a_folder_gives_pictures_with_the_captions_beside_them(folder: Path) -> None:
    source, frame = Folder(folder), Frame(32, 48)
    rows, captions = source.read(range(3), frame)
    pixels = source.pixels(torch.from_numpy(rows), frame, torch.device("cpu"))
    assert pixels.shape == (3, 3, 32, 48)
    assert sorted(captions) == ["red at 0", "red at 1", "red at 2"]
    for tone, text in zip(pixels[:, 0, 0, 0], captions, strict=True):
        assert tone == pytest.approx(int(text[-1]) * 80 / 127.5 - 1)


def test_a_folder_with_metadata_takes_its_captions_from_there(folder: Path) -> None:
    lines = [json.dumps({"file_name": "1.png", "text": "one"}), "", json.dumps({"file_name": "0.png", "text": "zero"})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert sorted(Folder(folder).captions()) == ["one", "zero"]


def test_every_picture_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    for n in range(45):
        Image.new("L", (64, 64)).save(tmp_path / f"{n:02}.webp")
        (tmp_path / f"{n:02}.txt").write_text(str(n))
    source = Folder(tmp_path)
    turns = [[source.index(seed) for seed in range(43 * turn, 43 * (turn + 1))] for turn in range(3)]
    assert all(sorted(turn) == source.trained for turn in turns)
    assert turns[0] != turns[1]
    held_out = [source.index(HELD_OUT_SEEDS + n) for n in range(2)]
    assert held_out == [19, 39]
    assert not set(held_out) & set(source.trained)


def break_folder(folder: Path, how: str) -> None:
    if how == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif how == "no caption":
        (folder / "1.txt").unlink()
    elif how == "empty caption":
        (folder / "1.txt").write_text(" \n")
    elif how == "unreadable":
        (folder / "1.png").write_bytes(b"no picture")
    elif how == "small":
        Image.new("RGB", (96, 20)).save(folder / "1.png")
    else:
        (folder / "metadata.jsonl").write_text(how)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("empty", r"holds no pictures \(\.png, \.jpg, \.jpeg, \.webp\)"),
        ("no caption", r"1\.png has no caption: expected 1\.txt beside it, or metadata\.jsonl"),
        ("empty caption", r"1\.txt is empty"),
        ("unreadable", r"1\.png cannot be read"),
        ("small", r"1\.png is 96x20, expected at least 64 pixels a side"),
        ("not json", r"metadata\.jsonl, line 1 is not JSON"),
        ('{"file_name": "1.png"}', r'line 1: expected \{"file_name": \.\.\., "text": \.\.\.\}'),
        ('{"file_name": "../1.png", "text": "x"}', r"\.\./1\.png is outside the folder"),
        ('{"file_name": "9.png", "text": "x"}', r"names 9\.png, which is not there"),
    ],
)
def test_a_bad_folder_is_told_apart(folder: Path, how: str, told: str) -> None:
    break_folder(folder, how)
    with pytest.raises(SourceError, match=told):
        Folder(folder)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        Folder(tmp_path / "none")


def test_a_picture_cut_short_is_told_when_it_is_read(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "1.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"1\.png cannot be read"):
        Folder(folder).read(range(3), Frame(32, 32))


def test_what_is_transparent_becomes_white(folder: Path) -> None:
    for n in range(3):
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / f"{n}.png")
    rows, _ = Folder(folder).read([0], Frame(32, 32))
    assert (rows == 255).all()


def test_a_function_gives_pictures_and_captions() -> None:
    source = Function(f"{__name__}:picture")
    rows, captions = source.read([3, 200], Frame(32, 32))
    assert rows[:, 0, 0, 0].tolist() == [3, 200]
    assert captions == ["colour number 3", "colour number 200"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("json", "expected package.module:function"),
        ("no.such.module:draw", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
        ("json:decoder", "is not a function"),
        ("math:sqrt", "gave float, expected a PIL image and its caption"),
        (f"{__name__}:bare_picture", "gave Image, expected a PIL image and its caption"),
    ],
)
def test_a_bad_function_is_told(name: str, told: str) -> None:
    with pytest.raises(SourceError, match=told):
        Function(name)


def test_a_picture_is_scaled_to_cover_its_frame_and_cut_in_the_middle() -> None:
    image = Image.new("RGB", (200, 100), "black")
    image.paste((255, 255, 255), (50, 0, 150, 100))
    cut = np.asarray(fit(image, Frame(40, 40), seed=0))
    assert cut.shape == (40, 40, 3)
    assert cut[:, 1:-1].min() > 250
    assert cut.min() > 200


def test_windows_of_drawings_lie_within_their_pictures() -> None:
    source, frame = Drawings(), Frame(32, 32, largest=96)
    rows, captions = source.read(range(20), frame)
    side, top, left = rows[:, -3:].T
    assert side.min() >= 32
    assert side.max() <= 96
    assert (np.maximum(top, left) + 32 <= side).all()
    assert source.pixels(torch.from_numpy(rows), frame, torch.device("cpu")).shape == (20, 3, 32, 32)
    assert len(captions) == 20
