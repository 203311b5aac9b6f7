"""A paper of two claims, and one about time, on arms of one weight: what a campaign needs, written into a folder."""

from __future__ import annotations

from pathlib import Path

CLAIMS = """
tiers:
  small: {seeds: [0, 1, 2], budget: {steps: 2}, rungs: [1, 4]}
claims:
  - id: T1
    statement: a weight comes close to 3
    paper: {value: 3, source: table 1}
    target: {text: at least 2.5, metric: weight, op: ">=", value: 2.5}
    tiers: [small]
  - id: T2
    statement: twice the rate is closer
    paper: {value: closer, source: table 2}
    target: {text: above 0, metric: gain, op: ">", value: 0.0, conditions: [weight >= 0.1]}
    tiers: [small]
  - id: T3
    statement: it is fast
    paper: {value: fast, source: table 3}
    target: {text: at most 9, metric: seconds, op: "<=", value: 9.0}
    timed: true
    tiers: [small]
"""

REPRODUCE = """
import os
import time
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from common import reproduction
from common.data.sampling import StepDataModule, TensorTable
from common.options import TrainerOptions
from common.study import Study, Watch, fit_arm, open_sizes

PACE = float(os.environ.get("PACE", 0))  # seconds of a step
OPTIONS = TrainerOptions(precision="32-true", accelerator="cpu", progress=False)


@dataclass
class Sizes:
    steps: int


class Slow(pl.LightningModule):
    rate = 0.05

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1))

    def training_step(self, batch, batch_idx):
        with open("steps.log", "a") as file:
            file.write("step\\n")
        time.sleep(PACE)
        return (self.weight * batch["x"] - 3 * batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.5)


class Fast(Slow):
    rate = 0.1


def arm(study, name, seed, kind):
    steps = study.sizes.steps

    def start():
        torch.manual_seed(seed)
        return kind()

    def train(network, folder):
        watch = Watch(range(1, steps + 1), lambda step: {"weight": float(network.weight.detach())})
        more = {"steps": steps, "folder": folder, "checkpoint_every": 1}
        data = StepDataModule(TensorTable({"x": torch.linspace(0.5, 1.5, 8)}), 4, steps, seed)
        fit_arm(network, data, watch, OPTIONS, batch_size=4, grad_clip=0.0, **more)
        return network, watch.record()

    return study.arm(name, seed, start, train, study.settings)


def t1(study, seed):
    return {"weight": arm(study, "slow", seed, Slow).last["weight"]}


def t2(study, seed):
    slow, fast = arm(study, "slow", seed, Slow).last["weight"], arm(study, "fast", seed, Fast).last["weight"]
    return {"gain": fast - slow, "weight": fast}


def t3(study, seed):
    return {"seconds": 1.0 + seed}


def main(argv=None):
    def study(given):
        return Study(open_sizes(Sizes, "toy", given.tier, given.rung), given.folder)

    return reproduction.main("toy", "about", (t1, t2, t3), study, argv=argv)
"""


def write_paper(folder: Path) -> None:
    """`folder`/toy, a package."""
    room = folder / "toy"
    room.mkdir()
    (room / "__init__.py").touch()
    (room / "claims.yaml").write_text(CLAIMS, encoding="utf-8")
    (room / "reproduce.py").write_text(REPRODUCE, encoding="utf-8")
