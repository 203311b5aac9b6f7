"""What the paper's training costs on a named cluster; needs no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common import costs
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
    options = costs.plan_parser(__doc__, costs.Cluster("h100", 1, 0.35)).parse_args(argv)
    cluster = costs.cluster_of(options)
    with torch.device("meta"):
        network, y_BCHW = Denoiser(NewpaperRun().network), torch.empty(BATCH, 1, SIDE, SIDE)
        flop = 3.0 * STEPS * costs.flop(lambda: network(y_BCHW))
    plan = Plan(costs.parameter_count(network), flop / 1e15, cluster.gpu_days(flop))
    table = costs.aligned([list(vars(plan)), [costs.number(value, 2) for value in vars(plan).values()]])
    costs.show([plan], f"{cluster.describe()}\n{table}", options.json)


if __name__ == "__main__":
    run_main(main)
