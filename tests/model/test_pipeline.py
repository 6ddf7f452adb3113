"""Whole runs against StableDiffusion3Pipeline, fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from model.checkpoint import Components
from model.params import GenerationParams, Sampler
from model.pipeline import Pipeline, run
from model.sampling import noise, schedule
from model.work import Begin, Decode, Denoise, NonFiniteLatents, generate

PROMPT, NEGATIVE = "the red cat", "a dog"

# A run feeds the rounding of each step to the next, and guidance multiplies it: 1e-5 of latents of size 1 to 10.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "fast"])
def pipeline(components: Components, request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline(components.mmdit, components.vae, components.text, shift=components.shift, fast=request.param)


def params(**given: Any) -> GenerationParams:
    defaults = {"prompt": PROMPT, "width": 96, "height": 64, "steps": 4, "guidance_scale": 4.5, "seed": 11}
    return GenerationParams(**{**defaults, **given})


def final_latents(asked: GenerationParams, pipeline: Pipeline) -> Tensor:
    generator = generate(asked, pipeline.shift)
    work = next(generator)
    while not isinstance(work, Decode):
        (result,) = pipeline.run([work])
        work = generator.send(result)
    return work.latents.x


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@torch.inference_mode()
def test_final_latents_equal_diffusers(
    pipe: StableDiffusion3Pipeline, pipeline: Pipeline, steps: int, guidance_scale: float
) -> None:
    asked = params(steps=steps, guidance_scale=guidance_scale, negative_prompt=NEGATIVE)
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        width=asked.width,
        height=asked.height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=noise(asked.seed, asked.width, asked.height)[None],
        output_type="latent",
    ).images[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(final_latents(asked, pipeline), expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_picture_equals_diffusers(pipe: StableDiffusion3Pipeline, pipeline: Pipeline) -> None:
    asked = params()
    expected = pipe(
        PROMPT,
        negative_prompt="",
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        latents=noise(asked.seed, asked.width, asked.height)[None],
        output_type="np",
    ).images[0]
    pixels = run(generate(asked), pipeline).pixels
    assert pixels.shape == (64, 96, 3)
    # One step of 8 bits, where rounding falls either way.
    assert (pixels - 255 * torch.from_numpy(expected)).abs().max() < 1.05


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_pictures_of_different_steps_sigmas_and_guidance_in_one_batch_equal_the_same_alone(
    pipeline: Pipeline, sampler: Sampler
) -> None:
    asked = [
        params(steps=3, sampler=sampler),
        params(steps=5, seed=1, guidance_scale=1.0),
        params(steps=2, seed=2, guidance_scale=7.0, negative_prompt=NEGATIVE),
    ]
    together = batched_latents(asked, pipeline)
    for one, found in zip(asked, together, strict=True):
        torch.testing.assert_close(found, final_latents(one, pipeline), atol=TOLERANCE, rtol=TOLERANCE)


def batched_latents(asked: list[GenerationParams], pipeline: Pipeline) -> list[Tensor]:
    """All pictures at once: every round runs all the denoising that is asked for as one batch."""
    generators = [generate(one, pipeline.shift) for one in asked]
    work = [next(generator) for generator in generators]
    while not all(isinstance(one, Decode) for one in work):
        live = [i for i, one in enumerate(work) if not isinstance(one, Decode)]
        results = pipeline.run([work[i] for i in live])
        for i, result in zip(live, results, strict=True):
            work[i] = generators[i].send(result)
    return [one.latents.x for one in work if isinstance(one, Decode)]


def test_second_order_sampler_takes_another_path(pipeline: Pipeline) -> None:
    assert not torch.allclose(
        final_latents(params(sampler="dpmpp_2m"), pipeline), final_latents(params(), pipeline), atol=0.01
    )


def test_unguided_picture_takes_one_row_and_ignores_the_negative_prompt(pipeline: Pipeline) -> None:
    plain = final_latents(params(guidance_scale=1.0), pipeline)
    assert torch.equal(final_latents(params(guidance_scale=1.0, negative_prompt=NEGATIVE), pipeline), plain)


def test_bad_latents_of_one_picture_are_its_own_error(pipeline: Pipeline) -> None:
    good, bad = pipeline.run([Begin(seed, 64, 64) for seed in (1, 2)])
    bad.x = torch.full_like(bad.x, torch.nan)
    (pixels,) = pipeline.run([Decode(good)])
    (error,) = pipeline.run([Decode(bad)])
    assert pixels.shape == (64, 64, 3)
    assert isinstance(error, NonFiniteLatents)


def test_pipeline_remembers_the_largest_picture_that_it_finished(components: Components) -> None:
    fresh = Pipeline(components.mmdit, components.vae, components.text)
    for width, height in ((64, 32), (96, 64), (64, 64)):
        fresh.run([Decode(latents) for latents in fresh.run([Begin(1, width, height)])])
    assert fresh.largest == (96, 64)


def test_work_of_one_size_shares_a_key_whatever_its_sigma_and_guidance(pipeline: Pipeline) -> None:
    text, negative = pipeline.text.encode(["a", "b"], 77)
    first, second = pipeline.run([Begin(seed, 64, 64) for seed in (1, 2)])
    wide = pipeline.run([Begin(3, 96, 64)])[0]
    steps = schedule("dpmpp_2m", 8)
    guided = Denoise(first, steps[0], text, negative, 4.5)
    assert guided.key == Denoise(second, steps[5], text, None, 1.0).key
    assert guided.key != Denoise(wide, steps[0], text, negative, 4.5).key
    assert (guided.rows, Denoise(second, steps[5], text, None, 1.0).rows) == (2, 1)


def test_deterministic_work_shares_no_batch(pipeline: Pipeline) -> None:
    asked = [params(seed=seed) for seed in (1, 2)]
    alone = [generate(one, pipeline.shift, deterministic=True) for one in asked]
    work = [next(generator) for generator in alone]
    while not isinstance(work[0], Decode):
        assert isinstance(work[0], Begin) or work[0].key != work[1].key
        work = [generator.send(pipeline.run([one])[0]) for generator, one in zip(alone, work, strict=True)]
    assert all(isinstance(one, Decode) and one.deterministic for one in work)


@pytest.mark.parametrize("max_rows", [1, 3])
def test_denoising_few_rows_at_a_time_equals_all_at_once(pipeline: Pipeline, max_rows: int) -> None:
    def step(limit: int | None) -> list[Tensor]:
        text, negative = pipeline.text.encode(["a", "b"], 77)
        latents = pipeline.run([Begin(seed, 64, 64) for seed in (1, 2, 3)])
        first = schedule("dpmpp_2m", 8)[0]
        pipeline.run([Denoise(one, first, text, negative, 4.5) for one in latents], max_rows=limit)
        return [one.x for one in latents]

    with torch.inference_mode():
        for found, expected in zip(step(max_rows), step(None), strict=True):
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_batch_that_fails_moves_no_latents(pipeline: Pipeline) -> None:
    text, _ = pipeline.text.encode(["a", "b"], 77)
    good, bad = pipeline.run([Begin(seed, 64, 64) for seed in (1, 2)])
    before = good.x.clone()
    bad.previous = torch.zeros(3)  # the last thing that its step reads
    second = schedule("dpmpp_2m", 8)[1]
    with pytest.raises(RuntimeError):
        pipeline.run([Denoise(one, second, text, None, 1.0) for one in (good, bad)])
    assert torch.equal(good.x, before)


def test_kernels_are_fixed_for_deterministic_work_alone(pipeline: Pipeline) -> None:
    seen = []

    class Spy(torch.nn.Module):
        pos_embed = pipeline.mmdit.pos_embed
        context_embedder = pipeline.mmdit.context_embedder

        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
            return x

    spied = Pipeline(Spy(), pipeline.vae, pipeline.text, shift=pipeline.shift)  # type: ignore[arg-type]
    text, _ = pipeline.text.encode(["a", "b"], 77)
    (latents,) = pipeline.run([Begin(1, 64, 64)])
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for deterministic in (True, False):
            spied.run([Denoise(latents, schedule("euler", 2)[0], text, None, 1.0, deterministic)])
    finally:
        torch.backends.cudnn.benchmark = before
    assert seen == [(True, False), (False, True)]
