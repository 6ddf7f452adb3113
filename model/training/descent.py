"""Steps of an optimizer with two ways back: to the last weights whose loss was a number, and out of torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from model.graphs import CudaRecorder, Graphs
from model.training import team
from model.training.loop import Average, Leg, finite

Result = TypeVar("Result")


class Descent:
    """Moves the weights that an average follows; on a GPU by CUDA graphs, as a small net's kernels are soon launched.

    make : the optimizers for a peak of the learning rate
    """

    def __init__(
        self, average: Average, leg: Leg, peak: float, make: Callable[[float], list[torch.optim.Optimizer]]
    ) -> None:
        self.average, self.leg, self.peak, self._make = average, leg, peak, make
        team.share([*average.live, *average.values])
        self.optimizers = make(peak)
        self.steps, self.last_loss = 0, float("nan")
        self.compiled = True
        self.graphs = self._new_graphs()

    def _new_graphs(self) -> Graphs | None:
        """One for each size's forward and backward pass, and one for the optimizers."""
        return Graphs(CudaRecorder(self.leg.device, warm=False), limit=16) if self.leg.on_gpu else None

    def gradients(
        self, key: Hashable, loss_of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """What `loss_of` gives, the loss first, and in the weights its gradients; by a CUDA graph where possible.

        key : stands for the function and the shapes of its inputs
        """

        def work(*given: Tensor) -> tuple[Tensor, ...]:
            self.forget_gradients()
            with self.leg.autocast():
                found = loss_of(*given)
            found[0].backward()  # type: ignore[no-untyped-call]
            return tuple(part.detach() for part in found)

        # Asked for anew in a second attempt, which has none.
        return self.attempt(lambda: work(*inputs) if self.graphs is None else self.graphs.run(key, work, *inputs))

    def forget_gradients(self) -> None:
        """Zeros, in place: a graph writes to the same tensors always."""
        held = [p.grad for p in self.average.live if p.grad is not None]
        if held:
            torch._foreach_zero_(held)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A whole run of one process is not lost to an error late in it: the weights are then the last good ones."""
        try:
            yield
        except Exception as problem:
            if not self.average.kept or team.size() > 1:  # of several processes the others wait: all must end
                raise
            self.leg.log.say(f"stopped early: {type(problem).__name__}: {str(problem)[:600]}")
            self.average.go_back()

    def attempt(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; without torch.compile from the moment on at which that fails."""
        try:
            return work()
        except Exception as problem:  # a compiler's errors have no common type; without it the run is only slower
            if not self.compiled:
                raise
            self.leg.log.say(f"going on without torch.compile: {type(problem).__name__}: {str(problem)[:300]}")
        self.compiled, self.graphs = False, None
        torch.compiler.set_stance("force_eager")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return work()

    def step(self, rate: float) -> None:
        """From gradients, which are used up, to the next weights and their average. rate: the learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        self.apply_gradients()
        self.average.update()
        self.steps += 1

    def apply_gradients(self) -> None:
        """The part of a step that the optimizers do."""
        team.average([p.grad for p in self.average.live if p.grad is not None])
        if self.graphs is None:
            self._move()
        else:
            self.graphs.run("optimizers", self._move)

    def _move(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.average.live, 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def report(self, loss: float, **figures: float) -> None:
        """Logs how it goes. Where the loss is no number: back to when it was, with half the learning rate."""
        loss = team.mean(loss)
        team.share([*self.average.live, *self.average.values])  # rounding may differ from one GPU to the next
        rate = float(self.optimizers[0].param_groups[0]["lr"])
        self.leg.log.row(step=self.steps, **figures, loss=loss, lr=rate)
        if finite([loss]):
            self.last_loss = loss
            self.average.keep()
            return
        if not self.average.kept:
            raise FloatingPointError(f"the loss is {loss} after {self.steps} steps: lower the learning rate")
        self.peak /= 2
        self.leg.log.say(f"the loss is {loss}: back to the last good weights with half the learning rate")
        self.average.go_back()
        self.optimizers = self._make(self.peak)
        self.graphs = self._new_graphs()
