"""diffusers on our weights: one step, one stage, a whole picture; eager, or each block and the decoder compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from model.bundle import shift_json
from model.mmdit import MMDiT
from model.params import GenerationParams
from model.pipeline import Pipeline
from model.sampling import TRAIN_STEPS
from model.vae import VAE
from model.work import Denoise
from tests.gpu.theirs import autoencoder_of, transformer_of


@dataclass(frozen=True)
class Kind:
    """Which diffusers."""

    compiled: bool
    backend: str = "inductor"
    fp8: bool = False  # every linear layer of the MMDiT by torchao, a scale for each row of weights and inputs
    fa3: bool = False  # attention by FlashAttention 3
    whole: str | None = None  # the MMDiT compiled as one graph, in this mode, instead of block by block

    def transformer(self, net: MMDiT) -> SD3Transformer2DModel:
        """Their MMDiT with our weights."""
        found = transformer_of(net)
        if self.fp8:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

            # Its tuning of every kernel takes minutes, and would stay on for the rows after this one.
            way = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
            quantize_(found, way)
        if self.fa3:
            found.set_attn_processor(FlashProcessor())
        if self.whole:
            found.compile(fullgraph=True, mode=self.whole)
        for block in found.transformer_blocks if self.compiled and not self.whole else ():
            block.compile(backend=self.backend)
        return found

    def autoencoder(self, net: VAE) -> AutoencoderKL:
        """Their VAE with our weights."""
        found = autoencoder_of(net)
        if self.compiled:
            found.decoder.compile(backend=self.backend)
        return found

    def pipeline(self, ours: Pipeline) -> StableDiffusion3Pipeline:
        """All of theirs, with our encoders."""
        text = ours.text
        assert text.t5_tokenizer is not None
        found = StableDiffusion3Pipeline(
            transformer=self.transformer(ours.mmdit),
            vae=self.autoencoder(ours.vae),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, **shift_json(ours.shift)),
            text_encoder=text.clip_l,
            text_encoder_2=text.clip_g,
            text_encoder_3=text.t5,
            tokenizer=text.clip_l_tokenizer.tokenizer,
            tokenizer_2=text.clip_g_tokenizer.tokenizer,
            tokenizer_3=text.t5_tokenizer.tokenizer,
        )
        found.set_progress_bar_config(disable=True)
        return found


class FlashProcessor:
    """Their joint attention by FlashAttention 3; `set_attention_backend` changes nothing for SD3's processor."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Any:
        """As JointAttnProcessor2_0."""
        from fa3_fwd_interface import flash_attn_func

        streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            streams.append((encoder_hidden_states, *text))
        made = [
            (norm_q(_heads(to_q(x), attn.heads)), norm_k(_heads(to_k(x), attn.heads)), _heads(to_v(x), attn.heads))
            for x, to_q, to_k, to_v, norm_q, norm_k in streams
        ]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
        attended = flash_attn_func(q, k, v).flatten(2)
        image, rest = attended.split([hidden_states.shape[1], attended.shape[1] - hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, rest if attn.context_pre_only else attn.to_add_out(rest)


def _heads(x: Tensor, heads: int) -> Tensor:
    """shape = (batch, tokens, hidden) -> (batch, tokens, heads, head_dim)."""
    return x.unflatten(-1, (heads, -1))


def step(net: SD3Transformer2DModel, work: Denoise) -> Callable[[], Tensor]:
    """The body of their loop for the same work, without the scheduler's bookkeeping: gives the latents after it."""
    texts = [text for text in (work.negative, work.text) if text is not None]
    context, pooled = torch.stack([t.context for t in texts]), torch.stack([t.pooled for t in texts])
    latents = work.latents.x[None].to(context.dtype)
    timestep = torch.full((1,), 1000 * work.step.sigma, device=latents.device)
    stride = -work.step.sigma * work.step.denoised  # sigma of the next step - sigma, of Euler's method

    @torch.no_grad()
    def call() -> Tensor:
        velocity = net(
            hidden_states=torch.cat([latents] * len(texts)),
            timestep=timestep.expand(len(texts)),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if len(texts) == 2:
            without, with_text = velocity.chunk(2)
            velocity = without + work.guidance_scale * (with_text - without)
        return (latents.float() + stride * velocity).to(latents.dtype)[0]

    return call


@torch.no_grad()
def pixels(net: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents to an 8-bit picture on the CPU, as their pipeline and image processor do it."""
    z = latents[None].to(net.dtype) / net.config.scaling_factor + net.config.shift_factor
    return bytes_of(net.decode(z, return_dict=False)[0] / 2 + 0.5)


def bytes_of(picture: Tensor) -> Tensor:
    """shape = (1, 3, h, w) in [0, 1] -> (h, w, 3), uint8, on the CPU."""
    return picture.clamp(0, 1).mul(255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous().cpu()


def picture(pipeline: StableDiffusion3Pipeline, params: GenerationParams, t5_length: int) -> Tensor:
    """A prompt to an 8-bit picture on the CPU."""
    arguments: dict[str, Any] = {"num_inference_steps": params.steps, "guidance_scale": params.guidance_scale}
    arguments |= {"width": params.width, "height": params.height, "max_sequence_length": t5_length}
    return bytes_of(pipeline(params.prompt, output_type="pt", **arguments).images)


@torch.no_grad()
def encoding(pipeline: StableDiffusion3Pipeline, prompt: str, t5_length: int) -> Tensor:
    """A prompt to its context."""
    given: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": t5_length}
    return pipeline.encode_prompt(prompt, None, None, **given)[0][0]
