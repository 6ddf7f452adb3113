"""Graphs: recorded the second time, replayed after, bounded in number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.graphs import IDLE_RUNS, Function, Graphs, Recording


class Notebook:
    """Records by remembering the function, and counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, function: Function, *inputs: Tensor) -> Recording:
        self.recorded += 1

        def replay(*given: Tensor) -> Tensor:
            self.replayed += 1
            return function(*given)

        return replay


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_a_key_runs_plainly_then_is_recorded_then_replayed() -> None:
    notebook = Notebook()
    graphs = Graphs(notebook)
    counts = []
    for n in range(3):
        assert graphs.run("a", double, torch.tensor(n)).item() == 2 * n
        counts.append((notebook.recorded, notebook.replayed))
    assert counts == [(0, 0), (1, 1), (1, 2)]


def test_what_comes_out_is_not_overwritten_by_the_next_run() -> None:
    held = torch.zeros(())
    graphs = Graphs(lambda function, *inputs: lambda x: held.copy_(2 * x))
    graphs.run("a", double, torch.tensor(0.0))
    first = graphs.run("a", double, torch.tensor(1.0))
    graphs.run("a", double, torch.tensor(5.0))
    assert first.item() == 2


def test_nor_is_any_of_several_tensors_that_come_out() -> None:
    held = torch.zeros(()), torch.zeros(())
    graphs = Graphs(lambda function, *inputs: lambda x: tuple(one.copy_(x + n) for n, one in enumerate(held)))
    graphs.run("a", lambda x: (x, x + 1), torch.tensor(0.0))
    first = graphs.run("a", lambda x: (x, x + 1), torch.tensor(1.0))
    graphs.run("a", lambda x: (x, x + 1), torch.tensor(5.0))
    assert [part.item() for part in first] == [1, 2]


def test_more_keys_than_there_is_place_for_run_plainly() -> None:
    notebook = Notebook()
    graphs = Graphs(notebook, limit=8)
    for _ in range(5):
        for key in range(40):
            assert graphs.run(key, double, torch.tensor(key)).item() == 2 * key
    assert graphs.held == notebook.recorded == 8


def test_a_graph_that_was_long_not_used_gives_its_place_away() -> None:
    notebook = Notebook()
    graphs = Graphs(notebook, limit=2)
    for key in ("rare", "common", "rare", "common"):
        graphs.run(key, double, torch.tensor(1))
    for _ in range(IDLE_RUNS + 1):
        graphs.run("common", double, torch.tensor(1))
    for _ in range(2):
        graphs.run("new", double, torch.tensor(1))
    assert (graphs.held, notebook.recorded) == (2, 3)
    replayed = notebook.replayed
    for key in ("common", "new", "rare"):
        graphs.run(key, double, torch.tensor(1))
    assert (notebook.recorded, notebook.replayed - replayed) == (3, 2)  # the rare one runs plainly again


def test_keys_that_never_come_again_are_forgotten() -> None:
    notebook = Notebook()
    graphs = Graphs(notebook, limit=2)
    for key in range(1000):
        graphs.run(key, double, torch.tensor(1))
    graphs.run(0, double, torch.tensor(1))
    assert notebook.recorded == 0  # as if it came for the first time
    graphs.run(999, double, torch.tensor(1))
    assert notebook.recorded == 1


def test_what_cannot_be_recorded_runs_plainly_and_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def refuse(function: Function, *inputs: Tensor) -> Recording:
        tries.append(inputs)
        raise torch.OutOfMemoryError("none left")

    graphs = Graphs(refuse)
    for _ in range(4):
        assert graphs.run("a", double, torch.tensor(2)).item() == 4
    assert len(tries) == 1
    assert "OutOfMemoryError: none left" in caplog.text
    for _ in range(IDLE_RUNS):
        graphs.run("a", double, torch.tensor(2))
    assert len(tries) == 2  # there may be memory again
    assert graphs.held == 0


def test_a_key_that_cannot_be_recorded_takes_no_graphs_place() -> None:
    held = Notebook()

    def pick(function: Function, *inputs: Tensor) -> Recording:
        if inputs[0].item() == 7:
            raise torch.OutOfMemoryError("none left")
        return held(function, *inputs)

    graphs = Graphs(pick, limit=2)
    for key in (1, 2, 1, 2):
        graphs.run(key, double, torch.tensor(key))
    for _ in range(IDLE_RUNS + 5):
        graphs.run(1, double, torch.tensor(1))
    for _ in range(9):
        graphs.run(7, double, torch.tensor(7))
    assert held.recorded == 2


def test_a_function_that_fails_says_so_itself() -> None:
    def broken(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    graphs = Graphs(lambda function, *inputs: function(*inputs))
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError, match="too large"):
            graphs.run("a", broken, torch.tensor(2))
