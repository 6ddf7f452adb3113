"""How fast this worker is at each model, from what it did lately."""

from __future__ import annotations

HALF_LIFE_S = 60.0
"""Seconds at work after which what was measured counts half: a worker that idles forgets nothing."""


class Speed:
    """Megapixel-steps a second of work by model: all stages' time, the steps of one. One thread notes, any reads."""

    def __init__(self) -> None:
        self._done: dict[str, tuple[float, float]] = {}  # megapixel-steps and seconds, faded

    def note(self, model: str, megapixel_steps: float, seconds: float) -> None:
        """A batch ran; of stages other than denoising it has no steps."""
        steps, spent = self._done.get(model, (0.0, 0.0))
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self._done[model] = steps * kept + megapixel_steps, spent * kept + seconds

    def measured(self) -> dict[str, float]:
        """Megapixel-steps a second, of the models that made steps."""
        done = dict(self._done)
        return {model: steps / spent for model, (steps, spent) in done.items() if steps > 0 and spent > 0}
