"""How far one forward, and some steps, in bf16 are from the same weights in fp32: ours, and diffusers'."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.embeddings import Text
from model.mmdit import MMDiT
from model.pipeline import Pipeline
from model.sampling import Step, sigmas
from model.work import Denoise, Latents
from tests.gpu.nets import Size
from tests.gpu.theirs import transformer_of

Inputs = dict[str, Tensor]
Velocity = Callable[[Inputs], Tensor]


def draws(size: Size, count: int) -> list[Inputs]:
    """Inputs on the CPU, exact in bf16 but for the timestep, which is fp32 on both sides."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    config, side = size.mmdit, size.side // 8
    return [
        {
            "x": normal(1, 16, side, side),
            "timestep": torch.rand(1, generator=generator) * 1000,
            "context": normal(1, 77 + size.t5_length, config.context_dim),
            "pooled": normal(1, config.pooled_dim),
        }
        for _ in range(count)
    ]


def plain(net: MMDiT) -> Velocity:
    """Our net's own forward."""
    return lambda given: net(**given)


def served(pipeline: Pipeline) -> Velocity:
    """What the pipeline steps by: a step whose result is the guess of the clean latents, x - sigma * velocity."""

    def velocity(given: Inputs) -> Tensor:
        sigma = float(given["timestep"]) / 1000
        latents = Latents(given["x"][0].float())
        text = Text(given["context"][0], given["pooled"][0])
        pipeline.run([Denoise(latents, Step(sigma, 0.0, 1.0, 0.0), text, None, 1.0)])
        return (given["x"].float() - latents.x[None]) / sigma

    return velocity


def theirs(net: SD3Transformer2DModel) -> Velocity:
    """diffusers' forward."""
    return lambda given: net(
        hidden_states=given["x"],
        timestep=given["timestep"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["pooled"],
        return_dict=False,
    )[0]


def placed(given: Inputs, net: nn.Module) -> Inputs:
    """The inputs where the net is, in its dtype, but for the timestep."""
    first = next(net.parameters())
    return {n: t.to(first.device, t.dtype if n == "timestep" else first.dtype) for n, t in given.items()}


@torch.inference_mode()
def outputs(velocity: Velocity, net: nn.Module, given: Sequence[Inputs]) -> list[Tensor]:
    """The velocity of each draw, fp32 on the CPU."""
    return [velocity(placed(one, net)).float().cpu() for one in given]


@torch.inference_mode()
def after_steps(velocity: Velocity, net: nn.Module, given: Inputs, steps: int, latents: torch.dtype) -> Tensor:
    """Latents after so many unguided Euler steps from noise to the end, kept in this dtype; fp32 on the CPU."""
    one = placed(given, net)
    dtype, x, levels = one["x"].dtype, one["x"].to(latents), sigmas(steps)
    for now, after in pairwise(levels):
        one |= {"x": x.to(dtype), "timestep": torch.full_like(one["timestep"], 1000 * now)}
        x = (x.float() + (after - now) * velocity(one).float()).to(latents)
    return x.float().cpu()


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative L2 distances."""
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]


def forward_errors(pipeline: Pipeline, size: Size, count: int, rollouts: Sequence[int] = ()) -> dict[str, Any]:
    """bf16 errors of both, of one forward and after runs of so many steps; turns the net to fp32 on the way."""
    net, given = pipeline.mmdit, draws(size, count)
    found = outputs(served(pipeline), net, given)
    ran = {n: after_steps(served(pipeline), net, given[0], n, torch.float32) for n in rollouts}
    other = transformer_of(net)
    found_by_theirs = outputs(theirs(other), other, given)
    # diffusers rounds its latents to bf16 after each step.
    ran_by_theirs = {n: after_steps(theirs(other), other, given[0], n, torch.bfloat16) for n in rollouts}
    del other
    net.float()
    with sdpa_kernel(SDPBackend.MATH):
        expected = outputs(plain(net), net, given)
        ends = {n: after_steps(plain(net), net, given[0], n, torch.float32) for n in rollouts}
        twin = transformer_of(net)
        parity = errors(outputs(theirs(twin), twin, given[:1]), expected[:1])[0]
    mine, diffusers = errors(found, expected), errors(found_by_theirs, expected)
    return {
        "ours": statistics.median(mine),
        "diffusers": statistics.median(diffusers),
        "ratio": statistics.median(mine) / statistics.median(diffusers),
        "ours_each": mine,
        "diffusers_each": diffusers,
        "fp32_ours_to_diffusers": parity,
        "after_steps": {n: (errors([ran[n]], [e])[0], errors([ran_by_theirs[n]], [e])[0]) for n, e in ends.items()},
    }
