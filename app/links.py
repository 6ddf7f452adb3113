"""The urls in answers."""

from __future__ import annotations

from dataclasses import dataclass

from app.signing import Signer
from worker.contract.job import JobView


@dataclass(frozen=True)
class Links:
    """Absolute urls of the native surface; where API keys are on, some are signed."""

    base_url: str  # no slash at its end
    signer: Signer | None = None

    def signed(self, path: str, expires: int) -> str:
        """The url of a path, good without a key until `expires` (Unix seconds)."""
        return self.base_url + path + (self.signer.query(path, expires) if self.signer else "")

    def generation(self, job_id: str) -> str:
        """GET, DELETE: the generation."""
        return f"{self.base_url}/v1/generations/{job_id}"

    def image(self, view: JobView, n: int) -> str:
        """GET: the bytes of picture `n` of a job that succeeded."""
        path = f"/v1/generations/{view.job.id}/images/{n}"
        expires_at = view.result.expires_at if view.result else None
        return self.base_url + path if expires_at is None else self.signed(path, int(expires_at))
