"""What a recipe costs, worked out before it starts: parameters, multiply-adds, PFLOP and GPU-days of each part.

    make eagan-plan                                                       # the CIFAR-10 recipe, beside the paper's days
    python eagan/plan.py --config eagan/configs/stl10.yaml --gpu a100
    python eagan/plan.py --config eagan/configs/small.yaml

Networks are built on the meta device: nothing is allocated. A search is counted with the published networks, since the
found ones are not known before: an individual of the middle of the space has about as much. "as written" is the paper's
form, "done" what is computed here (the equal forms of model.py, no gradients that are thrown away).

columns
  parameters, MMAC   of the generator, as written (the paper's counts)
  steps              of the discriminator
  PFLOP              3 passes of the discriminator's pictures, 1 or 3 of the generator's; and the measured pictures
  GPU-days           PFLOP / (peak x utilisation)
  paper              its GPU-days
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import costs
from common.cli import parse_config
from common.errors import run_main
from eagan.config import GameOptions, NetworkConfig, RunConfig
from eagan.genotypes import PUBLISHED, Genes
from eagan.model import Discriminator, Generator, write_out

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = costs.Cluster("v100", 1, 0.1)
PAPER_DAYS = {"stage_g": 0.8, "stage_d": 0.4}  # table 2, EAGAN-GD1 on CIFAR-10


@dataclass(frozen=True)
class Plan:
    """Cost of one part of a run; see the module's text."""

    part: str
    parameters_g: int
    parameters_d: int
    mmac_g: float
    mmac_d: float
    steps: int
    pflop_as_written: float
    pflop: float
    gpu_days: float
    paper_days: float | None


def macs(network: NetworkConfig, generator: Genes, discriminator: Genes, written_out: bool) -> tuple[int, int]:
    """Multiply-adds of one picture through (generator, discriminator)."""
    found = []
    with torch.device("meta"), torch.no_grad():
        for made, given in (
            (Generator(network, generator), torch.empty(1, network.latent_dim)),
            (Discriminator(network, discriminator), torch.empty(1, 3, network.side, network.side)),
        ):
            made = write_out(made) if written_out else made  # type: ignore[assignment]
            found.append(costs.flop(partial(made.eval(), given)) // 2)
    return found[0], found[1]


def step_macs(options: GameOptions, g: int, d: int, thrifty: bool) -> float:
    """Multiply-adds of a discriminator step and its share of a generator step; backward costs two forwards.

    Args:
        thrifty: without the gradients of the discriminator's weights in the generator's step.
    """
    of_d = options.batch_real * g + 2 * options.batch_real * 3 * d
    of_g = options.batch_fake * (3 * g + (2 if thrifty else 3) * d)
    return of_d + of_g / options.d_steps


def plan(config: RunConfig, cluster: costs.Cluster = DEFAULT) -> list[Plan]:
    """The two searches and the full training of a recipe."""
    network, evaluation = config.network, config.evaluation
    generator = PUBLISHED["best_G"]
    discriminator = PUBLISHED["stl10_D" if network.bottom_width == 6 else "cifar10_D"]
    written, done = (macs(network, generator, discriminator, form) for form in (True, False))
    with torch.device("meta"):
        parameters = [
            costs.parameter_count(made)
            for made in (Generator(network, generator), Discriminator(network, discriminator))
        ]
    published = (network == NetworkConfig()) and config.search.population == 32
    found = []
    for name, options in (("stage_g", config.stage_g), ("stage_d", config.stage_d), ("train", config.train)):
        if name == "train":
            steps, pictures = config.train.steps, evaluation.final_images
        else:
            stage = config.stage_g if name == "stage_g" else config.stage_d
            steps = stage.warmup_steps + stage.rounds * stage.round_steps
            pictures = stage.rounds * config.search.population * evaluation.images
        flop = [
            2.0 * (steps * step_macs(options, *form, thrifty=thrifty) + pictures * form[0])
            for form, thrifty in ((written, False), (done, True))
        ]
        days = PAPER_DAYS.get(name) if published else None
        mmac_g, mmac_d = written[0] / 1e6, written[1] / 1e6
        pflop, gpu_days = [value / 1e15 for value in flop], cluster.gpu_days(flop[1])
        sizes = parameters[0], parameters[1]
        found.append(Plan(name, *sizes, mmac_g, mmac_d, steps, pflop[0], pflop[1], gpu_days, days))
    return found


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"part|parameters G|D|MMAC G|D|steps|PFLOP as written|PFLOP done|{cluster.gpu}-days|paper"
    rows = [
        [
            line.part,
            f"{line.parameters_g:,}",
            f"{line.parameters_d:,}",
            f"{line.mmac_g:,.1f}",
            f"{line.mmac_d:,.1f}",
            f"{line.steps:,}",
            f"{line.pflop_as_written:,.4g}",
            f"{line.pflop:,.4g}",
            f"{line.gpu_days:,.2g}",
            costs.number(line.paper_days),
        ]
        for line in plans
    ]
    return costs.aligned([head.split("|"), *rows]) + f"\n{cluster.describe()}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument("--config", type=Path, default=CONFIGS / "cifar10.yaml", help="a run's options")
    options = parser.parse_args(argv)
    config, _ = parse_config(RunConfig, None, "", ["--config", str(options.config)])
    cluster = costs.cluster_of(options)
    plans = plan(config, cluster)
    costs.show(plans, table(plans, cluster), options.json)
    return [asdict(line) for line in plans]


if __name__ == "__main__":
    run_main(main)
