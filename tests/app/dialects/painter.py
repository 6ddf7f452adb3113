"""A fake worker whose pictures are pictures, for clients that look at them."""

from __future__ import annotations

import io
import time

from PIL import Image

from model.params import GenerationParams
from tests.app.fake_worker import FakeWorker
from worker.contract.job import Job, Progress
from worker.intake import Claim


def picture_of(width: int, height: int, format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, format)
    return file.getvalue()


class Painter(FakeWorker):
    """Paints each picture in one colour. With `previews`, goes on with a job only once somebody watches it."""

    previews = False

    def paint(self, job: Job, params: GenerationParams) -> bytes:
        return picture_of(params.width, params.height, job.output.format)

    def _finish(self, claim: Claim) -> None:
        if self.previews:
            self._show(claim)
        super()._finish(claim)

    def _show(self, claim: Claim) -> None:
        steps, deadline = claim.job.steps, time.monotonic() + 10
        preview = picture_of(claim.job.params.width // 8, claim.job.params.height // 8, "jpeg")
        while claim.key not in self._intake.progress({claim: Progress(step=1, steps=steps)}):
            assert time.monotonic() < deadline, "nobody watches"
            time.sleep(0.01)
        for step in range(2, steps):
            self._intake.progress({claim: Progress(step=step, steps=steps)})
            self._intake.preview(claim, step, preview)
