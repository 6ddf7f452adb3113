"""Headers of safetensors files: whatever is wrong with one is told at once, by what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model.weights import CheckpointError, WeightFile


def written(path: Path, header: str, data: int = 4) -> Path:
    """A file with this header and so many bytes of data."""
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0, 4]") -> str:
    return f'{{"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}'


AT_A = "its header is broken at tensor a"
NINES = "9" * 4300  # as long as Python reads

WRONG_HEADERS = {
    "a list": ("[1]", "its header is a list, expected an object"),
    "a number": ("17", "its header is a int, expected an object"),
    "nested deeply": ("[" * 100_000, "its header is broken"),
    "entry that is a number": ('{"a": 1}', AT_A),
    "entry without offsets": ('{"a": {"dtype": "F32", "shape": [1]}}', AT_A),
    "dtype that is none": (entry(dtype="4"), AT_A),
    "infinite offset": (entry(offsets="[0, Infinity]"), AT_A),
    "overflowing offset": (entry(offsets="[0, 1e999]"), AT_A),
    "endless offset": (entry(offsets=f"[0, {NINES}]"), AT_A),
    "start that is a text": (entry(offsets='["0", 4]'), AT_A),
    "end that is a text": (entry(offsets='[0, "4"]'), AT_A),
    "start that is a bool": (entry(offsets="[false, 4]"), AT_A),
    "end with a point": (entry(offsets="[0, 4.0]"), AT_A),
    "one offset": (entry(offsets="[4]"), AT_A),
    "three offsets": (entry(offsets="[0, 4, 9]"), AT_A),
    "offsets that are an object": (entry(offsets='{"0": 0, "1": 4}'), AT_A),
    "start before the data": (entry(offsets="[-4, 0]"), AT_A),
    "end before the start": (entry(offsets="[4, 0]"), AT_A),
    "shape that is a number": (entry(shape="1"), AT_A),
    "negative sides": (entry(shape="[-1, -1]"), AT_A),
    "side that is a bool": (entry(shape="[true]"), AT_A),
    "endless side": (entry(shape=f"[{NINES}]"), AT_A),
    "endless sides": (entry(shape=f"{[9] * 100_000}"), AT_A),
    "fewer bytes than numbers": (entry(shape="[2]"), r"tensor a cannot be read: 4 bytes, expected 8 for F32 of .*2"),
    "more bytes than numbers": (entry(shape="[0, 3]"), "tensor a cannot be read: 4 bytes, expected 0"),
    "end after the file": (entry(shape="[2]", offsets="[0, 8]"), r"is truncated or corrupt: \d+ bytes, expected \d+"),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_wrong_header_is_one_clear_error(tmp_path: Path, case: str) -> None:
    header, message = WRONG_HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        WeightFile(written(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("told", ['["pt"]', "5", '{"_quantization_metadata": 5}', '{"format": null}'])
def test_metadata_that_are_no_texts_are_refused(tmp_path: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match="__metadata__ of its header is broken"):
        WeightFile(written(tmp_path / "x.safetensors", f'{{"__metadata__": {told}}}', data=0))


@pytest.mark.parametrize("told", ["{", "[" * 100_000, "5", '{"layers": 5}', '{"layers": {"a": 5}}'])
def test_broken_quantisation_metadata_is_refused(tmp_path: Path, told: str) -> None:
    header = json.dumps({"__metadata__": {"_quantization_metadata": told}})
    with pytest.raises(CheckpointError, match="_quantization_metadata is broken"):
        WeightFile(written(tmp_path / "x.safetensors", header, data=0))


def test_a_right_header_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    header = json.loads(entry(shape="[2, 1]", offsets="[4, 12]"))
    header |= {"point": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}
    path = written(tmp_path / "x.safetensors", json.dumps(header), data=12)
    file = WeightFile(path)
    sizes = {name: file.span(name)[1] - file.span(name)[0] for name in file.header}
    assert sizes == {name: tensor.nbytes for name, tensor in load_file(path).items()} == {"a": 8, "point": 4}
    assert file.span("a")[1] == path.stat().st_size
    assert file.metadata == {"format": "pt"}
