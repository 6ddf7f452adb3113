"""The fast way to follow a guided teacher; its plain twin is `windows.guided`."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor

from model.choices import choice_of
from model.fast_mmdit import FastMMDiT
from model.graphs import CudaRecorder, Graphs
from model.training.teacher import Teacher, Texts
from model.training.windows import Window, guided, with_empty


class Guide:
    """Leads latents where a guided teacher's ODE does: on CUDA as pictures are made there, in bf16, by CUDA graphs.

    Plainly a distillation's time is its teacher's: with guidance two passes for each of its steps in a window.
    """

    def __init__(self, teacher: Teacher, scale: float, fast: bool | None = None) -> None:
        """scale: of the guidance; fast: whether the fast way is gone; absent: on CUDA it is."""
        self.teacher, self.scale = teacher, scale
        device = teacher.mmdit.pos_embed.device
        on_gpu = device.type == "cuda"
        self.fast = None
        if on_gpu if fast is None else fast:
            own = copy.deepcopy(teacher.mmdit)  # the student is a change of the fp32 weights
            self.fast = FastMMDiT(own.to(torch.bfloat16) if on_gpu else own)
        self.graphs = Graphs(CudaRecorder(device)) if on_gpu else None

    @torch.no_grad()
    def __call__(self, x: Tensor, window: Window, texts: Texts) -> Tensor:
        """From the window's start to its end, by Euler's method. x : shape = (batch, 16, h/8, w/8), fp32."""
        if self.fast is None:
            return guided(self.teacher, x, window, texts, self.scale)
        if self.scale > 1:
            texts = with_empty(texts, self.teacher)
        for sigma, after in pairwise(window.sigmas):
            inputs = x, x.new_full((), sigma), x.new_full((), after - sigma), texts.context, texts.pooled
            key = (x.shape, texts.context.shape)
            x = self._step(*inputs) if self.graphs is None else self.graphs.run(key, self._step, *inputs)
        return x

    def _step(self, x: Tensor, sigma: Tensor, change: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """x a step of sigma on; with guidance the texts have two rows for each of x."""
        fast, rows = self.fast, len(pooled)
        assert fast is not None
        taken = x.to(fast.mmdit.context_embedder.weight.dtype).repeat(rows // len(x), 1, 1, 1)
        modulation = fast.modulation(sigma.expand(rows), pooled)
        v = fast(taken, modulation, fast.embed(context), choice_of(fast, taken)).float()
        if rows > len(x):
            v, v_empty = v.chunk(2)
            v = v_empty + self.scale * (v - v_empty)
        return x + change * v
