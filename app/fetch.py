"""`darkroom fetch`: a model from the Hugging Face Hub into a folder, whole and checked, ready to be served."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from app.hub import PUBLIC, FetchFailed, Hub, HubAway, NotAllowed, WrongSum
from app.weights import INDEX, ModelFolder, Record, needed
from model.memory import gigabytes

REPOSITORIES = {
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
}
"""Where the models are that Darkroom knows by name."""

LATEST = "main"
PLAIN_EVERY_S = 10.0
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class FetchRequest:
    """What the command line asks for."""

    model: str  # a name of REPOSITORIES, or owner/name
    to: Path
    revision: str | None = None  # None: what the folder holds, else LATEST
    check: bool = False  # only look

    @property
    def repo(self) -> str:
        """The repository. FetchFailed."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        repo = REPOSITORIES.get(self.model, self.model)
        try:
            validate_repo_id(repo)
        except HFValidationError:
            repo = ""
        if repo.count("/") != 1:
            allowed = f"{', '.join(REPOSITORIES)}, or owner/name of a repository"
            raise FetchFailed(f"the model is {self.model!r}; allowed: {allowed}")
        return repo

    @property
    def served_name(self) -> str:
        """What the model is called in DARKROOM_MODELS."""
        for name, repo in REPOSITORIES.items():
            if self.model in (name, repo):
                return name
        name = re.sub(r"[^a-z0-9._-]", "-", self.model.rpartition("/")[2].lower()).lstrip("._-")
        return name[:64] or "model"


def connect(env: Mapping[str, str], token_file: Path | None, say: Callable[[str], None]) -> Hub:
    """The hub of HF_ENDPOINT, with a token from that file, HF_TOKEN or huggingface's own login. FetchFailed.

    say: is told when the hub is waited for.
    """
    from huggingface_hub.utils import get_token

    endpoint = env.get("HF_ENDPOINT", "").strip() or PUBLIC
    if not re.fullmatch(r"https?://\S+", endpoint):
        raise FetchFailed(f"HF_ENDPOINT is {endpoint!r}; allowed: a url, such as {PUBLIC}")
    return Hub(endpoint, _token_in(token_file) if token_file else get_token(), say)


def fetch(request: FetchRequest, hub: Hub, meter: TerminalMeter) -> Record:
    """Brings the folder to what the hub lists, or with `check` only looks; what it holds then. FetchFailed."""
    if "," in str(request.to):
        raise FetchFailed(
            f"--to is {str(request.to)!r}; allowed: a path without commas, for DARKROOM_MODELS has commas"
        )
    folder, repo = ModelFolder(request.to.expanduser().absolute()), request.repo
    if request.check:
        return _check(request, repo, folder, hub, meter)
    known = _known(folder, repo)
    if known and request.revision in (None, known.commit) and folder.untouched(known):  # asks for no right to write
        return _complete(known, folder, meter)
    with folder.locked(lambda: meter.say(f"another fetch into {folder.root} is under way; waiting for it")):
        return _bring(request, repo, folder, hub, meter)


def _bring(request: FetchRequest, repo: str, folder: ModelFolder, hub: Hub, meter: TerminalMeter) -> Record:
    known = _known(folder, repo)
    wanted = _wanted(request, repo, known, hub)
    if known and known.files == wanted.files and folder.untouched(known):
        return _complete(known, folder, meter)
    missing = folder.missing(wanted.files, meter, known)
    folder.tidy(missing)
    folder.require_room(missing)
    meter.begin("fetching", sum(file.size for file in missing))
    index = next(file for file in wanted.files if file.path == INDEX)
    folder.receive(hub, wanted, [file for file in missing if file == index], meter)
    _require_servable(folder.path_of(index), repo)  # before the many gigabytes
    if not folder.may_serve(known):
        folder.promise(wanted, known)  # so that the next fetch goes on with this commit
    folder.receive(hub, wanted, [file for file in missing if file != index], meter)
    folder.put_in_place(wanted, missing, known)
    return wanted


def _complete(known: Record, folder: ModelFolder, meter: TerminalMeter) -> Record:
    meter.say(f"{folder.root} is complete since it was fetched; --check reads it all again")
    return known


def _require_servable(index: Path, repo: str) -> None:
    try:
        kind = str(json.loads(index.read_text("utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FetchFailed(f"{INDEX} of {repo} tells of no pipeline: {error!r}") from None
    if not kind.startswith("StableDiffusion3"):
        raise FetchFailed(f"{repo} is a {kind}; Darkroom serves StableDiffusion3Pipeline alone")


def _check(request: FetchRequest, repo: str, folder: ModelFolder, hub: Hub, meter: TerminalMeter) -> Record:
    """Reads every file and compares it with the hub's listing; where the hub is away, with what it listed then."""
    known = _known(folder, repo)
    revision = request.revision or (known.commit if known else LATEST)
    try:
        wanted = _listed(repo, revision, hub)
    except (HubAway, NotAllowed) as error:
        if known is None or request.revision not in (None, known.commit):
            raise
        meter.say(f"{error}; compared with what it listed when this was fetched")
        wanted = known
    wrong = folder.missing(wanted.files, meter)
    if wrong:
        there = {file: "is wrong" if (folder.root / file.path).exists() else "is missing" for file in wrong}
        what = ", ".join(f"{file.path} {state}" for file, state in there.items())
        raise WrongSum(f"{folder.root}: {what}; the same command without --check mends that")
    return wanted


def _known(folder: ModelFolder, repo: str) -> Record | None:
    known = folder.record()
    if known and known.repo != repo:
        raise FetchFailed(f"{folder.root} holds {known.repo}; name another folder for {repo}")
    return known


def _wanted(request: FetchRequest, repo: str, known: Record | None, hub: Hub) -> Record:
    """What the folder shall hold. The hub is asked only if that is not known: pods start while it is away, too."""
    if known and request.revision in (None, known.commit):
        return known
    return _listed(repo, request.revision or LATEST, hub)


def _listed(repo: str, revision: str, hub: Hub) -> Record:
    listing = hub.listing(repo, revision)
    return Record(repo, revision, listing.commit, needed(listing.files))


def told(request: FetchRequest, record: Record) -> str:
    """What the worker needs to serve it."""
    weights = [file for file in record.files if file.path.endswith(".safetensors")]
    t5 = sum(file.size for file in weights if file.path.startswith("text_encoder_3/"))
    size = gigabytes(sum(file.size for file in weights))
    without = f" ({gigabytes(t5)} less with DARKROOM_T5=no)" if t5 else ""
    lines = [
        f"{record.repo} at commit {record.commit}: {len(record.files)} files, every sum right.",
        f"`darkroom worker` needs the line below, the packages of darkroom[worker], and {size} of memory for the"
        f" weights{without} and a few more to work in, on an NVIDIA GPU to be of use; `darkroom doctor` looks.",
    ]
    if request.served_name not in REPOSITORIES:
        lines.append("Weights distilled as Large Turbo is must say so: NAME:large-turbo=PATH.")
    return "\n".join(lines)


def models_line(request: FetchRequest) -> str:
    """The setting by which a worker serves it."""
    return f"DARKROOM_MODELS={request.served_name}={request.to.expanduser().absolute()}"


class TerminalMeter:
    """A `weights.Meter` on standard error: a bar on a terminal, else a line now and then. A context manager."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._console = console or Console(stderr=True, markup=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._doing, self._total, self._done, self._began, self._said = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, doing: str, total: int) -> None:
        """So many bytes are ahead."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(doing, total=total)
        self._doing, self._total, self._done = doing, total, 0
        self._began = self._said = self._clock()
        if total and not self._console.is_terminal:
            self.say(f"{doing} {gigabytes(total)}")

    def advance(self, count: int) -> None:
        """So many more are done."""
        assert self._task is not None, "begin comes first"
        self._bars.advance(self._task, count)
        with self._lock:
            self._done += count
            now = self._clock()
            if self._console.is_terminal or now - self._said < PLAIN_EVERY_S:
                return
            self._said = now
            rate = self._done / (now - self._began)
        self.say(f"{self._doing}: {gigabytes(self._done)} of {gigabytes(self._total)}, {gigabytes(int(rate))}/s")

    def say(self, line: str) -> None:
        """Something happened."""
        if self._console.is_terminal:
            self._bars.console.print(line, highlight=False, soft_wrap=True)
        else:
            typer.echo(line, err=True)
            sys.stderr.flush()


def _token_in(path: Path) -> str:
    try:
        token = path.expanduser().read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise NotAllowed(
            f"the token's file {path} cannot be read: {getattr(error, 'strerror', 'it is no text')}"
        ) from None
    if not _TOKEN.fullmatch(token):
        raise NotAllowed(f"the token's file {path} holds no token: one line such as hf_... is expected")
    return token
