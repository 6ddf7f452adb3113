"""Schedules against diffusers, and DPM++ 2M against the paper."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from model.sampling import Growth, Shift, Step, dpmpp_2m, euler, noise, schedule, sigmas


@pytest.mark.parametrize("steps", [1, 4, 28, 40])
def test_sigmas_equal_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    # Theirs are computed in fp32, ours in fp64.
    torch.testing.assert_close(torch.tensor(sigmas(steps)), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [2, 4, 28])
def test_stretched_sigmas_equal_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.4)
    scheduler.set_timesteps(steps)
    found = sigmas(steps, Shift(3.0, 0.4))
    torch.testing.assert_close(torch.tensor(found), scheduler.sigmas, atol=1e-6, rtol=0)
    assert found[-2] == pytest.approx(0.4)


@pytest.mark.parametrize("terminal", [0.0, 0.4])
@pytest.mark.parametrize(("width", "height"), [(512, 512), (768, 512), (1024, 1024), (1536, 1024)])
def test_a_shift_that_grows_with_the_picture_is_diffusers(width: int, height: int, terminal: float) -> None:
    growth = Growth(base_shift=1.1, max_shift=1.95, base_image_seq_len=1024, max_image_seq_len=4096)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=terminal or None, **asdict(growth)
    )
    tokens = (width // 16) * (height // 16)
    scheduler.set_timesteps(
        16,
        mu=calculate_shift(
            tokens, growth.base_image_seq_len, growth.max_image_seq_len, growth.base_shift, growth.max_shift
        ),
    )
    found = sigmas(16, Shift(growth, terminal), tokens)
    torch.testing.assert_close(torch.tensor(found), scheduler.sigmas, atol=1e-6, rtol=0)


def test_one_stretched_step_goes_all_the_way() -> None:
    assert sigmas(1, Shift(3.0, 0.4)) == (1.0, 0.0)


def test_sigmas_of_four_steps_are_the_published_ones() -> None:
    assert sigmas(4) == pytest.approx((1, 0.857692, 0.602151, 0.008929, 0), abs=1e-6)


def denoiser(x: float, sigma: float) -> float:
    """The ideal prediction for data of variance 0.25: the ODE dx/dsigma = (x - D)/sigma has a closed solution."""
    return x * 0.25 / (0.25 + sigma * sigma)


def solved(steps: list[Step], x: float) -> float:
    previous = 0.0
    for step in steps:
        denoised = denoiser(x, step.sigma)
        x, previous = step.keep * x + step.denoised * denoised + step.previous * previous, denoised
    return x


def papers_2m(levels: tuple[float, ...], x: float) -> float:
    """Algorithm 2 of arXiv:2211.01095 with alpha = 1, lambda = -ln sigma, first order at both ends; fp64."""
    lambdas = [-math.log(s) if s else math.inf for s in levels]
    predictions: list[float] = []
    for i in range(1, len(levels)):
        h = lambdas[i] - lambdas[i - 1]
        predictions.append(denoiser(x, levels[i - 1]))
        d = predictions[-1]
        if i > 1 and levels[i] > 0:
            r = (lambdas[i - 1] - lambdas[i - 2]) / h
            d = (1 + 1 / (2 * r)) * predictions[-1] - 1 / (2 * r) * predictions[-2]
        x = levels[i] / levels[i - 1] * x - (math.exp(-h) - 1) * d
    return x


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 40])
def test_dpmpp_2m_equals_the_papers_algorithm(steps: int) -> None:
    assert solved(dpmpp_2m(sigmas(steps)), 1.7) == pytest.approx(papers_2m(sigmas(steps), 1.7), rel=1e-12)


def test_dpmpp_2m_is_of_second_order_and_euler_of_first() -> None:
    def error(solver: str, n: int) -> float:
        levels = [0.05 ** (i / n) for i in range(n + 1)]  # equal steps of ln sigma, 1 down to 0.05
        steps = {"dpmpp_2m": dpmpp_2m, "euler": euler}[solver](levels)
        exact = math.sqrt((0.25 + 0.05**2) / 1.25)
        return abs(solved(steps, 1.0) - exact)

    # Twice the steps: a quarter of the error of a second-order method, half of a first-order one's.
    assert error("dpmpp_2m", 128) / error("dpmpp_2m", 64) == pytest.approx(0.25, abs=0.03)
    assert error("euler", 128) / error("euler", 64) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_last_step_lands_on_the_prediction(sampler: str) -> None:
    assert schedule(sampler, 8)[-1][1:] == (0.0, 1.0, 0.0)  # type: ignore[arg-type]


def test_noise_depends_on_the_seed_alone_and_is_its_own_draw() -> None:
    expected = torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    assert torch.equal(noise(5, width=96, height=64), expected)
    assert not torch.equal(noise(6, width=96, height=64), expected)
