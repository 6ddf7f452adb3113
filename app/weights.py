"""A model's files on this machine: which of a repository they are, brought here whole, or told to be wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from app.hub import DiskFailed, FetchFailed, Hub, RemoteFile, WrongSum
from model.memory import gigabytes

STREAMS = 4
"""Files that are fetched at a time: one connection seldom fills the line."""

SPARE_BYTES = 2**26
STATE = ".fetch"
INDEX = "model_index.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_CHUNK_BYTES = 2**22

NETS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
PLAIN = re.compile(
    rf"{re.escape(INDEX)}|darkroom\.json|LICENSE[A-Za-z.]*|scheduler/scheduler_config\.json"
    rf"|tokenizer(_[23])?/\w[\w.-]*\.(json|txt|model)|({'|'.join(NETS)})/config\.json"
)
"""What is loaded beside weights, and the licence that must stay with them."""


class Meter(Protocol):
    """Who is shown how far it is. Called by several threads."""

    def begin(self, doing: str, total: int) -> None:
        """So many bytes are ahead."""
        ...

    def advance(self, count: int) -> None:
        """So many more are done."""
        ...

    def say(self, line: str) -> None:
        """Something happened."""
        ...


def needed(files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files of a diffusers folder that a worker loads: no second layout, no twin of another precision, no pickle.

    The choice is the worker's own (model/layouts.py). FetchFailed if something that it cannot do without is missing.
    """
    by_path = {file.path: file for file in files}
    if INDEX not in by_path:
        raise FetchFailed(f"the repository has no {INDEX}: no diffusers folder, which is what can be fetched")
    chosen = [path for path in by_path if PLAIN.fullmatch(path)]
    for folder, stem in NETS.items():
        names = {path.removeprefix(f"{folder}/") for path in by_path if path.startswith(f"{folder}/")}
        if names or folder != "text_encoder_3":
            chosen += [f"{folder}/{name}" for name in _weights(folder, stem, names)]
    return tuple(by_path[path] for path in sorted(chosen))


def _weights(folder: str, stem: str, names: set[str]) -> list[str]:
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    indices = sorted(name for name in names if re.fullmatch(r"[\w.-]+\.safetensors\.index[\w.-]*\.json", name))
    singles = sorted(name for name in names if re.fullmatch(r"\w[\w.-]*\.safetensors", name))
    found = [name for name in (single, index) if name in names][:1] or indices or singles
    if len(found) != 1:
        held = ", ".join(sorted(names)) or "nothing"
        raise FetchFailed(f"{folder} of the repository holds {held}; allowed: {single}, or its index and shards")
    if found[0].endswith(".safetensors"):
        return found
    twin = found[0].partition(".safetensors.index")[2].removesuffix(".json")  # such as .fp16
    shard = re.compile(rf"{re.escape(stem + twin)}-\d{{5}}-of-(\d{{5}})\.safetensors")
    shards = [match for name in sorted(names) if (match := shard.fullmatch(name))]
    if not shards or len(shards) != int(shards[0][1]):
        raise FetchFailed(f"{folder} of the repository has {len(shards)} shards, not as many as their names say")
    return [found[0], *(match[0] for match in shards)]


@dataclass(frozen=True)
class Record:
    """What a folder holds, or shall hold once it is complete."""

    repo: str
    revision: str  # as it was asked for
    commit: str
    files: tuple[RemoteFile, ...]
    written: dict[str, int] | None = None  # when each file was, by path, in nanoseconds; None: not complete

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record of its JSON."""
        said = json.loads(text)
        return cls(**(said | {"files": tuple(RemoteFile(**file) for file in said["files"])}))


class ModelFolder:
    """A folder of one model. What is under way lies in its `.fetch`; files get their names once all are here and right.

    Of another revision names and shapes are the same, so a worker that started among files of both would not notice.
    While files get their names the record says that the folder is not complete, and no worker loads it
    (model/layouts.py).

    Two processes may fetch into it: the second waits. Where the file system has no locks both write the same bytes
    at the same places.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._state = root, root / STATE

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Alone with the folder, which is made if need be; `waiting` is called if another has it now. DiskFailed."""
        with self._writing():
            self._state.mkdir(parents=True, exist_ok=True)
            lock = (self._state / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise DiskFailed(f"{self._state / 'lock'} cannot be locked: {error.strerror}") from None
            yield

    def record(self) -> Record | None:
        """What was fetched here, or begun; None if nothing."""
        try:
            return Record.from_json((self._state / "record.json").read_text())
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def note(self, record: Record, *, complete: bool) -> None:
        """Writes the record; of a complete folder with the times of its files, so that they need not be read again."""
        fresh, times = self._state / "record.json.new", None
        with self._writing():
            if complete:
                times = {file.path: (self.root / file.path).stat().st_mtime_ns for file in record.files}
            with fresh.open("w") as file:
                file.write(json.dumps(asdict(replace(record, written=times)), indent=1))
                file.flush()
                os.fsync(file.fileno())  # also after a power cut it says no more than is true
            fresh.replace(self._state / "record.json")

    def untouched(self, record: Record) -> bool:
        """Whether every file is as it was when the folder was complete, by size and time."""
        return record.written is not None and all(self._as_written(record, file) for file in record.files)

    def missing(self, files: Sequence[RemoteFile], meter: Meter, known: Record | None = None) -> list[RemoteFile]:
        """The files that are not here, or other than listed; all are read but those that `known` vouches for."""
        vouched = [file for file in known.files if self._as_written(known, file)] if known else []
        doubtful = [file for file in files if file not in vouched]
        present = [file for file in doubtful if self._size(file) == file.size]
        if present:
            meter.begin("checking", sum(file.size for file in present))
        right = {file for file in present if self._sum(file, meter) == file.sum}
        return [file for file in doubtful if file not in right]

    def may_serve(self, known: Record | None) -> bool:
        """Whether a worker might load what is here: it is complete, or it is here without a record."""
        if known:
            return known.written is not None
        return any(path.name != STATE for path in self.root.iterdir())

    def promise(self, record: Record, known: Record | None) -> None:
        """From now on the folder is not complete and shall hold the record; what `known` alone has is removed."""
        if known:
            self.note(known, complete=False)  # should this break off, it still names all that is to be removed
        paths = {file.path for file in record.files}
        with self._writing():
            for file in known.files if known else ():
                if file.path not in paths:  # a loader might take it for one of the record's
                    (self.root / file.path).unlink(missing_ok=True)
        self.note(record, complete=False)

    def put_in_place(self, record: Record, arrived: Sequence[RemoteFile], known: Record | None) -> None:
        """Makes what arrived and what is here already the record's folder, as fast as renaming goes. DiskFailed."""
        with self._writing():
            for file in arrived:
                (self.root / file.path).parent.mkdir(parents=True, exist_ok=True)
        self.promise(record, known)
        with self._writing():
            for file in arrived:
                self._name(file)
        self.note(record, complete=True)

    def _name(self, file: RemoteFile) -> None:
        target = self.root / file.path
        try:
            self._part(file).replace(target)
        except FileNotFoundError:
            if not target.exists():  # where there are no locks another fetch may have put it there
                raise

    def path_of(self, file: RemoteFile) -> Path:
        """Where the bytes of a file are that has arrived, or was here."""
        part = self._part(file)
        return part if part.exists() else self.root / file.path

    def tidy(self, missing: Sequence[RemoteFile]) -> None:
        """Removes what had arrived of files that are not missing (any more)."""
        begun = {self._part(file) for file in missing}
        with self._writing():
            for part in set(self._state.glob("*.part")) - begun:
                part.unlink(missing_ok=True)

    def require_room(self, files: Sequence[RemoteFile], free: Callable[[Path], int] | None = None) -> None:
        """Returns if the files fit on the disk, beside what is here of them and those that they replace. DiskFailed."""
        begun = sum(part.stat().st_size for file in files if (part := self._part(file)).exists())
        ahead = sum(file.size for file in files) - begun
        room = (free or _free)(self.root)
        if ahead and ahead + SPARE_BYTES > room:
            raise DiskFailed(f"{gigabytes(ahead)} are still to come, and {self.root} has {gigabytes(room)} free")

    def receive(self, hub: Hub, record: Record, files: Sequence[RemoteFile], meter: Meter) -> None:
        """Brings the files, several at a time, not yet to their places. FetchFailed; what has arrived by then stays."""
        with ThreadPoolExecutor(STREAMS) as pool:
            largest_first = sorted(files, key=lambda file: -file.size)
            arriving = [pool.submit(self._receive, hub, record, file, meter) for file in largest_first]
            try:
                for arrived in as_completed(arriving):
                    arrived.result()
            except BaseException:
                hub.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _receive(self, hub: Hub, record: Record, file: RemoteFile, meter: Meter) -> None:
        """Brings one file. If its first part is from an earlier run and the sum is wrong, once more from the start."""
        part = self._part(file)
        with self._writing():
            resumed = part.exists()
            if not (right := self._receive_part(hub, record, file, meter)) and resumed:
                part.unlink()
                meter.advance(-file.size)
                right = self._receive_part(hub, record, file, meter)
            if not right:
                part.unlink(missing_ok=True)
                raise WrongSum(
                    f"{file.path} arrived with other bytes than {hub.endpoint} lists ({file.size} bytes, {file.sum})"
                    " and was thrown away: is there something between here and there that changes it?"
                )
        meter.say(f"{file.path}, {gigabytes(file.size)}")

    def _receive_part(self, hub: Hub, record: Record, file: RemoteFile, meter: Meter) -> bool:
        """Brings what is missing of the part; whether its sum is right then."""
        hasher = file.hasher()
        with os.fdopen(os.open(self._part(file), os.O_RDWR | os.O_CREAT, 0o666), "r+b") as part:
            if os.fstat(part.fileno()).st_size > file.size:
                part.truncate(0)
            while chunk := part.read(_CHUNK_BYTES):
                hasher.update(chunk)
                meter.advance(len(chunk))

            def go_on() -> None:
                with hub.open(record.repo, record.commit, file, part.tell()) as chunks:
                    for chunk in chunks:
                        part.write(chunk)
                        hasher.update(chunk)
                        meter.advance(len(chunk))

            if part.tell() < file.size:
                hub.patiently(go_on, progress=part.tell)
            part.flush()
            os.fsync(part.fileno())
            return part.tell() == file.size and hasher.hexdigest() == file.sum

    def _part(self, file: RemoteFile) -> Path:
        return self._state / f"{file.path.replace('/', '--')}.{file.sum[:16]}.part"  # files of one sum are several

    def _as_written(self, record: Record, file: RemoteFile) -> bool:
        with suppress(OSError):
            found = (self.root / file.path).stat()
            return found.st_size == file.size and found.st_mtime_ns == (record.written or {}).get(file.path)
        return False

    def _size(self, file: RemoteFile) -> int | None:
        with suppress(OSError):
            return (self.root / file.path).stat().st_size
        return None

    def _sum(self, file: RemoteFile, meter: Meter) -> str:
        hasher = file.hasher()
        try:
            with (self.root / file.path).open("rb") as source:
                while chunk := source.read(_CHUNK_BYTES):
                    hasher.update(chunk)
                    meter.advance(len(chunk))
        except OSError as error:
            raise DiskFailed(f"{self.root / file.path} cannot be read: {error.strerror}") from None
        return str(hasher.hexdigest())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise DiskFailed(f"the disk of {self.root} is full; the same command goes on from there") from None
            raise DiskFailed(f"{self.root} cannot be written to: {error.strerror or error}") from None


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
