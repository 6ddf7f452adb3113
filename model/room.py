"""Whether weights fit into memory, said before any is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.memory import free_on_host, gigabytes


class NoRoom(OSError):
    """The weights do not fit: says how many bytes are needed for what, and how many are free."""

    def __init__(self, message: str, needs: Mapping[str, int], device: torch.device, free: int) -> None:
        """needs: bytes by net; free: bytes on the device."""
        super().__init__(message)
        self.needs, self.device, self.free = needs, device, free


def check_room(needs: Mapping[str, int], device: torch.device, free: int | None) -> None:
    """Refuse weights of so many bytes, by net, where fewer are free; None: nobody knows. NoRoom."""
    needed = sum(needs.values())
    if free is not None and needed > free:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in needs.items())
        message = f"its weights need {gigabytes(needed)} of memory on {device} ({parts})"
        raise NoRoom(f"{message}, and {gigabytes(free)} are free", needs, device, free)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device for who asks now; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_on_host()
