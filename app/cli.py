"""The `darkroom` command: starts processes, speaks HTTP, asks Redis; no torch here."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import ExitStack, closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from app.client import Client, Refused, Unreachable
from app.generate import Canceled, GenerateFailed, GenerateRequest, generate_pictures
from app.keys import key_commands
from app.operator import queue_commands
from app.stack import COMMANDS, Stack, StackFailed, StackSettings, listen_refusal
from app.terminal import INTERRUPTED, fail, interruptible, read_settings, say
from worker.contract.errors import CannotStart
from worker.contract.keys import parse_key
from worker.contract.variables import unread

cli = typer.Typer(
    name="darkroom",
    help="An inference server for the Stable Diffusion 3.5 family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.add_typer(queue_commands, name="queue", no_args_is_help=True)
cli.add_typer(key_commands, name="keys", no_args_is_help=True)

DEFAULT_URL = "http://127.0.0.1:8000"

Host = Annotated[str | None, typer.Option(help="Address to listen on.  [env: DARKROOM_HOST; default: 127.0.0.1]")]
Key = Annotated[str | None, typer.Option(envvar="DARKROOM_API_KEY", help="An API key, where the server asks for one.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on.  [env: DARKROOM_PORT; default: 8000]")]


def main() -> None:
    """The console script."""
    cli()


@cli.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show_version:
        typer.echo(f"darkroom {version('darkroom')}")
        raise typer.Exit


@cli.command()
def up(
    host: Host = None,
    port: Port = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs here instead of in files.")] = False,
) -> None:
    """Start all on this machine: gateway, worker, sender of webhooks; a Valkey if DARKROOM_REDIS_URL names none."""
    settings = read_settings(StackSettings, host=host, port=port)
    for told in unread():
        typer.echo(f"warning: {told}", err=True)
    try:
        with interruptible(), Stack(settings, say, verbose=verbose) as stack:
            model = stack.wait_ready()[0]
            say(f"\nDarkroom is ready at {stack.url} (API: {stack.url}/openapi.json). Ctrl-C stops it. Try:\n")
            ours = _program(sys.argv[0])
            if settings.keys_on:
                say(f"  export DARKROOM_API_KEY=$({ours} keys add NAME)   # it asks for API keys; this makes one\n")
            say(f'  {ours} generate "a red circle on a blue background" --url {stack.url}\n')
            say(_curl(stack.url, model, keys_on=settings.keys_on) + "\n")
            try:
                stack.supervise()
            except KeyboardInterrupt:
                say("stopping: the worker finishes what it runs; a second Ctrl-C does not wait")
    except StackFailed as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    say("stopped")


@cli.command()
def gateway(host: Host = None, port: Port = None) -> None:
    """Run the HTTP gateway alone. Needs a Redis (DARKROOM_REDIS_URL) and the worker's picture store."""
    _require("gateway", "fastapi", "uvicorn")
    from app.main import serve
    from app.settings import GatewaySettings

    settings = read_settings(GatewaySettings, host=host, port=port)
    if refusal := listen_refusal(settings.host, settings.port):
        fail(refusal)
    try:
        serve(settings)
    except CannotStart as error:
        fail(str(error))


@cli.command()
def worker(
    gpus: Annotated[
        str | None, typer.Option(help="A process for each GPU: all, or indices such as 0,2.  [env: DARKROOM_GPUS]")
    ] = None,
    announce: Annotated[
        bool, typer.Option("--announce", help="Only make the models known to the gateways, by their files; then end.")
    ] = False,
) -> None:
    """Run the GPU worker alone. Needs a Redis (DARKROOM_REDIS_URL); serves the models of DARKROOM_MODELS."""
    _require("worker", "torch", "transformers", "safetensors")
    options = [*([] if gpus is None else ["--gpus", gpus]), *(["--announce"] if announce else [])]
    os.execv(sys.executable, [*COMMANDS["worker"], *options])


@cli.command()
def webhooks() -> None:
    """Run the sender of webhooks alone. Needs a Redis (DARKROOM_REDIS_URL); may go wherever it can reach receivers."""
    _require("gateway", "fastapi", "httpcore")
    from app.webhooks import WebhookSettings, serve

    try:
        serve(read_settings(WebhookSettings))
    except CannotStart as error:
        fail(str(error))


@cli.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    negative: Annotated[str | None, typer.Option(help="What it shall not show.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of the server; left out: one that it has loaded.")] = None,
    every_model: Annotated[
        bool, typer.Option("--every-model", help="A picture of each model that the server has loaded.")
    ] = False,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale: how closely the prompt is followed.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    num_images: Annotated[int | None, typer.Option(help="Pictures of this prompt, with seed, seed + 1, ...")] = None,
    format: Annotated[str | None, typer.Option(help="png, jpeg or webp; left out: as --output ends, or png.")] = None,
    output: Annotated[Path | None, typer.Option(help="File or folder to save to; left out: named by the id.")] = None,
    url: Annotated[str, typer.Option(envvar="DARKROOM_URL", help="The server.")] = DEFAULT_URL,
    key: Key = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Start a whole server for this one job, and stop it again.")
    ] = False,
) -> None:
    """Make a picture: post the prompt, show how far it is, save the picture."""
    given = {
        "negative_prompt": negative,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "num_images": num_images,
    }
    options = {name: value for name, value in given.items() if value is not None}
    request = GenerateRequest(prompt, model, every_model, format, output, options)
    try:
        with interruptible(), ExitStack() as cleanup:
            if embedded:
                url = _start_for_one_job(cleanup)
            with Client(url, key=_checked(key)) as client:
                generate_pictures(client, request)
    except Unreachable as error:
        hint = "" if embedded else "; start a server with `darkroom up`, or name one with --url"
        fail(f"{error}{hint}")
    except Refused as refused:
        hint = "; give one with --key or DARKROOM_API_KEY" if refused.status == 401 else ""
        fail(f"{refused}{hint}")
    except (GenerateFailed, StackFailed) as error:
        fail(str(error))
    except Canceled as canceled:
        typer.echo(str(canceled), err=True)
        raise typer.Exit(INTERRUPTED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@cli.command()
def fetch(
    model: Annotated[
        str, typer.Argument(help="sd3.5-large, sd3.5-large-turbo, sd3.5-medium, or owner/name of a diffusers folder.")
    ],
    to: Annotated[Path, typer.Option(help="The model's folder, made if need be.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; left out: what the folder holds already, or main.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar="DARKROOM_HF_TOKEN_FILE", help="File with a token; else HF_TOKEN or huggingface's login."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only read all files and compare their sums.")] = False,
) -> None:
    """Bring a model's weights from the Hugging Face Hub (HF_ENDPOINT), each file checked; goes on where it was cut.

    Exit code 3: a token or the licence is missing; 4: no such repository or revision; 5: the hub cannot be reached;
    6: the disk is full or cannot be written to; 7: a file is not what the hub lists; 1: anything else.
    """
    if find_spec("huggingface_hub") is None:
        fail("fetch needs huggingface_hub: pip install huggingface_hub; 'darkroom[worker]' brings it too")
    from app.fetch import FetchRequest, TerminalMeter, connect, models_line, told
    from app.fetch import fetch as bring
    from app.hub import FetchFailed

    request = FetchRequest(model, to, revision, check)
    try:
        with interruptible(), TerminalMeter() as meter, connect(os.environ, token_file, meter.say) as hub:
            record = bring(request, hub, meter)
    except FetchFailed as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(told(request, record), err=True)
    say(models_line(request))


@cli.command()
def doctor(
    role: Annotated[
        str | None, typer.Option(help="What this machine is for: all, gateway or worker.  [default: all]")
    ] = None,
    deployment: Annotated[
        str | None, typer.Option(metavar="URL", help="Look at the Darkroom that runs there instead, end to end.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="With --deployment: only this model, also if no worker holds it yet; repeatable."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, max=3600, help="With --deployment: seconds that a picture may take.  [default: 120]"),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what of the models goes where on a GPU instead.")] = False,
    gpu: Annotated[
        float | None,
        typer.Option(min=1, max=1000, help="With --plan: a card of so many GB.  [default: this machine's, or all]"),
    ] = None,
    planned: Annotated[
        str | None,
        typer.Option(
            "--models",
            help="With --plan: large, large-turbo, medium; by commas.  [default: those of DARKROOM_MODELS, or all]",
        ),
    ] = None,
    key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what is missing on this machine, or wrong with a deployment, and how to mend it; exit code 1 if anything is.

    A deployment is asked for a tiny picture of each model, which is deleted again.
    """
    if plan:
        if role or deployment or models or patience:
            fail("--plan goes with --gpu, --models and --json only")
        raise typer.Exit(0 if _plan(gpu, planned, as_json) else 1)
    if gpu or planned:
        fail("--gpu and --models are for --plan")
    from app.doctor import ROLES, DoctorSettings, examine
    from app.finding import tell

    if role is not None and role not in ROLES:
        fail(f"--role is {role!r}; allowed: {', '.join(ROLES)}")
    if deployment is None:
        if models or patience:
            fail("--model and --patience are for --deployment")
        well = tell(examine(read_settings(DoctorSettings), role or "all", key=_checked(key)), as_json=as_json)
        raise typer.Exit(0 if well else 1)
    if role is not None:
        fail("--role is for this machine, --deployment for another one; say one")
    from app.deployment import PATIENCE_S, Visit, checked_url, examine_deployment

    try:
        visit = Visit(checked_url(deployment), _checked(key), tuple(models or ()), patience or PATIENCE_S)
    except ValueError as error:
        fail(f"--deployment: {error}")
    try:
        with interruptible(), closing(examine_deployment(visit)) as findings:
            well = tell(findings, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(0 if well else 1)


def _plan(gpu: float | None, models: str | None, as_json: bool) -> bool:
    """Tells the memory plan; whether all fits on the one card that was asked about, if it was one."""
    from app.doctor import DoctorSettings, run_command
    from app.plan import cards_of, models_of, tell

    named = models if models is not None else read_settings(DoctorSettings).models
    try:
        return tell(models_of(named, strict=models is not None), cards_of(gpu, run_command), as_json=as_json)
    except ValueError as error:
        fail(f"--models: {error}")


def _start_for_one_job(cleanup: ExitStack) -> str:
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-", ignore_cleanup_errors=True)))
    settings = read_settings(StackSettings, data_dir=folder, host="127.0.0.1", port=0, grace_s=5)
    stack = cleanup.enter_context(Stack(settings, lambda line: typer.echo(line, err=True), alone=True))
    stack.wait_ready()
    return stack.url


def _require(role: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        fail(f"the {role} needs {', '.join(missing)}: pip install 'darkroom[{role}]'")


def _checked(key: str | None) -> str | None:
    """The key if it can be one; what is said of it if not does not repeat it."""
    key = (key or "").strip()
    if key and parse_key(key) is None:
        fail("what was given as an API key is none, or not all of it: keys look like dr_<12 digits>_<43 characters>")
    return key or None


def _program(started_as: str, path: str | None = None) -> str:
    """What a shell calls this command by; path: other than PATH."""
    return "darkroom" if shutil.which("darkroom", path=path) else started_as


def _curl(url: str, model: str, *, keys_on: bool) -> str:
    key = '    -H "authorization: Bearer $DARKROOM_API_KEY" \\\n' if keys_on else ""
    return (
        f"  curl -s {url}/v1/generations -H 'content-type: application/json' -H 'prefer: wait=60' \\\n{key}"
        f'    -d \'{{"model": "{model}", "prompt": "a red circle on a blue background"}}\''
    )


if __name__ == "__main__":
    main()
