"""A tiny Stable Diffusion 3.5 with random weights, as diffusers builds it: the ruler that ours is held against."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from model.checkpoint import Components
from model.config import MMDiTConfig, VAEConfig
from model.keys import Shape, mmdit_rules, vae_rules

CLIP_L_WIDTH, CLIP_G_WIDTH, CONTEXT_DIM = 64, 128, 256

MMDIT_X = MMDiTConfig(
    depth=4,
    hidden=128,
    heads=2,
    context_dim=CONTEXT_DIM,
    pooled_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
    pos_embed_grid=24,
    dual_blocks=(0, 1),
)
TABLES = re.compile(r"pos_embed$|token_embedding|position_embedding|shared|embed_tokens")
TINY_VAE = VAEConfig(channels=(32, 32, 64, 64))


def randomize(net: nn.Module, seed: int = 0) -> None:
    """Every weight random, so that no gate, bias or modulation is trivially zero, at sizes that keep outputs near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(noise if TABLES.search(name) else noise / fan_in**0.5)
            else:
                tensor.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def shapes_of(net: nn.Module) -> dict[str, Shape]:
    """Of each of its tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def transformer(config: MMDiTConfig = MMDIT_X) -> SD3Transformer2DModel:
    """diffusers' MMDiT of this configuration, on whatever device is the default."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=config.patch,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.hidden,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.pos_embed_grid,
        dual_attention_layers=config.dual_blocks,
        qk_norm="rms_norm" if config.qk_norm else None,
    ).eval()


def autoencoder(config: VAEConfig = TINY_VAE) -> AutoencoderKL:
    """diffusers' VAE of this configuration."""
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.encoder_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=128,
        scaling_factor=config.scale,
        shift_factor=config.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def clip_tokenizer(pad: str) -> PreTrainedTokenizerBase:
    """Bytes, a few merges and CLIP's own order: "!" is 0, the end token is the largest id."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """Letters and a few words, with T5's pad 0 and end token 1."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁red", -4.0), ("▁cat", -4.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.!'-"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def clip(tokenizer: PreTrainedTokenizerBase, width: int, act: str) -> CLIPTextModelWithProjection:
    """A CLIP text tower for the tokenizer; heads are 64 wide."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=width // 64,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=2,
            pad_token_id=1,
        )
    ).eval()


def t5(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """A T5 v1.1 encoder for the tokenizer."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=CONTEXT_DIM,
        d_kv=32,
        d_ff=96,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def pipeline() -> StableDiffusion3Pipeline:
    """The whole, in fp32 on the CPU. CLIP-L's projection is the identity, as published."""
    tokenizers = (clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer())
    clip_l, clip_g = clip(tokenizers[0], CLIP_L_WIDTH, "quick_gelu"), clip(tokenizers[1], CLIP_G_WIDTH, "gelu")
    parts = {"transformer": transformer(), "vae": autoencoder(), "text_encoder": clip_l, "text_encoder_2": clip_g}
    parts["text_encoder_3"] = t5(tokenizers[2])
    for seed, part in enumerate(parts.values()):
        randomize(part, seed)
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(CLIP_L_WIDTH))
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    pipe = StableDiffusion3Pipeline(scheduler=scheduler, **parts, **dict(zip(names, tokenizers, strict=True)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def original_state(pipe: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    """The MMDiT and the VAE under Stability's names."""
    nets = (
        ("model.diffusion_model.", mmdit_rules(MMDIT_X), pipe.transformer),
        ("first_stage_model.", vae_rules(TINY_VAE), pipe.vae),
    )
    state = {}
    for prefix, rules, net in nets:
        theirs = net.state_dict()
        state |= {prefix + rule.name: rule.gather([theirs[key] for key in rule.sources]).clone() for rule in rules}
    return state


def text_states(pipe: StableDiffusion3Pipeline) -> dict[str, dict[str, Tensor]]:
    """The text encoders as Stability's files hold them: CLIP-L without projection, one embedding for T5."""
    clip_l, clip_g, t5_state = (
        {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for net in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    )
    del clip_l["text_projection.weight"], t5_state["encoder.embed_tokens.weight"]
    return {"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5_state}


def save_original(pipe: StableDiffusion3Pipeline, folder: Path) -> Path:
    """Write Stability's layout; gives the main file."""
    (folder / "text_encoders").mkdir(parents=True)
    main = folder / "sd3.5_tiny.safetensors"
    save_file(original_state(pipe), main)
    for name, state in text_states(pipe).items():
        save_file(state, folder / "text_encoders" / f"{name}.safetensors")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipe, name).save_pretrained(folder / name)
    return main


def nets(components: Components) -> dict[str, nn.Module]:
    text = components.text
    parts = {
        "mmdit": components.mmdit,
        "vae": components.vae,
        "clip_l": text.clip_l,
        "clip_g": text.clip_g,
        "t5": text.t5,
    }
    return {name: net for name, net in parts.items() if net is not None}


def assert_same_weights(found: Components, expected: Components) -> None:
    assert nets(found).keys() == nets(expected).keys()
    for name, net in nets(expected).items():
        state = nets(found)[name].state_dict()
        for key, tensor in net.state_dict().items():
            assert torch.equal(state[key], tensor), f"{name} {key}"
