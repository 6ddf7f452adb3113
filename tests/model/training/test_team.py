"""Processes that train together, as torchrun starts them: here two on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.training import team

ROOT = Path(__file__).parents[3]

TRAINED = """
import sys
import torch
from model.training import team
from model.training.demo import DEMO_VAE
from model.training.descent import Descent
from model.training.feed import first_seed
from model.training.loop import Average, Leg

team.join()
leg = Leg.start(1.0, 0, (0.0, 1.0), torch.device("cpu"))
net = torch.nn.Linear(3, 2)
torch.nn.init.constant_(net.weight, float(team.rank()))  # the leader's count
descent = Descent(Average(net, 0.9), leg, 0.1, lambda peak: [torch.optim.SGD(net.parameters(), lr=peak)])
begun = net.weight.sum().item()
given = torch.full((1, 3), 1.0 + team.rank())
descent.gradients("one", lambda x: (net(x).sum(),), given)
descent.step(0.1)
descent.report(float(team.rank()))
leg.clock.tick()
leg.log.say("only the leader says this")
sys.stdout.write(f"{team.rank()} {begun} {net.weight.sum().item():.6f} {descent.last_loss} {leg.clock.now} "
                 f"{first_seed(1)}\\n")
team.leave()
"""


def started(script: Path, count: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_two_processes_take_the_same_steps_from_their_mean_gradient(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINED)
    lines = started(script, 2).splitlines()
    assert lines.count("only the leader says this") == 1
    (_, *first), (_, *second) = sorted(line.split() for line in lines if line[:2] in ("0 ", "1 "))
    begun, ended, loss, now, seed = first
    assert (float(begun), float(loss)) == (0.0, 0.5)
    # Of each of the six weights the gradient is 1 and 2, its mean 1.5, with the biases' clipped to a norm of 1.
    norm = (6 * 1.5**2 + 2) ** 0.5
    assert float(ended) == pytest.approx(-0.1 * 6 * 1.5 / norm, rel=1e-4)
    assert second[:4] == [begun, ended, loss, now]
    assert second[4] != seed


def test_one_process_alone_changes_nothing() -> None:
    gradient = torch.tensor([1.0, 2.0])
    team.average([gradient])
    team.share([gradient])
    assert gradient.tolist() == [1.0, 2.0]
    assert (team.size(), team.rank(), team.leads()) == (1, 0, True)
    assert (team.agree(2.5), team.mean(2.5)) == (2.5, 2.5)
