"""The two trainings on tiny nets: losses fall, averages follow, legs resume, and what comes out is a bundle."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.checkpoint import load_components
from model.config import MMDiTConfig, VAEConfig
from model.mmdit import MMDiT
from model.params import GenerationParams
from model.pipeline import Pipeline, run
from model.training.__main__ import main
from model.training.bundle import FILE_BYTES, LIMIT_BYTES, export_bundle
from model.training.demo import (
    DEMO_MMDIT,
    DEMO_VAE,
    MMDITS,
    T5_LENGTH,
    T5_WIDTH,
    Reader,
    TextTower,
    new_mmdit,
    new_tower,
)
from model.training.drawing import draw, pack
from model.training.feed import Captioned, Feed
from model.training.fidelity import high_frequencies
from model.training.flow import Dropout, FlowTraining, Run, first_net, sample_sigma
from model.training.loop import Average, Clock, Leg, learning_rate, load_shards, read_record, save_shards
from model.training.net import FlowNet, bundle_net, load_net, new_net
from model.training.pictures import Folder
from model.training.plan import Phase, Size, demo_plan, phase_at, plan_of, within
from model.training.reconstruction import VAETraining, Weights, load_vae, restore, train_vae, vae_loss
from model.training.reservoir import Encoder, Reservoir
from model.training.samples import SHIFT
from model.training.scenes import DATA_VERSION, sample_scene
from model.training.sources import HELD_OUT_SEEDS, Drawings, Frame
from model.vae import VAE
from model.work import generate

TINY_VAE = VAEConfig(channels=(8, 8, 8, 8), encoder_blocks=1, groups=4, scale=1.0, shift=0.0)
TINY_MMDIT = MMDiTConfig(
    depth=2, hidden=64, heads=1, context_dim=T5_WIDTH, pooled_dim=128, pos_embed_grid=8, dual_blocks=(0,)
)
TINY_PLAN = plan_of([(32, 32)], tokens=300)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.manual_seed(0)
    return new_tower()


def vae_training(out: Path, **given: object) -> VAETraining:
    settings = {
        "minutes": 0.02,
        "config": TINY_VAE,
        "batch": 2,
        "size": 16,
        "largest": 32,
        "processes": 0,
        "pictures": 4,
    }
    return VAETraining(out=out, compiled=False, **(settings | given))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the VAE's training, of a step or a few."""
    out = tmp_path_factory.mktemp("vae")
    train_vae(vae_training(out), CPU)
    return out


def test_the_vae_loss_falls() -> None:
    torch.manual_seed(0)
    vae = VAE(TINY_VAE)
    pixels = draw(pack([sample_scene(seed) for seed in range(4)]), 32, 32)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(18):
        loss, error = vae_loss(vae, pixels, torch.randn(4, 16, 4, 4), Weights(), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert torch.isfinite(error)
    assert losses[-1] < 0.75 * losses[0]


def test_the_flow_loss_falls(tower: TextTower) -> None:
    torch.manual_seed(0)
    net = FlowNet(new_mmdit(TINY_MMDIT), tower)
    read = Reader(tower.encoders())
    tokens = tuple(torch.tensor(rows) for rows in zip(*map(read, ["a red star", "", "a blue sky"]), strict=True))
    latents, noise = torch.randn(3, 16, 4, 4) + 2, torch.randn(3, 16, 4, 4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = net(latents, noise, torch.tensor([0.9, 0.5, 0.2]), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx((noise - latents).square().mean().item(), rel=1e-4)  # starts at zero velocity
    assert losses[-1] < 0.75 * losses[0]


def test_the_tower_conditions_as_the_pipeline_does(tower: TextTower) -> None:
    prompts = ["a red circle", "", "日本"]
    read = Reader(tower.encoders())
    context, pooled = tower(*(torch.tensor(rows) for rows in zip(*map(read, prompts), strict=True)))
    for n, text in enumerate(tower.encoders().encode(prompts, T5_LENGTH)):
        torch.testing.assert_close(context[n], text.context)
        torch.testing.assert_close(pooled[n], text.pooled)


def test_noise_levels_are_shifted_up_and_cover_the_range() -> None:
    torch.manual_seed(0)
    low, high = (sample_sigma(4000, shift, 0.2, CPU) for shift in (1.0, 5.0))
    assert low.min() > 0
    assert high.max() < 1
    assert high.median() > low.median() + 0.15
    assert (high < 0.1).any()


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert learning_rate(1.0, 0.0, 0, 100) == pytest.approx(0.01)
    assert learning_rate(1.0, 0.0, 500, 100) == pytest.approx(1.0)
    assert learning_rate(1.0, 1.0, 500, 100) == pytest.approx(0.02)


def test_a_leg_covers_its_share_of_the_schedule() -> None:
    clock = Clock(minutes=1.0, begin=0.4, end=0.6)
    assert clock.fraction == 0.4
    clock.run()
    assert 0.4 <= clock.fraction < 0.41
    clock.minutes = 0.0
    clock.tick()
    assert clock.fraction == pytest.approx(0.6)


def test_an_average_swaps_with_the_weights_and_back() -> None:
    net = torch.nn.Linear(2, 2)
    before = net.weight.detach().clone()
    average = Average(net, 0.5)
    with torch.no_grad():
        net.weight.add_(1)
    average.update()
    after = net.weight.detach().clone()
    average.swap()
    assert torch.all((before < net.weight) & (net.weight < after))
    average.swap()
    assert torch.equal(net.weight, after)


def test_shards_stay_below_the_limit_and_read_back(tmp_path: Path) -> None:
    state = {f"{n}": torch.full((1024, 1024), float(n)) for n in range(12)}  # 2 MiB each in 16 bit
    paths = save_shards(state, tmp_path, "net")
    assert len(paths) == 2
    assert all(path.stat().st_size < 16 * 2**20 for path in paths)
    loaded = load_shards(tmp_path, "net")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_feed_gives_as_many_pictures_as_asked(tower: TextTower) -> None:
    read = Reader(tower.encoders())
    feed = Feed(Captioned(Drawings(), read), seed=0, processes=0)
    first, second = feed.take(70, Frame(32, 32)), feed.take(3, Frame(32, 32))
    assert len(first.rows) == 70
    assert [len(ids) for ids in second.tokens] == [3, 3, 3]
    rows, captions = Drawings().read(range(70, 73), Frame(32, 32))
    assert second.rows.tolist() == rows.tolist()
    assert second.tokens[2].tolist() == [read(text)[2] for text in captions]


def test_processes_give_the_same_pictures_in_the_same_order() -> None:
    frames = (Frame(32, 32), Frame(32, 48), Frame(32, 32))
    feed = Feed(Captioned(Drawings()), seed=5, processes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        batches = [feed.take(64, frame) for frame in frames]
    feed.close()
    assert batches[0].rows.tolist() == Drawings().read(range(5, 69), frames[0])[0].tolist()
    assert batches[2].rows.tolist() == Drawings().read(range(69, 133), frames[0])[0].tolist()


def test_left_out_captions_become_the_empty_one(tower: TextTower) -> None:
    read = Reader(tower.encoders())
    tokens = tuple(torch.tensor(ids).expand(200, -1) for ids in read("a red star"))
    torch.manual_seed(0)
    dropped = Dropout(read, 0.5, CPU)(tokens)
    gone = [(ids == torch.tensor(empty)).all(1) for ids, empty in zip(dropped, read(""), strict=True)]
    assert 0.35 < gone[0].float().mean() < 0.65
    assert torch.equal(gone[0], gone[1])
    assert torch.equal(gone[0], gone[2])


def test_the_reservoir_hands_out_each_picture_about_as_often_as_asked(vae_folder: Path) -> None:
    leg = Leg.start(0.0, 0, (0.0, 1.0), CPU)
    feed = Feed(Captioned(Drawings()), seed=0, processes=0)
    encoder = Encoder(Drawings(), load_vae(vae_folder, CPU), leg)
    size = Size(16, 16, 4)
    reservoir = Reservoir(encoder, feed, reuse=3.0, limit=10**9, sizes=1)
    latents, _ = reservoir.take(size)
    assert latents.shape == (4, 16, 2, 2)
    read = [feed.seed]
    for _ in range(60):
        reservoir.take(size)
        read.append(feed.seed)
    ring = reservoir.rings[size]
    drawn, new = 4 * 61, ring.next + len(ring.latents) * (0 if ring.next == ring.filled else 1)
    assert drawn / new == pytest.approx(3.0, rel=0.35)  # the first batches are all new


def test_the_reservoir_keeps_within_its_bytes(vae_folder: Path) -> None:
    leg = Leg.start(0.0, 0, (0.0, 1.0), CPU)
    encoder = Encoder(Drawings(), load_vae(vae_folder, CPU), leg)
    reservoir = Reservoir(encoder, Feed(Captioned(Drawings()), 0, 0), reuse=4.0, limit=2 * 64 * 4 * 5, sizes=1)
    for _ in range(20):
        reservoir.take(Size(16, 16, 4))
    ring = reservoir.rings[Size(16, 16, 4)]
    assert ring.latents.nbytes <= 2 * 64 * 4 * 5
    assert ring.filled == len(ring.latents) == 20


def test_a_step_has_about_as_many_tokens_at_every_size() -> None:
    sizes = {size for phase in demo_plan() for size in phase.sizes}
    tokens = [size.batch * (size.frame.pixels / 256 + 141) for size in sizes]
    assert max(tokens) < 1.3 * min(tokens)
    assert {(size.width, size.height) for size in sizes} >= {(512, 512), (768, 512), (512, 768), (1024, 1024)}


def test_phases_follow_the_fraction() -> None:
    plan = demo_plan()
    assert phase_at(plan, 0.0).sizes[0].width == 256
    assert phase_at(plan, 0.41).sizes[0].width == 512
    assert phase_at(plan, 1.0) is plan[-1]


def test_larger_pictures_have_a_larger_shift() -> None:
    shifts = [Size(side, side, 1).shift for side in (256, 512, 1024)]
    assert shifts == pytest.approx([3.0, 5.05, 8.49], abs=0.01)


def test_a_plan_for_small_pictures_has_no_large_sizes() -> None:
    assert within(demo_plan(), 300) == (Phase(1.0, demo_plan()[0].sizes),)
    with pytest.raises(ValueError, match="most pictures are below 256 pixels a side"):
        within(demo_plan(), 100)


def test_a_size_that_no_net_can_take_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        Size(100, 64, 1)


@pytest.mark.parametrize("name", MMDITS)
def test_every_named_net_fits_the_bundle(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in MMDiT(MMDITS[name]).parameters())
    assert count < 7_100_000


def test_smooth_latents_have_few_high_frequencies() -> None:
    torch.manual_seed(0)
    rough = torch.randn(2, 16, 32, 32)
    smooth = torch.nn.functional.avg_pool2d(rough, 9, 1, 4)
    assert high_frequencies(rough) == pytest.approx(1 - (17 / 32) ** 2, abs=0.02)
    assert high_frequencies(smooth) < 0.1


def test_a_vae_run_writes_weights_measures_and_a_sheet(vae_folder: Path) -> None:
    record = read_record(vae_folder)
    assert record["metrics"]["steps"] >= 1
    assert record["config"]["scale"] == pytest.approx(1 / record["metrics"]["latent_std"])
    assert (vae_folder / "vae.png").stat().st_size > 1000
    vae = load_vae(vae_folder, CPU)
    assert vae.config.channels == TINY_VAE.channels
    assert vae.config.shift == record["metrics"]["latent_mean"]
    style = sample_scene(HELD_OUT_SEEDS).style
    told = {"psnr_256", "psnr_512", f"psnr_{style}", "psnr_noise_20", "psnr_noise_50", "psnr_eq", "high_frequencies"}
    assert told <= set(record["metrics"])


def test_the_log_variance_is_drawn_to_the_noise_that_the_decoder_learns() -> None:
    torch.manual_seed(0)
    vae = VAE(TINY_VAE)
    pixels = draw(pack([sample_scene(seed) for seed in range(2)]), 32, 32)
    optimizer = torch.optim.AdamW(vae.encoder.parameters(), lr=1e-2)
    for _ in range(20):
        loss, _ = vae_loss(vae, pixels, torch.randn(2, 16, 4, 4), Weights(tie=1.0, equivariance=0.0), 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, logvar = vae.encode(pixels)
    assert (0.5 * logvar).exp().mean().item() == pytest.approx(0.2 * mean.std().item(), rel=0.5)


def test_a_vae_run_resumes_from_the_weights_of_another(vae_folder: Path) -> None:
    vae = VAE(TINY_VAE)
    average = Average(vae, 0.999)
    restore(vae, average, vae_folder)
    live, kept = load_shards(vae_folder, "live"), load_shards(vae_folder, "vae")
    assert all(torch.equal(tensor, live[name]) for name, tensor in vae.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.state().items())


def flow_run(settings: FlowTraining) -> Run:
    """Its loop, before the first step."""
    leg = Leg.start(settings.minutes, 0, (settings.begin, settings.end), CPU)
    net = first_net(settings)
    average = Average(net, settings.average)
    if settings.resume:
        average.restore(settings.resume, "flow")
    encoder = Encoder(settings.source, load_vae(settings.vae, CPU), leg)
    return Run(settings, net, average, encoder, leg)


@pytest.fixture(scope="module")
def flow_settings(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FlowTraining:
    return FlowTraining(
        out=tmp_path_factory.mktemp("flow"), vae=vae_folder, minutes=0.0, config=TINY_MMDIT, plan=TINY_PLAN,
        compiled=False, processes=0, pictures=2, prompts=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(flow_settings: FlowTraining) -> Run:
    """A run of three steps, saved."""
    loop = flow_run(flow_settings)
    assert all(torch.isfinite(loop.step()) for _ in range(3))
    loop.save({"steps": 3})
    return loop


def test_a_flow_run_resumes_from_the_weights_of_another(trained: Run, flow_settings: FlowTraining) -> None:
    again = flow_run(replace(flow_settings, resume=flow_settings.out, config=DEMO_MMDIT))  # the net is the run's own
    live, kept = load_shards(flow_settings.out, "live"), load_shards(flow_settings.out, "flow")
    assert all(torch.equal(p, live[name]) for name, p in again.net.named_parameters() if p.requires_grad)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.average.state().items())
    averaged = load_net(flow_settings.out)
    assert all(torch.equal(p, kept[name]) for name, p in averaged.named_parameters() if p.requires_grad)
    assert averaged.mmdit.config == TINY_MMDIT
    assert read_record(flow_settings.out)["metrics"] == {"steps": 3}


def test_held_out_losses_are_those_of_the_average_and_leave_the_weights(trained: Run) -> None:
    before = [p.detach().clone() for p in trained.average.live]
    first, second = trained.validate(), trained.validate()
    assert first == second
    assert set(first) == {
        f"held_out_32x32_{name}" for name in ("at_0.3", "at_0.5", "at_0.7", "at_0.85", "at_0.95", "mean")
    }
    assert all(torch.equal(p, kept) for p, kept in zip(trained.average.live, before, strict=True))


def test_a_leg_that_stays_finite_ends_with_its_clock(flow_settings: FlowTraining, tmp_path: Path) -> None:
    loop = flow_run(replace(flow_settings, out=tmp_path, minutes=0.05, optimizer="adamw"))
    measures = loop.loop()
    assert measures["steps"] >= 1
    assert measures["held_out_32x32_mean"] > 0


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two runs at the demo's real size, untrained."""
    folder = tmp_path_factory.mktemp("runs")
    vae, net = VAE(DEMO_VAE), new_net()
    measures = {"latent_std": 0.5, "latent_mean": 0.1}
    save_shards(vae.state_dict(), folder / "vae", "vae")
    record = {"config": {**vars(DEMO_VAE), "scale": 2.0, "shift": 0.1}, "metrics": measures}
    (folder / "vae" / "training.json").write_text(json.dumps(record))
    save_shards(Average(net, 0.999).state(), folder / "flow", "flow")
    made = {"vae": str(folder / "vae"), "source": Drawings.name, "data_version": DATA_VERSION, "t5_length": T5_LENGTH}
    (folder / "flow" / "training.json").write_text(json.dumps(made | {"config": asdict(DEMO_MMDIT)}))
    return folder / "vae", folder / "flow"


def test_the_bundle_loads_as_any_model_and_stays_within_its_limits(
    demo_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "demo"
    size = export_bundle(*demo_runs, bundle)
    assert size < LIMIT_BYTES
    assert all(path.stat().st_size <= FILE_BYTES for path in bundle.rglob("*.safetensors"))
    parts = load_components(bundle, CPU, torch.float32)
    assert parts.mmdit.config == DEMO_MMDIT
    assert (parts.vae.config.scale, parts.vae.config.shift, parts.shift) == (2.0, 0.1, SHIFT)
    told = json.loads((bundle / "darkroom.json").read_text())
    assert told["t5_length"] == T5_LENGTH
    pipeline = Pipeline(parts.mmdit, parts.vae, parts.text, shift=parts.shift, t5_length=told["t5_length"])
    params = GenerationParams(prompt="a red star", width=64, height=64, steps=1, guidance_scale=2.0, seed=0)
    assert run(generate(params, pipeline.shift), pipeline).pixels.shape == (64, 64, 3)


def test_a_bundle_of_other_drawings_is_refused(demo_runs: tuple[Path, Path], tmp_path: Path) -> None:
    vae, trained = demo_runs
    record = read_record(trained) | {"data_version": "0"}
    other = tmp_path / "flow"
    other.mkdir()
    (other / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="drawings of version 0"):
        export_bundle(vae, other, tmp_path / "demo")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: six pictures and their captions, one in letters that the drawings' captions lack."""
    folder = tmp_path_factory.mktemp("photos")
    for n, tone in enumerate(("red", "green", "blue", "white", "black", "grey")):
        Image.new("RGB", (72, 64), tone).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"{tone} größe" if n else "красный")
    return folder


TOY = ("--no-compile", "--processes", "0", "--sizes", "64x64", "--tokens", "400", "--no-samples")
TINY_NET = ("--depth", "1", "--hidden", "64", "--heads", "1", "--dual", "0")


def test_a_variant_can_be_trained_further_as_its_base_can() -> None:
    demo, turbo = (Path("model/bundles") / name for name in ("demo", "demo-turbo"))
    assert bundle_net(turbo).t5_length == bundle_net(demo).t5_length == 64
    assert load_vae(turbo, CPU).config == load_vae(demo, CPU).config


def picture_of(bundle: Path) -> torch.Tensor:
    """One picture of a bundle at its default size, as a server would make it."""
    parts = load_components(bundle, CPU, torch.float32)
    told = json.loads((bundle / "darkroom.json").read_text())
    pipeline = Pipeline(parts.mmdit, parts.vae, parts.text, shift=parts.shift, t5_length=told["t5_length"])
    width, height = told["defaults"]["width"], told["defaults"]["height"]
    params = GenerationParams(prompt="green größe", width=width, height=height, steps=1, guidance_scale=2.0, seed=0)
    return run(generate(params, pipeline.shift), pipeline).pixels


def test_a_users_pictures_become_a_bundle(photos: Path, vae_folder: Path, tmp_path: Path) -> None:
    flow, bundle = tmp_path / "flow", tmp_path / "bundle"
    pictures = ("--pictures", str(photos), "--vae", str(vae_folder))
    assert main(["flow", *pictures, "--out", str(flow), "--minutes", "0.15", *TOY, *TINY_NET]) == 0
    words = {token.strip("▁") for token in load_net(flow).tower.tokenizers[2].get_vocab()}
    assert {"größe", "красный"} <= words
    assert main(["export", "--flow", str(flow), "--out", str(bundle)]) == 0
    assert picture_of(bundle).shape == (64, 64, 3)
    told = json.loads((bundle / "darkroom.json").read_text())
    assert told["limits"] == {"min_side": 64, "min_pixels": 4096}
    assert "6 pictures" in told["description"]


def test_the_demos_weights_are_trained_further_on_a_users_pictures(photos: Path, tmp_path: Path) -> None:
    demo, flow, bundle = Path("model/bundles/demo").resolve(), tmp_path / "flow", tmp_path / "bundle"
    start = ("--pictures", str(photos), "--bundle", str(demo))
    assert main(["flow", *start, "--out", str(flow), "--minutes", "0.15", *TOY]) == 0
    assert main(["export", "--flow", str(flow), "--out", str(bundle)]) == 0
    before, after = (load_components(folder, CPU, torch.float32) for folder in (demo, bundle))
    assert after.mmdit.config == before.mmdit.config
    assert torch.equal(after.vae.decoder.conv_in.weight, before.vae.decoder.conv_in.weight)
    weight = "joint_blocks.0.x_block.attn.qkv.weight"
    moved = (after.mmdit.get_parameter(weight) - before.mmdit.get_parameter(weight)).abs().max()
    assert 0 < moved < 0.05
    assert picture_of(bundle).shape == (64, 64, 3)
    of_demo, of_bundle = (json.loads((folder / "training.json").read_text()) for folder in (demo, bundle))
    assert of_bundle["vae"] == of_demo["vae"]
    assert of_bundle["flow"]["before"]["command"] == of_demo["flow"]["command"]
    assert "log" not in of_bundle["flow"]["before"]


def test_a_users_pictures_train_an_autoencoder(photos: Path, tmp_path: Path) -> None:
    settings = vae_training(tmp_path, source=Folder(photos), pictures=2)
    train_vae(settings, CPU)
    assert "psnr_flat" not in read_record(tmp_path)["metrics"]
    assert "6 pictures" in read_record(tmp_path)["source"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--pictures", "/nowhere"), "/nowhere is not a folder"),
        (("--sizes", "64by64"), "sizes are '64by64', expected such as 512x512,768x512"),
        (("--sizes", "100x64"), "multiples of 16"),
        (("--vae", "/nowhere"), "/nowhere"),
        (("--begin", "0.5", "--end", "0.2"), "begin is 0.5 and end 0.2, expected 0 <= begin < end <= 1"),
        (("--hidden", "100", "--heads", "3"), "hidden 100 is not a multiple of heads 3"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["flow", "--out", str(tmp_path), "--minutes", "0.01", "--vae", str(vae_folder), "--no-compile", *arguments]
    assert main(given) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_without_an_autoencoder_a_flow_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flow", "--out", str(tmp_path), "--minutes", "0.01"]) == 1
    assert "say where the autoencoder is" in capsys.readouterr().err
