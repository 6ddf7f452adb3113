"""Nets whose weights wait in the host's memory and visit the GPU layer by layer, each while it runs.

A layer costs its way over the bus each time: T5 half a second, of which the GPU's memory sees 0.4 GB at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; every tensor begins as if it were allocated by itself


def offload(net: nn.Module, device: torch.device) -> None:
    """Keep the weights of a net that is on the CPU there, and run it on the device. Buffers move there at once."""
    layers: dict[tuple[int, ...], _Layer] = {}
    for module in list(_layers(net)):
        parameters = list(module.parameters())
        key = tuple(map(id, parameters))
        if key not in layers:  # T5's embedding is a tensor of two modules
            layers[key] = _Layer(parameters, device)
        layers[key].follow(module)
    for module in net.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


class _Layer:
    """The weights of one layer, side by side in one piece of memory, so that one copy moves them."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        self.parameters, self.device = parameters, device
        self._starts: list[int] = []
        end = 0
        for parameter in parameters:
            self._starts.append(end)
            end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self.home = torch.empty(end, dtype=torch.uint8)
        views = self._views(self.home)
        for parameter, view in zip(parameters, views, strict=True):
            view.copy_(parameter.data)
        self._at(self.home)
        if device.type == "cuda":
            _pin(self.home)

    def follow(self, module: nn.Module) -> None:
        """Be on the device while the module runs, also where that fails."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self._at(torch.empty_like(self.home, device=self.device).copy_(self.home, non_blocking=True))

    def _leave(self, *_: Any) -> None:
        # Freed in the order of the stream: nobody gets this memory before the layer has run.
        self._at(self.home)

    def _at(self, memory: Tensor) -> None:
        for parameter, view in zip(self.parameters, self._views(memory), strict=True):
            parameter.data = view

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + p.nbytes].view(p.dtype).view(p.shape)
            for start, p in zip(self._starts, self.parameters, strict=True)
        ]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """What runs at once: the members of the outermost lists, and whatever else has weights of its own."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(True for _ in child.parameters(recurse=False)):
            yield child
        else:
            yield from _layers(child)


def _pin(memory: Tensor) -> None:
    """Lets the GPU read the memory by itself; where that is refused, copies are only slower.

    Memory that torch allocates pinned is rounded up to a power of two: for T5 3 GB more.
    """
    driver: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    if int(driver.cudaHostRegister(address, memory.nbytes, 0)) == 0:
        weakref.finalize(memory, driver.cudaHostUnregister, address).atexit = False
