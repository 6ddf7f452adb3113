"""What is measured: one function a kind of row, and the list of rows with their goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from model.embeddings import Text
from model.fp8 import use_fp8
from model.kernels.elementwise import FP8
from model.params import GenerationParams
from model.pipeline import Pipeline, run
from model.sampling import schedule
from model.text import CLIP_LENGTH
from model.tuning import random_mmdit
from model.work import Decode, Denoise, Encode, Latents, generate
from tests.benchmarks.gpu import flops, peers, start
from tests.benchmarks.gpu.ceilings import Ceilings
from tests.benchmarks.gpu.table import Finding, Goal
from tests.benchmarks.gpu.timing import Call, Spread, by_the_clock, in_a_row, interleaved, kernels
from tests.gpu.errors import forward_errors
from tests.gpu.nets import Size, random_parts, random_pipeline, sized

STEPS_IN_A_ROW = 4
SMALL_SIDES = {512: 32, 1024: 64, 1440: 96}

LINEARS = (("large", 8192), ("large", 4096), ("large", 333), ("medium", 8192), ("medium", 2048))
"""Tokens that a ceiling of a variant's linears is measured with."""

SHAPES = (
    (2, "large", 1024), (1, "large", 1024), (1, "large", 512), (2, "medium", 512), (2, "medium", 1024),
    (2, "medium", 1440),
)  # fmt: skip
"""Rows, variant and side that a ceiling of attention is measured with."""

Peers = Sequence[str]
BOTH: Peers = ("eager", "compiled")


@dataclass(frozen=True)
class Bench:
    """Where rows are measured, and how long."""

    device: torch.device
    small: bool  # tiny nets: tries the rows themselves
    budget_s: float = 25.0  # of a row's rounds
    profiled: bool = False
    ceilings: Ceilings = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ceilings", Ceilings(self.device, self.small))

    def size(self, variant: str, side: int = 1024) -> Size:
        """A variant for square pictures."""
        return replace(sized(variant, self.small), side=SMALL_SIDES[side] if self.small else side)

    def peer(self, name: str) -> peers.Kind:
        """diffusers, `eager` or `compiled`; a CPU goes through the same motions with nothing generated."""
        return peers.Kind(name == "compiled", "inductor" if self.device.type == "cuda" else "eager")

    def timed(
        self, calls: Mapping[str, Call], *, steps: int = 0, warm: Mapping[str, Call] | None = None
    ) -> dict[str, Spread]:
        """Contestants in turn: `steps` calls in a row by the GPU's events, or one by the clock."""
        seconds = in_a_row(self.device, steps) if steps else by_the_clock(self.device)
        found = interleaved(calls, seconds, 0.3 if self.small else self.budget_s, warm)
        if self.profiled:
            print(kernels(calls["ours"], self.device))
        return found


@dataclass(frozen=True)
class Row:
    """A row that can be asked for."""

    name: str
    measure: Callable[[Bench, str], Iterator[Finding]]
    needs: tuple[str, ...] = ()  # packages beyond those of all rows, at full size


def step(
    bench: Bench, name: str, variant: str, side: int, goals: Sequence[Goal], *, guided: bool = True
) -> Iterator[Finding]:
    """One step of one picture."""
    size = bench.size(variant, side)
    ours = random_pipeline(size, bench.device, encoders=False)
    work = _work(size, bench.device, guided)
    calls: dict[str, Callable[[], Tensor]] = {"ours": partial(_stepped, ours, work)}
    for peer in BOTH:
        calls[peer] = peers.step(bench.peer(peer).transformer(ours.mmdit), work)
    found = bench.timed(calls, steps=STEPS_IN_A_ROW)
    apart = {peer: _apart(calls["ours"](), calls[peer]()) for peer in BOTH}
    rows, image, text = work.rows, (size.side // 16) ** 2, CLIP_LENGTH + size.t5_length
    flop = rows * (flops.linear(size.mmdit, image, text) + flops.attention(size.mmdit, image, text))
    floor = bench.ceilings.forward_s(size.mmdit, rows, image, text)
    measured = f"{variant} {side}x{side}, {'guided step' if guided else 'step of one row'}"
    yield Finding(name, measured, "ms", found, goals, floor, [f"{flop / 1e12:.3g} TFLOP"], apart)


def low_step(bench: Bench, name: str, variant: str, side: int, goals: Sequence[Goal]) -> Iterator[Finding]:
    """One guided step in fp8, beside diffusers in torchao's fp8 and ours in bf16."""
    size = bench.size(variant, side)
    whole = random_pipeline(size, bench.device, encoders=False)
    mmdit = deepcopy(whole.mmdit)
    use_fp8(mmdit)
    assert mmdit.joint_blocks[0].x_block.attn.qkv.weight.dtype is FP8  # type: ignore[union-attr]
    ours = Pipeline(mmdit, whole.vae, whole.text, t5_length=size.t5_length)
    work = _work(size, bench.device, guided=True)
    calls: dict[str, Callable[[], Tensor]] = {"ours": partial(_stepped, ours, work)}
    kind = replace(bench.peer("compiled"), fp8=not bench.small)
    calls["torchao"] = peers.step(kind.transformer(whole.mmdit), work)
    calls["ours in bf16"] = partial(_stepped, whole, work)
    found = bench.timed(calls, steps=STEPS_IN_A_ROW)
    apart = {peer: _apart(calls["ours"](), calls[peer]()) for peer in ("torchao", "ours in bf16")}
    image, text = (size.side // 16) ** 2, CLIP_LENGTH + size.t5_length
    flop = 2 * (flops.linear(size.mmdit, image, text) + flops.attention(size.mmdit, image, text))
    notes = [
        f"{flop / 1e12:.3g} TFLOP",
        "torchao: every linear layer in fp8 by rows, each block compiled as the others' are",
    ]
    yield Finding(name, f"{variant} {side}x{side}, guided step in fp8", "ms", found, goals, None, notes, apart)


OTHERS: Mapping[str, Mapping[str, Any]] = {
    "blocks compiled, FA3": {"fa3": True},
    "whole compiled": {"whole": "default"},
    "whole compiled, max-autotune": {"whole": "max-autotune-no-cudagraphs"},
}
"""Other ways to speed diffusers up, printed for comparison."""


def others(bench: Bench, name: str, variant: str, side: int) -> Iterator[Finding]:
    """One guided step beside other ways to run diffusers, each as a row of its own."""
    size = bench.size(variant, side)
    ours = random_pipeline(size, bench.device, encoders=False)
    work = _work(size, bench.device, guided=True)
    for way, given in OTHERS.items():
        kind = replace(bench.peer("compiled"), **({} if bench.small else given))
        calls = {"ours": partial(_stepped, ours, work), way: peers.step(kind.transformer(ours.mmdit), work)}
        found = bench.timed(calls, steps=STEPS_IN_A_ROW)
        apart = {way: _apart(calls["ours"](), calls[way]())}
        yield Finding(
            f"{name}-{way.replace(', ', '-').replace(' ', '-').lower()}",
            f"{variant} {side}x{side}, guided step",
            "ms",
            found,
            apart=apart,
        )
        torch._dynamo.reset()


def _work(size: Size, device: torch.device, guided: bool) -> Denoise:
    """A step in the middle of a run, with random texts."""
    torch.manual_seed(2)

    def text() -> Text:
        context = torch.randn(CLIP_LENGTH + size.t5_length, size.mmdit.context_dim)
        return Text(*(t.to(device, torch.bfloat16) for t in (context, torch.randn(size.mmdit.pooled_dim))))

    x = torch.randn(size.mmdit.in_channels, size.side // 8, size.side // 8).bfloat16().float().to(device)
    middle = schedule("euler", 28)[14]
    return Denoise(Latents(x), middle, text(), text() if guided else None, size.guidance_scale)


def _stepped(pipeline: Pipeline, work: Denoise) -> Tensor:
    """Our step, each time from the same latents: gives those after it."""
    latents = Latents(work.latents.x)
    pipeline.run([replace(work, latents=latents)])
    return latents.x


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """How far our result is from theirs: the relative L2 distance."""
    mine, other = ours.float().cpu(), theirs.float().cpu()
    return float((mine - other).norm() / other.norm())


def request(
    bench: Bench, name: str, variant: str, steps: int, contestants: Peers, goals: Sequence[Goal]
) -> Iterator[Finding]:
    """A prompt never seen before to an 8-bit picture on the CPU. Ours keeps the empty negative prompt's text."""
    size = bench.size(variant)
    steps = min(steps, 3) if bench.small else steps
    ours = random_pipeline(size, bench.device)
    numbers = count()

    def asked(steps: int) -> GenerationParams:
        n = next(numbers)
        sides = {"width": size.side, "height": size.side}
        return GenerationParams(
            prompt=f"a red cat, {n}", steps=steps, guidance_scale=size.guidance_scale, seed=n, **sides
        )

    def calls(steps: int) -> dict[str, Call]:
        theirs = {
            p: lambda pipe=pipe: peers.picture(pipe, asked(steps), size.t5_length) for p, pipe in pipelines.items()
        }
        return {"ours": lambda: run(generate(asked(steps)), ours), **theirs}

    pipelines: Mapping[str, Any] = {peer: bench.peer(peer).pipeline(ours) for peer in contestants}
    found = bench.timed(calls(steps), warm=calls(min(steps, 2)))
    guided = size.guidance_scale > 1
    image, text = (size.side // 16) ** 2, CLIP_LENGTH + size.t5_length
    forward = bench.ceilings.forward_s(size.mmdit, 1 + guided, image, text)
    beside = flops.decode(size.vae, size.side) + flops.encode(ours.text, size.t5_length)
    measured = f"{variant} 1024x1024, {steps} steps{', guided' if guided else ''}, prompt to picture"
    floor = steps * forward + beside / bench.ceilings.gemm
    notes = ["ours has the empty negative prompt's text from before"] if guided else []
    yield Finding(name, measured, "s", found, goals, floor, notes)


def decoding(bench: Bench, name: str, goals: Sequence[Goal]) -> Iterator[Finding]:
    """Latents to an 8-bit picture on the CPU."""
    size = bench.size("medium")
    ours = random_pipeline(size, bench.device, encoders=False)
    torch.manual_seed(3)
    latents = Latents(torch.randn(size.vae.latent_channels, size.side // 8, size.side // 8).to(bench.device))
    calls: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours.run([Decode(latents)])[0]}
    for peer in BOTH:
        calls[peer] = partial(peers.pixels, bench.peer(peer).autoencoder(ours.vae), latents.x)
    found = bench.timed(calls, steps=STEPS_IN_A_ROW)
    apart = {peer: _apart(calls["ours"](), calls[peer]()) for peer in BOTH}
    floor = flops.decode(size.vae, size.side) / bench.ceilings.gemm
    yield Finding(name, "VAE decode 1024x1024, latents to picture", "ms", found, goals, floor, apart=apart)


def encoding(bench: Bench, name: str, goals: Sequence[Goal]) -> Iterator[Finding]:
    """One new prompt through all three encoders."""
    size = bench.size("medium")
    ours = random_pipeline(size, bench.device)
    theirs = bench.peer("eager").pipeline(ours)
    numbers = count()

    def prompt() -> str:
        return f"a red cat, {next(numbers)}"

    calls = {
        "ours": lambda: ours.run([Encode((prompt(),))]),
        "eager": lambda: peers.encoding(theirs, prompt(), size.t5_length),
    }
    found = bench.timed(calls, steps=STEPS_IN_A_ROW)
    ((text,),) = ours.run([Encode(("a cat",))])
    apart = {"eager": _apart(text.context, peers.encoding(theirs, "a cat", size.t5_length))}
    floor = flops.encode(ours.text, size.t5_length) / bench.ceilings.gemm
    yield Finding(name, f"one prompt, T5 of {size.t5_length} tokens", "ms", found, goals, floor, apart=apart)


def resident(bench: Bench, name: str) -> Iterator[Finding]:
    """Memory of three models that share VAE and encoders, and the most of it while one picture is made."""
    device, large = bench.device, bench.size("large")
    vae, text = random_parts(large, device)
    nets = [random_mmdit(bench.size(variant).mmdit, device) for variant in ("large", "large-turbo", "medium")]
    pipelines = [Pipeline(net, vae, text, t5_length=large.t5_length) for net in nets]
    held = (
        torch.cuda.memory_allocated(device)
        if device.type == "cuda"
        else _bytes(*nets, vae, text.clip_l, text.clip_g, text.t5)
    )
    params = GenerationParams(
        prompt="a red cat", width=large.side, height=large.side, steps=2, guidance_scale=large.guidance_scale, seed=0
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run(generate(params), pipelines[0])
    peak, note = held, "no GPU: the peak is not seen"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        note = f"reserved {torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB"
    yield Finding(name, "three models, VAE and encoders, held", "GiB", {"ours": Spread.of([held])}, [Goal(56)])
    measured = "the same, at most, during a guided Large 1024x1024"
    yield Finding(f"{name}-peak", measured, "GiB", {"ours": Spread.of([peak])}, [Goal(64)], notes=[note])


def _bytes(*nets: Any) -> int:
    return sum(t.nbytes for net in nets for t in (*net.parameters(), *net.buffers()))


def errors(bench: Bench, name: str, variant: str) -> Iterator[Finding]:
    """Relative L2 of one forward to fp32, and after whole runs."""
    size = bench.size(variant)
    pipeline = random_pipeline(size, bench.device, encoders=False)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        found = forward_errors(pipeline, size, 8, (4, 28))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    spreads = {"ours": Spread.of(found["ours_each"]), "eager": Spread.of(found["diffusers_each"])}
    after = found["after_steps"].items()
    notes = [f"after {n} steps {ours:.5f}, eager {eager:.5f}" for n, (ours, eager) in after]
    measured = f"{variant} 1024x1024, a forward's rel. L2 to fp32"
    yield Finding(name, measured, "", spreads, [Goal(1.1, "eager")], notes=notes)


def starting(bench: Bench, name: str) -> Iterator[Finding]:
    """A process that loads Large from the page cache, and its first requests."""
    size = bench.size("large")
    told = start.measured(random_pipeline(size, bench.device), size, bench.device)
    loading = f"{told.gigabytes:.1f} GB at {told.gigabytes / told.load_s:.2f} GB/s, imports {told.import_s:.1f} s"
    found = {"ours": Spread.of([told.ready_s])}
    yield Finding(f"{name}-ready", "Large without T5: process start to ready", "s", found, notes=[loading])
    found = {"ours": Spread.of([told.first_s]), "later": Spread.of(told.later_s)}
    measured = "first request after ready, 1024x1024, 4 steps, guided"
    other = f"at 512x512 first {told.other_s[0]:.2f} s, later {told.other_s[-1]:.2f} s"
    yield Finding(f"{name}-first", measured, "s", found, [Goal(1.1, "later")], notes=[other])


def ceilings(bench: Bench, name: str) -> Iterator[Finding]:
    """What the GPU can do: a large product, the linears of the models, attention at the rows' shapes."""
    tops = bench.ceilings
    yield _rate(f"{name}-gemm", f"matrix product {tops.side}^3", tops.gemm)
    for variant, tokens in LINEARS:
        found = list(tops.products(bench.size(variant).mmdit, tokens // 64 if bench.small else tokens))
        rate = sum(flop for _, flop, _ in found) / sum(flop / rate for _, flop, rate in found)
        notes = [f"{part} {rate / 1e12:.3g}" for part, _, rate in found]
        yield _rate(f"{name}-{variant}-{tokens}", f"linears of a {variant} block, {tokens} tokens", rate, notes)
    for rows, variant, side in SHAPES:
        size = bench.size(variant, side)
        image = (size.side // 16) ** 2
        own = (image,) if size.mmdit.dual_blocks else ()
        for tokens in (image + CLIP_LENGTH + size.t5_length, *own):
            yield _attention(bench, name, rows, size, tokens)


def _attention(bench: Bench, name: str, rows: int, size: Size, tokens: int) -> Finding:
    config = size.mmdit
    flop = 4.0 * rows * config.hidden * tokens**2
    found = bench.ceilings.attention(rows, config.heads, tokens, config.head_dim)
    notes = [f"{backend} {1000 * seconds:.3f} ms" for backend, seconds in found.items()]
    shape = f"{rows}x{config.heads}x{tokens}"
    return _rate(f"{name}-attention-{shape}", f"attention {shape}x{config.head_dim}", flop / min(found.values()), notes)


def _rate(name: str, measured: str, rate: float, notes: Sequence[str] = ()) -> Finding:
    return Finding(name, measured, "TFLOP/s", {"ours": Spread.of([rate])}, notes=notes)


E, C = "eager", "compiled"

ROWS = (
    Row("ceilings", ceilings),
    Row("large-1024", partial(step, variant="large", side=1024, goals=[Goal(0.85, C), Goal(0.59, E), Goal(113)])),
    Row("large-28", partial(request, variant="large", steps=28, contestants=[E], goals=[Goal(0.60, E)])),
    Row(
        "turbo-4",
        partial(request, variant="large-turbo", steps=4, contestants=BOTH, goals=[Goal(0.50, E), Goal(0.75, C)]),
    ),
    Row("large-512", partial(step, variant="large", side=512, guided=False, goals=[Goal(0.25, E)])),
    Row("medium-512", partial(step, variant="medium", side=512, goals=[Goal(0.15, E), Goal(0.30, C)])),
    Row("medium-1024", partial(step, variant="medium", side=1024, goals=[Goal(0.85, C)])),
    Row("medium-1440", partial(step, variant="medium", side=1440, goals=[Goal(0.85, C)])),
    Row("large-fp8", partial(low_step, variant="large", side=1024, goals=[Goal(0.80, "torchao")]), ("torchao",)),
    Row("vae-1024", partial(decoding, goals=[Goal(0.35, E)])),
    Row("text", partial(encoding, goals=[Goal(0.30, E)])),
    Row("resident", resident),
    Row("start", starting, ("pydantic", "pydantic_settings", "structlog")),
    Row("others-1024", partial(others, variant="large", side=1024), ("fa3_fwd_interface",)),
    Row("errors-large", partial(errors, variant="large")),
    Row("errors-medium", partial(errors, variant="medium")),
)
