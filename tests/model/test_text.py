"""The encoders and the conditioning against StableDiffusion3Pipeline.encode_prompt, fp32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from model.checkpoint import Components, load_components
from tests.model import tiny

# The same modules run on both sides, but the random T5's attention is sharp and its values reach tens: batches and
# layouts of memory differ, and fp32 with them.
TOLERANCE = 1e-4

PROMPTS = ["a red cat", "", "The cat, the red CAT! 42"]
LONG = "red cat " * 400


def theirs(pipe: StableDiffusion3Pipeline, prompts: list[str], length: int = 256) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        context, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return context, pooled


@torch.inference_mode()
def ours(components: Components, prompts: list[str], length: int = 256) -> tuple[Tensor, Tensor]:
    texts = components.text.encode(prompts, length)
    return torch.stack([text.context for text in texts]), torch.stack([text.pooled for text in texts])


@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("prompts", [PROMPTS, [LONG]], ids=["short", "cut"])
def test_conditioning_equals_diffusers(
    pipe: StableDiffusion3Pipeline, components: Components, prompts: list[str], length: int
) -> None:
    context, pooled = ours(components, prompts, length)
    expected_context, expected_pooled = theirs(pipe, prompts, length)
    assert context.shape == (len(prompts), 77 + length, tiny.CONTEXT_DIM)
    torch.testing.assert_close(context, expected_context, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(pooled, expected_pooled, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2", "text_encoder_3"])
@torch.inference_mode()
def test_encoder_equals_transformers(pipe: StableDiffusion3Pipeline, components: Components, encoder: str) -> None:
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
    ids = torch.randint(0, 40, (2, 77), generator=torch.Generator().manual_seed(0))
    found = getattr(components.text, names[encoder])(input_ids=ids).last_hidden_state
    expected = getattr(pipe, encoder)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_without_t5_its_part_is_zeros(pipe: StableDiffusion3Pipeline, diffusers_folder: Path) -> None:
    components = load_components(diffusers_folder, "cpu", torch.float32, load_t5=False)
    context, _ = ours(components, PROMPTS)
    expected, _ = theirs(pipe, PROMPTS)
    assert components.text.t5 is None
    assert context.shape == expected.shape
    torch.testing.assert_close(context[:, :77], expected[:, :77], atol=TOLERANCE, rtol=TOLERANCE)
    assert not context[:, 77:].any()


def test_cut_prompt_is_warned_about_for_each_encoder_that_missed_its_end(components: Components) -> None:
    (text,) = components.text.encode([LONG])
    assert [warning.split(":")[0] for warning in text.warnings] == [
        "the prompt was cut for CLIP",
        "the prompt was cut for T5",
    ]
    assert components.text.encode(["a red cat"])[0].warnings == ()


def test_warning_of_a_cut_prompt_quotes_the_words_that_were_not_read(components: Components) -> None:
    prompt = f"{LONG} and the very end"
    (text,) = components.text.encode([prompt])
    for warning in text.warnings:
        quoted = warning.partition('"')[2].removesuffix('"').removesuffix("...")
        assert quoted
        assert quoted in prompt[20:]


def test_prompt_gives_the_same_text_alone_and_in_a_batch(components: Components) -> None:
    together, _ = ours(components, PROMPTS)
    alone, _ = ours(components, PROMPTS[:1])
    torch.testing.assert_close(together[:1], alone, atol=TOLERANCE, rtol=TOLERANCE)
