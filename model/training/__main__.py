"""The command line: python -m model.training vae, flow, export or sheet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from model.training.loop import device_name


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    try:
        commands = {"vae": _vae, "flow": _flow, "export": _export, "sheet": _sheet}
        commands[options.command](options, device)
    except (FileNotFoundError, FileExistsError, FloatingPointError, ValueError) as error:
        print(f"model.training {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.training", description="Train the demo from drawings.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    vae = commands.add_parser("vae", help="train the autoencoder on drawings")
    flow = commands.add_parser("flow", help="train the MMDiT and the text encoders by flow matching")
    for command in (vae, flow):
        command.add_argument("--out", type=Path, required=True, help="folder for weights, sheets and training.json")
        command.add_argument("--minutes", type=float, required=True, help="length of this leg, compiling included")
        command.add_argument("--resume", type=Path, help="the folder of an earlier leg")
        command.add_argument("--begin", type=float, default=0.0, help="where in the schedule this leg begins")
        command.add_argument("--end", type=float, default=1.0, help="where it ends, at most 1")
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--peak", type=float, help="the highest learning rate")
        command.add_argument("--no-compile", dest="compiled", action="store_false", help="run without torch.compile")
        command.add_argument("--processes", type=int, help="processes that make scenes and captions")
    vae.add_argument("--batch", type=int, default=64)
    vae.add_argument("--size", type=int, default=160, help="side of the painted squares, a multiple of 8")
    flow.add_argument("--vae", type=Path, required=True, help="the folder of a trained autoencoder")
    export = commands.add_parser("export", help="write a trained flow as a bundle in the diffusers folder layout")
    export.add_argument("--vae", type=Path, required=True)
    export.add_argument("--flow", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    sheet = commands.add_parser("sheet", help="draw a contact sheet of scenes and their captions")
    sheet.add_argument("--out", type=Path, required=True, help="a PNG file")
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--count", type=int, default=24)
    sheet.add_argument("--size", type=int, default=256)
    sheet.add_argument("--held-out", action="store_true", help="only combinations that are never trained on")
    return parser


def _given(options: argparse.Namespace, *names: str) -> dict[str, object]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


_LEG = ("out", "minutes", "resume", "begin", "end", "seed", "peak", "compiled", "processes")


def _vae(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.reconstruction import VAETraining, train_vae

    print(f"training the VAE on {device_name(device)}", flush=True)
    train_vae(VAETraining(**_given(options, *_LEG, "batch", "size")), device)  # type: ignore[arg-type]


def _flow(options: argparse.Namespace, device: torch.device) -> None:
    from model.training.flow import FlowTraining, train_flow

    print(f"training the MMDiT on {device_name(device)}", flush=True)
    train_flow(FlowTraining(**_given(options, *_LEG, "vae")), device)  # type: ignore[arg-type]


def _export(options: argparse.Namespace, _: torch.device) -> None:
    from model.training.bundle import export_bundle

    print(f"{options.out}: {export_bundle(options.vae, options.flow, options.out):,} bytes")


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
