"""Where the time of a training step goes: the parts of a step, one after the other, at each size of the plan."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from model.training.compiling import load_compiled, save_compiled
from model.training.flow import FlowTraining, Run, first_net, sample_sigma
from model.training.loop import Average, Leg, device_name
from model.training.plan import Size
from model.training.reconstruction import load_vae
from model.training.reservoir import Encoder

PARTS = ("feed", "draw", "encode", "text", "forward", "backward", "optimizer", "average")


class Stopwatch:
    """Seconds by name; waits for the device at both ends of each part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside counts under `name`."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile_flow(settings: FlowTraining, device: torch.device, seconds: float = 55.0, steps: int = 10) -> None:
    """Prints a table, milliseconds a step; sizes that do not fit into `seconds` are named and left out.

    Feed, draw and encode are those of a batch that is all new: a step has 1/reuse of them. `whole` is a step as it runs
    in training, where the device works while Python prepares: what it lacks to the sum is hidden.
    """
    leg = Leg.start(seconds / 60, 0, (0.0, 1.0), device)
    load_compiled(settings.cache, leg.log)
    net = first_net(settings).to(device)
    vae = load_vae(settings.vae, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(net, settings.average)
    encoder = Encoder(settings.source, vae, leg)
    run = Run(settings, net, average, encoder, leg)
    say = leg.log.say
    say(f"{net.count:,} parameters on {device_name(device)}; ms a step; feed, draw, encode: of a new batch")
    say("".join(f"{head:>14}" for head in ("size", *PARTS, "whole", "pictures/s")))
    try:
        for size in dict.fromkeys(size for phase in settings.plan for size in phase.sizes):
            leg.clock.tick()
            if leg.clock.left <= 0:
                say(f"{size!s:>14}  left out: {leg.clock.elapsed:.0f} s are over")
                continue
            parts, whole = _measure(run, size, steps)
            row = [f"{1000 * parts[name] / steps:.1f}" for name in PARTS] + [f"{1000 * whole:.1f}"]
            say("".join(f"{cell:>14}" for cell in (str(size), *row, f"{size.batch / whole:.0f}")))
    finally:
        run.feed.close()
        save_compiled(settings.cache, leg.log)


def _measure(run: Run, size: Size, steps: int) -> tuple[dict[str, float], float]:
    """Seconds of each part over `steps` steps, and of one whole step in a run of them."""
    run.settings = replace(run.settings, plan=(replace(run.settings.plan[0], until=1.0, sizes=(size,)),))
    for _ in range(3):  # compiles
        run.step()
        _parts(run, size, Stopwatch(run.device))
    watch = Stopwatch(run.device)
    for _ in range(steps):
        _parts(run, size, watch)
    whole = Stopwatch(run.device)
    with whole.part("whole"):
        for _ in range(steps):
            run.step()
    return watch.seconds, whole.seconds["whole"] / steps


def _parts(run: Run, size: Size, watch: Stopwatch) -> None:
    """One step on a new batch, part by part."""
    encoder, frame = run.reservoir.encoder, size.frame
    with watch.part("feed"):
        batch = run.feed.take(size.batch, frame)
    with watch.part("draw"):
        pixels = encoder.paint(batch, frame)
    with watch.part("encode"):
        latents = encoder.encode(pixels)
    tokens = run.dropout(tuple(ids.to(run.device).long() for ids in batch.tokens))
    sigma = sample_sigma(size.batch, size.shift, run.settings.uniform, run.device)
    with run.leg.autocast():
        with watch.part("text"):
            context, pooled = run.net.tower(*tokens)
        with watch.part("forward"):
            loss = run.net.loss(latents, torch.randn_like(latents), sigma, context, pooled)
    run.descent.forget_gradients()
    with watch.part("backward"):
        loss.backward()
    with watch.part("optimizer"):
        run.descent.apply_gradients()
    with watch.part("average"):
        run.average.update()
