"""The two trainings on tiny nets: losses fall, averages follow, legs resume, and what comes out is a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_components
from model.config import MMDiTConfig, VAEConfig
from model.params import GenerationParams
from model.pipeline import Pipeline, generate, run
from model.training import flow, reconstruction
from model.training.bundle import FILE_BYTES, LIMIT_BYTES, export_bundle
from model.training.demo import DEMO_MMDIT, DEMO_VAE, T5_LENGTH, T5_WIDTH, Reader, TextTower, new_mmdit, new_tower
from model.training.drawing import draw, pack
from model.training.feed import Feed, SceneStream
from model.training.flow import FlowNet, FlowTraining, Phase, load_average, new_net, sample_sigma
from model.training.loop import Average, Clock, Leg, learning_rate, load_shards, read_record, save_shards
from model.training.reconstruction import VAETraining, load_vae, train_vae, vae_loss
from model.training.scenes import sample_scene
from model.vae import VAE

TINY_VAE = VAEConfig(channels=(8, 8, 8, 8), encoder_blocks=1, groups=4, scale=1.0, shift=0.0)
TINY_MMDIT = MMDiTConfig(
    depth=2, hidden=64, heads=1, context_dim=T5_WIDTH, pooled_dim=128, pos_embed_grid=8, dual_blocks=(0,)
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.manual_seed(0)
    return new_tower()


def vae_training(out: Path, **given: object) -> VAETraining:
    settings = {"minutes": 0.02, "config": TINY_VAE, "batch": 2, "size": 16, "largest": 32, "processes": 0}
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
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss, error = vae_loss(vae, pixels, torch.randn(4, 16, 4, 4), 5e-5, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert torch.isfinite(error)
    assert losses[-1] < 0.7 * losses[0]


def test_the_flow_loss_falls(tower: TextTower) -> None:
    torch.manual_seed(0)
    net = FlowNet(new_mmdit(TINY_MMDIT), tower)
    read = Reader(tower.encoders())
    tokens = tuple(torch.tensor(rows) for rows in zip(*map(read, ["a red star", "", "a blue sky"]), strict=True))
    latents, noise = torch.randn(3, 16, 4, 4) + 2, torch.randn(3, 16, 4, 4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        loss = net(latents, noise, torch.tensor([0.9, 0.5, 0.2]), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx((noise - latents).square().mean().item(), rel=1e-4)  # starts at zero velocity
    assert losses[-1] < 0.7 * losses[0]


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


def test_a_feed_gives_as_many_scenes_as_asked(tower: TextTower) -> None:
    feed = Feed(SceneStream(0, Reader(tower.encoders()), dropout=0.5), processes=0)
    first, second = feed.take(70), feed.take(3)
    assert len(first.scenes) == 70
    assert [len(ids) for ids in second.tokens] == [3, 3, 3]
    empty = torch.tensor(Reader(tower.encoders())("")[2])
    dropped = (first.tokens[2] == empty).all(1).float().mean()
    assert 0.25 < dropped < 0.75


def test_a_vae_run_writes_weights_measures_and_a_sheet(vae_folder: Path) -> None:
    record = read_record(vae_folder)
    assert record["metrics"]["steps"] >= 1
    assert record["config"]["scale"] == pytest.approx(1 / record["metrics"]["latent_std"])
    assert (vae_folder / "vae.png").stat().st_size > 1000
    vae = load_vae(vae_folder, CPU)
    assert vae.config.channels == TINY_VAE.channels
    assert vae.config.shift == record["metrics"]["latent_mean"]


def test_a_vae_run_resumes_from_the_weights_of_another(vae_folder: Path) -> None:
    vae = VAE(TINY_VAE)
    average = Average(vae, 0.999)
    reconstruction.restore(vae, average, vae_folder)
    live, kept = load_shards(vae_folder, "live"), load_shards(vae_folder, "vae")
    assert all(torch.equal(tensor, live[name]) for name, tensor in vae.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average.state().items())


def test_a_flow_run_resumes_from_the_weights_of_another(vae_folder: Path, tmp_path: Path) -> None:
    settings = FlowTraining(
        out=tmp_path, vae=vae_folder, minutes=0.0, config=TINY_MMDIT, plan=(Phase(1.0, ((32, 32, 2),), 3.0),),
        compiled=False, processes=0,
    )  # fmt: skip
    leg = Leg.start(0.0, 0, (0.0, 1.0), CPU)
    net = new_net(TINY_MMDIT)
    average = Average(net, 0.999)
    loop = flow.Run(settings, net, average, load_vae(vae_folder, CPU), leg)
    assert all(torch.isfinite(loop.step()) for _ in range(3))
    average.swap()
    flow.finish(settings, net, average, {"steps": 3}, leg.log)

    again = new_net(TINY_MMDIT)
    average_again = Average(again, 0.999)
    flow.restore(average_again, tmp_path)
    live, kept = load_shards(tmp_path, "live"), load_shards(tmp_path, "flow")
    assert all(torch.equal(p, live[name]) for name, p in again.named_parameters() if p.requires_grad)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in average_again.state().items())
    load_average(again, tmp_path)
    assert all(torch.equal(p, kept[name]) for name, p in again.named_parameters() if p.requires_grad)
    assert read_record(tmp_path)["metrics"] == {"steps": 3}


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two runs at the demo's real size, untrained."""
    folder = tmp_path_factory.mktemp("runs")
    leg = Leg.start(0.0, 0, (0.0, 1.0), CPU)
    vae, net = VAE(DEMO_VAE), new_net()
    measures = {"latent_std": 0.5, "latent_mean": 0.1}
    save_shards(vae.state_dict(), folder / "vae", "vae")
    record = {"config": {**vars(DEMO_VAE), "scale": 2.0, "shift": 0.1}, "metrics": measures}
    (folder / "vae" / "training.json").write_text(json.dumps(record))
    settings = FlowTraining(out=folder / "flow", vae=folder / "vae", minutes=0.0)
    flow.finish(settings, net, Average(net, 0.999), {"steps": 0}, leg.log)
    return folder / "vae", folder / "flow"


def test_the_bundle_loads_as_any_model_and_stays_within_its_limits(
    demo_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "demo"
    size = export_bundle(*demo_runs, bundle)
    assert size < LIMIT_BYTES
    assert all(path.stat().st_size <= FILE_BYTES for path in bundle.rglob("*.safetensors"))
    parts = load_components(bundle, CPU, torch.float32)
    assert parts.mmdit_config == DEMO_MMDIT
    assert (parts.vae_config.scale, parts.vae_config.shift, parts.shift) == (2.0, 0.1, 3.0)
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
