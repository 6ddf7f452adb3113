"""The command line of training: python -m model.training COMMAND.

The demo, from Darkroom's own drawings. `--resume`, `--begin` and `--end` cut a run into legs:

    python -m model.training vae --out runs/vae --minutes 8
    python -m model.training profile --vae runs/vae
    python -m model.training flow --vae runs/vae --out runs/flow-1 --minutes 8 --end 0.5
    python -m model.training flow --vae runs/vae --out runs/flow-2 --minutes 8 --begin 0.5 --resume runs/flow-1
    python -m model.training export --flow runs/flow-2 --out my-bundle

Several GPUs train together where torchrun starts a process for each; each takes pictures of its own:

    torchrun --nproc-per-node 4 -m model.training flow --vae runs/vae --out runs/flow-1 --minutes 8

The same in four steps without guidance, as a variant that shares the bundle's encoders and autoencoder:

    python -m model.training distill --teacher my-bundle --out runs/turbo --minutes 8
    python -m model.training export-turbo --teacher my-bundle --turbo runs/turbo --out my-bundle-turbo

Your own pictures, from the demo's weights, tokenizers and autoencoder. The caption of NAME.png stands in NAME.txt
beside it, or in metadata.jsonl as {"file_name": ..., "text": ...}:

    python -m model.training flow --bundle model/bundles/demo --pictures photos --out runs/mine --minutes 10
    python -m model.training export --flow runs/mine --out my-bundle

Or all of it from them: `vae --pictures photos`, then `flow --pictures photos --vae runs/vae`. Pictures that your own
code draws, `def draw(seed: int) -> tuple[PIL.Image.Image, str]`, come with `--source package.module:draw` instead of
`--pictures`.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from model.training import team
from model.training.loop import device_name
from model.weights import CheckpointError

ERRORS = (OSError, FloatingPointError, ValueError, CheckpointError, BrokenProcessPool)
"""What a user can do something about; anything else is a bug and keeps its traceback."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    team.join()
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    try:
        commands = {"vae": _vae, "flow": _flow, "profile": _profile, "export": _export, "sheet": _sheet}
        commands |= {"checker": _checker, "distill": _distill, "export-turbo": _export_turbo}
        commands[options.command](options, device)
    except ERRORS as error:
        print(f"model.training {options.command}: {error}", file=sys.stderr)
        return 1
    finally:
        team.leave()
    return 0


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    summary, _, text = (__doc__ or "").partition("\n")
    whole = argparse.ArgumentParser(
        prog="python -m model.training",
        description=summary,
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands = whole.add_subparsers(dest="command", required=True)
    vae = commands.add_parser("vae", help="train the autoencoder")
    flow = commands.add_parser("flow", help="train the MMDiT and the text encoders by flow matching")
    profile = commands.add_parser("profile", help="print where the time of a flow training's step goes")
    distill = commands.add_parser("distill", help="teach a few steps without guidance what a bundle does with many")
    for command in (vae, flow, distill):
        _add_leg(command)
    for command in (vae, flow, profile, distill):
        _add_source(command)
    for command in (vae, flow, profile):
        _add_compiling(command)
    _add_distill(distill)
    for command in (flow, profile):
        _add_flow(command)
    vae.add_argument("--batch", type=int, default=64)
    vae.add_argument("--size", type=int, default=160, help="side of the squares that are learnt, a multiple of 16")
    vae.add_argument("--noise", type=float, help="noise on the latents, a share of their standard deviation (0.2)")
    vae.add_argument("--equivariance", type=float, help="weight of decoding latents at half size (0.5)")
    profile.add_argument("--seconds", type=float, default=55.0, help="compiling included")
    export = commands.add_parser("export", help="write a trained flow as a bundle in the diffusers folder layout")
    export.add_argument("--vae", type=Path, help="a run's folder or a bundle; default: what the flow was trained with")
    export.add_argument("--flow", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    turbo = commands.add_parser("export-turbo", help="write what distill made as a variant of its teacher's bundle")
    turbo.add_argument("--teacher", type=Path, required=True, help="the bundle that it was distilled from")
    turbo.add_argument("--turbo", type=Path, required=True, help="the folder of its run")
    turbo.add_argument("--out", type=Path, required=True, help="a new folder, best beside the teacher's")
    turbo.add_argument("--scale", type=float, default=1.0, help="of the change: a little above 1 may draw clearer (1)")
    turbo.add_argument("--terminal", type=float, help="the last noise level before 0; default: as it was distilled")
    checker = commands.add_parser("checker", help="train the evaluation's checker on drawings, whole and spoiled")
    checker.add_argument("--out", type=Path, required=True, help="a safetensors file")
    checker.add_argument("--minutes", type=float, required=True)
    checker.add_argument("--vae", type=Path, help="an autoencoder's folder or a bundle: it learns to read its pictures")
    checker.add_argument("--resume", type=Path, help="a checker's file to begin with; give another --seed then")
    checker.add_argument("--batch", type=int)
    checker.add_argument("--side", type=int, help="of the pictures' shorter side, pixels, a multiple of 16")
    checker.add_argument("--reconstructed", type=float, help="the share of pictures that go through the autoencoder")
    checker.add_argument("--seed", type=int, default=1)
    checker.add_argument("--peak", type=float, help="the highest learning rate")
    checker.add_argument("--processes", type=int, help="processes that make scenes")
    sheet = commands.add_parser("sheet", help="draw a contact sheet of scenes and their captions")
    sheet.add_argument("--out", type=Path, required=True, help="a PNG file")
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--count", type=int, default=24)
    sheet.add_argument("--size", type=int, default=256)
    sheet.add_argument("--held-out", action="store_true", help="only combinations that are never trained on")
    return whole


def _add_leg(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="folder for weights, sheets and training.json")
    command.add_argument("--minutes", type=float, required=True, help="length of this leg, from start to end")
    command.add_argument("--resume", type=Path, help="the folder of an earlier leg")
    command.add_argument("--begin", type=float, default=0.0, help="where in the schedule this leg begins")
    command.add_argument("--end", type=float, default=1.0, help="where it ends, at most 1")
    command.add_argument("--peak", type=float, help="the highest learning rate")
    command.add_argument("--average", type=float, help="decay of the weights' running average (0.999, distill 0.995)")


def _add_source(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--pictures", type=Path, help="a folder of your own pictures and captions")
    which.add_argument("--source", dest="function", help="package.module:function that draws a seed's picture")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--processes", type=int, help="processes that make or read pictures and captions")


def _add_compiling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-compile", dest="compiled", action="store_false", help="run without torch.compile")
    command.add_argument("--cache", type=Path, help="folder of what was compiled; a later leg then starts sooner")


def _add_flow(command: argparse.ArgumentParser) -> None:
    from model.training.demo import MMDITS

    command.add_argument("--vae", type=Path, help="folder of a trained autoencoder, or a bundle; default: --bundle")
    command.add_argument("--bundle", dest="start", type=Path, help="in the diffusers layout, to train further")
    command.add_argument("--net", choices=MMDITS, default="demo", help="a network by name; the next four change it")
    command.add_argument("--depth", type=int)
    command.add_argument("--hidden", type=int)
    command.add_argument("--heads", type=int)
    command.add_argument("--dual", type=int, help="how many of the first blocks have dual attention")
    command.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    command.add_argument("--reuse", type=float, help="how often an encoded picture is trained on (4)")
    command.add_argument("--memory", type=float, help="GB of device memory for encoded pictures (12)")
    command.add_argument("--tokens", type=int, help="tokens of a step, which set its batch")
    command.add_argument("--sizes", help="train on these alone, such as 512x512,768x512 (width x height)")
    command.add_argument("--dropout", type=float, help="share of captions left empty (0.1)")
    command.add_argument("--prompt", action="append", help="for the sample sheets; may be given often")
    command.add_argument("--no-samples", action="store_true", help="write no sample sheets")


def _add_distill(command: argparse.ArgumentParser) -> None:
    command.add_argument("--teacher", type=Path, required=True, help="a bundle, or the folder of a flow's run")
    command.add_argument("--rank", type=int, help="of the change of each matrix; modulations have half of it (32)")
    command.add_argument("--steps", type=int, help="of the student (4)")
    command.add_argument("--guidance", type=float, help="the teacher's; default: as its card says")
    command.add_argument("--shift", type=float, help="of the student's noise levels; default: as the teacher's")
    command.add_argument("--terminal", type=float, help="its last noise level before 0 (0.4); 0: as published")
    command.add_argument("--substeps", type=int, help="of the teacher in each of the student's steps (4)")
    command.add_argument("--own", type=float, help="share of the rows that go on from the student's own steps (0.5)")
    command.add_argument("--measured", type=int, help="prompts that the distance to the teacher is measured on (16)")
    command.add_argument("--tokens", type=int, help="tokens of a step, which set its batch")
    command.add_argument("--sizes", help="train on these alone, such as 512x512,768x512 (width x height)")
    command.add_argument("--no-samples", action="store_true", help="write no sample sheet")


def _given(options: argparse.Namespace, *names: str) -> dict[str, object]:
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


_LEG = ("out", "minutes", "resume", "begin", "end", "seed", "peak", "average", "cache", "compiled", "processes")


def _announce(what: str, device: torch.device) -> None:
    if team.leads():
        print(f"{what} on {team.size()} x {device_name(device)}", flush=True)


def _vae(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.choices import source_of
    from model.training.reconstruction import VAETraining, Weights, train_vae

    _announce("training the VAE", device)
    source = source_of(options.pictures, options.function, options.size)
    weights = Weights(**_given(options, "noise", "equivariance"))  # type: ignore[arg-type]
    given = _given(options, *_LEG, "batch", "size")
    train_vae(VAETraining(source=source, weights=weights, **given), device)  # type: ignore[arg-type]


def _flow(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.choices import flow_training
    from model.training.flow import train_flow

    _announce("training the MMDiT", device)
    train_flow(flow_training(options, _given(options, *_LEG)), device)


def _profile(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.choices import flow_training
    from model.training.profiling import profile_flow

    given = _given(options, "seed", "cache", "compiled", "processes")
    settings = flow_training(options, {"out": Path(), "minutes": 1.0, **given})
    profile_flow(settings, device, options.seconds)


def _export(options: argparse.Namespace, _: torch.device) -> None:
    from model.training.bundle import export_bundle
    from model.training.loop import read_record

    vae = options.vae or Path(read_record(options.flow)["vae"])
    print(f"{options.out}: {export_bundle(vae, options.flow, options.out):,} bytes")


def _distill(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.choices import distillation
    from model.training.distillation import distil

    _announce("distilling", device)
    distil(distillation(options, _given(options, *_LEG)), device)


def _export_turbo(options: argparse.Namespace, _: torch.device) -> None:
    from model.training.variant import export_turbo

    size = export_turbo(options.teacher, options.turbo, options.out, options.scale, options.terminal)
    print(f"{options.out}: {size:,} bytes")


def _checker(options: argparse.Namespace, device: torch.device) -> None:
    from model.evaluation.checking import CheckerTraining, train_checker
    from model.evaluation.lessons import Spoiling
    from model.training.reconstruction import load_vae

    vae = load_vae(options.vae, device) if options.vae else None
    given = _given(options, "out", "minutes", "resume", "batch", "side", "seed", "peak", "processes")
    spoiling = Spoiling(**_given(options, "reconstructed"))  # type: ignore[arg-type]
    train_checker(CheckerTraining(**given, spoiling=spoiling), vae, device)  # type: ignore[arg-type]


def _sheet(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.captions import plain_caption
    from model.training.drawing import draw, pack
    from model.training.scenes import sample_scene
    from model.training.sheets import contact_sheet

    scenes = [sample_scene(options.seed + n, only_held_out=options.held_out) for n in range(options.count)]
    pixels = draw(pack(scenes), options.size, options.size, device)
    contact_sheet(pixels, [plain_caption(scene) for scene in scenes], columns=6).save(options.out)


if __name__ == "__main__":
    sys.exit(main())
