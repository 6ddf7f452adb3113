"""Whether weights fit into memory, said before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


class NoRoom(OSError):
    """The weights do not fit: says how many bytes are needed for what, and how many are free."""


def check_room(needs: Mapping[str, int], device: torch.device, free: int | None) -> None:
    """Refuse weights of so many bytes, by net, where fewer are free; None: nobody knows. NoRoom."""
    needed = sum(needs.values())
    if free is not None and needed > free:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in needs.items())
        raise NoRoom(f"its weights need {_gb(needed)} of memory on {device} ({parts}), and {_gb(free)} are free")


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device for who asks now; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
