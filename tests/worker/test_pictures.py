"""Pixels to files, with what made them inside."""

import io
import json
from typing import get_args

import pytest
import torch
from PIL import Image

from tests.worker.jobs import make_job
from worker.contract.job import Output, OutputFormat
from worker.pictures import EXIF_IFD, USER_COMMENT, encode, parameters

PIXELS = torch.arange(16 * 24 * 3, dtype=torch.uint8).reshape(16, 24, 3)


def test_png_keeps_every_pixel() -> None:
    image = Image.open(io.BytesIO(encode(PIXELS, make_job(), 0)))
    assert image.size == (24, 16)
    assert image.tobytes() == PIXELS.numpy().tobytes()


@pytest.mark.parametrize("fmt", get_args(OutputFormat))
def test_encode_writes_the_format_asked_for(fmt: OutputFormat) -> None:
    image = Image.open(io.BytesIO(encode(PIXELS, make_job(output=Output(format=fmt)), 0)))
    assert image.format == fmt.upper()


def test_png_text_says_what_made_picture_n() -> None:
    job = make_job(prompt="ein Haus, 家", negative_prompt="red", seed=5)
    text = Image.open(io.BytesIO(encode(PIXELS, job, 2))).text
    assert text["parameters"] == parameters(job, 2)
    assert "Seed: 7" in text["parameters"]
    assert "Negative prompt: red" in text["parameters"]
    assert json.loads(text["darkroom"])["prompt"] == "ein Haus, 家"


@pytest.mark.parametrize("fmt", ["jpeg", "webp"])
def test_exif_says_what_made_the_picture(fmt: OutputFormat) -> None:
    job = make_job(output=Output(format=fmt), prompt="家")
    exif = Image.open(io.BytesIO(encode(PIXELS, job, 0))).getexif().get_ifd(EXIF_IFD)
    assert exif[USER_COMMENT].removeprefix(b"UNICODE\0").decode("utf-16-be") == parameters(job, 0)


def test_exif_of_prompts_longer_than_a_jpeg_can_hold_is_cut_but_keeps_the_numbers() -> None:
    job = make_job(output=Output(format="jpeg"), prompt="\N{CAMERA}" * 10_000, negative_prompt="\N{CAMERA}" * 10_000)
    exif = Image.open(io.BytesIO(encode(PIXELS, job, 0))).getexif().get_ifd(EXIF_IFD)
    comment = exif[USER_COMMENT].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert comment.startswith("\N{CAMERA}")
    assert comment.endswith(parameters(job, 0).splitlines()[-1])


@pytest.mark.parametrize("fmt", get_args(OutputFormat))
def test_metadata_none_leaves_no_trace_of_the_prompt(fmt: OutputFormat) -> None:
    data = encode(PIXELS, make_job(output=Output(format=fmt, metadata="none"), prompt="secret garden"), 0)
    assert b"secret" not in data
    assert "secret".encode("utf-16-be") not in data


def test_jpeg_quality_changes_the_size() -> None:
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    small, large = (encode(noise, make_job(output=Output(format="jpeg", quality=q)), 0) for q in (10, 95))
    assert len(small) < len(large) / 2
