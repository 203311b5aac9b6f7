"""What the paper's training costs on a named cluster; needs no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.costs import Cluster, aligned, cluster_of, flop, number, parameter_count, plan_parser, show
from common.errors import run_main
from newpaper.config import NewpaperRun
from newpaper.model import Denoiser

SIDE, STEPS, BATCH = 256, 500_000, 4  # pictures, steps and batch of the full scale


@dataclass
class Plan:
    parameters: float
    pflop: float
    gpu_days: float


def main(argv: Sequence[str] | None = None) -> None:
    options = plan_parser(__doc__, Cluster("h100", 1, 0.35)).parse_args(argv)
    cluster = cluster_of(options)
    with torch.device("meta"):
        network, y_BCHW = Denoiser(NewpaperRun().network), torch.empty(BATCH, 1, SIDE, SIDE)
        total = 3.0 * STEPS * flop(lambda: network(y_BCHW))
    plan = Plan(parameter_count(network), total / 1e15, cluster.gpu_days(total))
    table = aligned([list(vars(plan)), [number(value, 2) for value in vars(plan).values()]])
    show([plan], f"{cluster.describe()}\n{table}", options.json)


if __name__ == "__main__":
    run_main(main)
