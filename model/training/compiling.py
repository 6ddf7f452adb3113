"""What torch.compile made, kept between legs: a fresh machine then starts in seconds instead of minutes."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from model.training.loop import SHARD_BYTES, Log

LIMIT_BYTES = 3 * SHARD_BYTES
PART = "compiled-{:03d}.bin"


def load_compiled(folder: Path | None, log: Log) -> None:
    """Give the compiler what an earlier leg left. It is code that will run: use only folders of your own."""
    parts = sorted(folder.glob(PART.replace("{:03d}", "*"))) if folder else []
    if not parts:
        return
    try:
        found = torch.compiler.load_cache_artifacts(zlib.decompress(b"".join(part.read_bytes() for part in parts)))
    except Exception as problem:  # another version, another machine, half a file: compiling anew is only slower
        log.say(f"compiling anew: {type(problem).__name__}: {str(problem)[:200]}")
        return
    log.say(f"compiled before: {'nothing that fits' if found is None else f'{len(parts)} files of {folder}'}")


def save_compiled(folder: Path | None, log: Log) -> None:
    """Leave what was compiled in a folder, as files below 16 MiB; nothing if it is more than three of them."""
    if not folder:
        return
    try:
        artifacts = torch.compiler.save_cache_artifacts()
    except Exception as problem:  # the compiler's own affair; the trained weights are safe already
        log.say(f"what was compiled is not kept: {type(problem).__name__}: {str(problem)[:200]}")
        return
    data = zlib.compress(artifacts[0], 6) if artifacts else b""
    if not data or len(data) > LIMIT_BYTES:
        log.say(f"what was compiled is not kept: {len(data):,} bytes, at most {LIMIT_BYTES:,} are")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(PART.replace("{:03d}", "*")):
        old.unlink()
    for n, start in enumerate(range(0, len(data), SHARD_BYTES), 1):
        (folder / PART.format(n)).write_bytes(data[start : start + SHARD_BYTES])
    log.say(f"{folder}: {len(data):,} bytes of what was compiled")
