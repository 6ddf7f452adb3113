"""Where pictures are kept: by key, atomically, for a while. Redis holds words, never pixels."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import structlog
from structlog.typing import FilteringBoundLogger

from worker.contract.errors import CannotStart, StoreUnavailable
from worker.contract.job import OutputFormat
from worker.contract.settings import ContractSettings

OURS = re.compile(r"gen_[^/]+/[^/]+/[0-9]+\.(png|jpeg|webp)")
"""Keys as `picture_key` makes them: whatever else lies where the pictures are is not ours to delete."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_MAX_KEY = 512
_TEMPORARY = ".tmp-"
_LEFTOVER = re.compile(r"\.tmp-[a-z0-9_]{8}")  # as mkstemp names it
_FOLDER = re.compile(r"gen_[^/]+(/[^/]+)?")  # of a job, and of one of its executions
_MODE = 0o640
"""The gateway may be another user of the worker's group."""
_MEANWHILE = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY)
"""Another process removed the folder that this one moves a picture into, or filled the one that this one removes."""
_TRIES = 100


def picture_key(job_id: str, execution: str, n: int, format: OutputFormat) -> str:
    """The key of picture `n` as one execution of a job stores it."""
    return f"{job_id}/{execution}/{n}.{format}"


class PictureStore(Protocol):
    """Bytes by key. Every method raises StoreUnavailable when the store does not answer, ValueError for no key."""

    @property
    def origin(self) -> str | None:
        """Scheme, host and port of the urls that `link` gives; None: it gives none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Keeps the bytes; whoever reads sees all of them or none."""
        ...

    def get(self, key: str) -> bytes | None:
        """The bytes, or None if there are none (any more)."""
        ...

    def link(self, key: str, expires_s: float) -> str | None:
        """A url at which anybody gets the bytes for so long; None if there are none, or if only we can give them."""
        ...

    def delete_prefix(self, prefix: str) -> None:
        """Forgets everything under the leading segments of a key: of a job, or of one of its executions."""
        ...

    def sweep(self, older_than_s: float) -> int:
        """Forgets what was put longer ago than that; returns how many."""
        ...

    def check(self) -> None:
        """Returns if the store answers us, and leaves nothing there. A folder: if pictures can be written."""
        ...


def open_store(settings: ContractSettings, log: FilteringBoundLogger | None = None) -> PictureStore:
    """The store that the settings name: a bucket if there is one, else the folder. CannotStart."""
    if settings.s3_bucket is None:
        return FolderStore(settings.store_dir, log)
    try:
        from worker.contract.s3 import S3Store  # with it comes obstore
    except ImportError:
        mend = "pip install 'darkroom[s3]'"
        raise CannotStart(
            f"DARKROOM_S3_BUCKET is set, and obstore, which speaks S3, is not installed: {mend}"
        ) from None
    return S3Store(settings)


def check_key(key: str) -> str:
    """The key, if it is one; ValueError if not."""
    if len(key) > _MAX_KEY or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(f"picture key is {key!r}; allowed: letters, digits, '.', '_' and '-', joined by '/'")
    return key


class FolderStore:
    """A PictureStore in a folder that gateway and worker share; keys are paths in it."""

    origin = None

    def __init__(self, root: Path, log: FilteringBoundLogger | None = None) -> None:
        self._root = root.expanduser().absolute()
        self._log: FilteringBoundLogger = log or structlog.get_logger()

    def put(self, key: str, data: bytes) -> None:
        """Writes beside the place, then moves there: a reader never sees half a picture."""
        path = self._path(key)
        with _reaching_folder():
            temporary = self._temporary()
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fchmod(file.fileno(), _MODE)
                    os.fsync(file.fileno())
                _persist(lambda: _move(temporary, path))
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise

    def get(self, key: str) -> bytes | None:
        """The bytes of the file, or None."""
        path = self._path(key)
        with _reaching_folder():
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def link(self, key: str, expires_s: float) -> None:
        """None: a folder has no urls."""

    def delete_prefix(self, prefix: str) -> None:
        """Removes the folder or file that the segments name; nothing there is no error."""
        path = self._path(prefix.removesuffix("/"))
        with _reaching_folder(), suppress(NotADirectoryError):
            _persist(lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True))

    def sweep(self, older_than_s: float) -> int:
        """Removes pictures last written longer ago than that, and folders of ours that are empty then; nothing else.

        What may not be removed is passed over.
        """
        limit = time.time() - older_than_s
        swept, refused = 0, list[PermissionError]()
        with _reaching_folder():
            folders, files = self._ours()
            for file in files:
                try:
                    swept += self._remove_if_older(file, limit)
                except PermissionError as error:
                    refused.append(error)
            for folder in reversed(folders):
                with suppress(OSError):  # not empty
                    folder.rmdir()
        if refused:
            self._log.warning("expired pictures cannot be removed", files=len(refused), cause=str(refused[0]))
        return swept

    def check(self) -> None:
        """Writes and removes an empty file."""
        with _reaching_folder():
            self._temporary().unlink()

    def _ours(self) -> tuple[list[Path], list[Path]]:
        """Folders of ours, each before those in it; and files: pictures, and what a put that died has left."""
        folders, files = list[Path](), list[Path]()
        for place, below, names in os.walk(self._root):
            within = "" if Path(place) == self._root else f"{Path(place).relative_to(self._root)}/"
            below[:] = [name for name in below if _FOLDER.fullmatch(within + name)]  # others are not entered
            folders += [Path(place, name) for name in below]
            files += [Path(place, name) for name in names if _is_ours(within + name)]
        return folders, files

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _temporary(self) -> Path:
        """A new file, where no deletion of a prefix finds it."""
        self._root.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._root)
        os.close(handle)
        return Path(path)

    @staticmethod
    def _remove_if_older(path: Path, limit: float) -> int:
        with suppress(FileNotFoundError):
            if path.lstat().st_mtime < limit:
                path.unlink()
                return 0 if path.name.startswith(_TEMPORARY) else 1
        return 0


def _is_ours(path: str) -> bool:
    return bool(OURS.fullmatch(path) or _LEFTOVER.fullmatch(path))


def _move(temporary: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, path)


def _persist(action: Callable[[], None]) -> None:
    for tries_left in reversed(range(_TRIES)):
        try:
            return action()
        except OSError as error:
            if error.errno not in _MEANWHILE or not tries_left:
                raise


@contextmanager
def _reaching_folder() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable((error.strerror or type(error).__name__).lower()) from error
