"""The urls in answers."""

from __future__ import annotations

from dataclasses import dataclass

from app.signing import Signer
from worker.contract.job import JobView


@dataclass(frozen=True)
class Links:
    """Absolute urls of the native surface; those of pictures are signed where API keys are on."""

    base_url: str  # no slash at its end
    signer: Signer | None = None

    def generation(self, job_id: str) -> str:
        """GET, DELETE: the generation."""
        return f"{self.base_url}/v1/generations/{job_id}"

    def image(self, view: JobView, n: int) -> str:
        """GET: the bytes of picture `n` of a job that succeeded."""
        url = f"{self.generation(view.job.id)}/images/{n}"
        expires_at = view.result.expires_at if view.result else None
        if self.signer is None or expires_at is None:
            return url
        return url + self.signer.query(view.job.id, n, int(expires_at))
