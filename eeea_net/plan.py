"""What the paper's searches and trainings cost on a named GPU; needs no GPU.

    make eeea_net-plan                              # the table, for one RTX 2080 Ti (the paper's)
    python eeea_net/plan.py --gpu h100 --gpus 8
    python eeea_net/plan.py --json search-C

Columns: networks trained and parameters of the network (of a search: of its proxy, mean of random ones that early exit
lets in); MACs of one picture; pictures and epochs of a training; PFLOP of all (a training pass is three forwards, 2
FLOP a multiply-add); GPU-days at the utilisation that the paper's own search of EEEA-Net-C implies; the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np

from common import costs
from common.errors import UserError, run_main
from eeea_net.config import CONFIGS, LargeOptions, NetworkConfig, RunConfig, read_config
from eeea_net.counting import Counts, count
from eeea_net.genotypes import Genotype
from eeea_net.search import Scale
from eeea_net.space import Space

# Peaks in float32 (the makers' data sheets), in which these networks are trained.
GPUS = {
    "2080ti": costs.Gpu(11, 13.4),
    "v100": costs.Gpu(32, 15.7),
    "a100": costs.Gpu(80, 19.5),
    "h100": costs.Gpu(80, 67),
    "h200": costs.Gpu(141, 67),
}
PICTURES = 50_000  # of CIFAR
MEAN_OF = 200  # random networks that a search's mean is taken over
# name: (genotype or beta, classes, paper's GPU-days, where it says so)
SEARCHES = {
    "search-EA": (0.0, 0.57, "table 3"),
    "search-A": (3.0, 0.34, "table 3"),
    "search-B": (4.0, 0.36, "table 3"),
    "search-C": (5.0, 0.52, "table 3"),
}
TRAININGS = {
    "train-A": ("EEEA_A", 25.75 / 24, "table 4"),
    "train-B": ("EEEA_B", 25.95 / 24, "table 4"),
    "train-C": ("EEEA_C", 48.05 / 24, "table 4"),
}


@dataclass(frozen=True)
class Plan:
    """Cost of one run; see the module's text for the columns."""

    name: str
    networks: int
    parameters: int
    macs: int
    pictures: int
    epochs: int
    pflop: float
    gpu_days: float
    paper_gpu_days: float
    source: str


@cache
def _config() -> RunConfig:
    return read_config(["--config", str(CONFIGS / "paper" / "cifar10.yaml")], "plan")[0]


def searched(beta: float, config: RunConfig) -> tuple[int, Counts]:
    """(networks that a search trains, mean counts of its proxies)."""
    options, space = config.evolution, Space.of(config.cell)
    kept = max(2, int(options.survivors * options.population))
    networks = options.population + (options.generations - 1) * (options.population - kept)
    scale, random = Scale(space, LargeOptions()), np.random.default_rng(0)
    proxy = config.proxy.network(10, 3)
    found: list[Counts] = []
    while len(found) < MEAN_OF:
        chromosome = space.draw(random)
        if not beta or scale.parameters(chromosome) <= beta:
            found.append(count(space.decode(chromosome), proxy, 32))
    return networks, Counts(*(round(fmean(getattr(c, name) for c in found)) for name in Counts.__dataclass_fields__))


@cache
def _cost(name: str) -> tuple[int, Counts, int, float, str]:
    """(networks, counts, epochs, paper's days, source) of a run."""
    config = _config()
    if name in SEARCHES:
        beta, days, source = SEARCHES[name]
        networks, counts = searched(beta, config)
        return networks, counts, 1, days, source
    cell, days, source = TRAININGS[name]
    options = config.retrain
    network = NetworkConfig(channels=options.channels, layers=options.layers)
    return 1, count(Genotype.load(cell), network, 32), options.epochs, days, source


def flop(name: str) -> float:
    networks, counts, epochs, _, _ = _cost(name)
    return 3.0 * 2 * counts.macs * PICTURES * epochs * networks


def paper_utilisation() -> float:
    """Share of an RTX 2080 Ti's peak that 0.52 GPU-days for the search of EEEA-Net-C mean; at most all of it."""
    days = SEARCHES["search-C"][1]
    return min(1.0, flop("search-C") / (days * 86400) / (GPUS["2080ti"].peak_tflops * 1e12))


def plan(name: str, on: costs.Cluster) -> Plan:
    """Cost of one run on a cluster.

    Raises:
        UserError: no such run.
    """
    if name not in SEARCHES and name not in TRAININGS:
        raise UserError(f"no run {name!r}; there are: {', '.join([*SEARCHES, *TRAININGS])}")
    networks, counts, epochs, days, source = _cost(name)
    total = flop(name)
    sizes = (networks, counts.parameters, counts.macs, PICTURES, epochs)
    return Plan(name, *sizes, total / 1e15, on.gpu_days(total), days, source)


def table(plans: Sequence[Plan], on: costs.Cluster) -> str:
    """The plans as aligned text."""
    head = "run|networks|params M|MMAC|pictures|epochs|PFLOP|GPU-days|paper"
    rows = [
        [
            p.name,
            f"{p.networks:,}",
            f"{p.parameters / 1e6:.2f}",
            f"{p.macs / 1e6:,.1f}",
            f"{p.pictures:,}",
            str(p.epochs),
            f"{p.pflop:,.1f}",
            f"{p.gpu_days:,.2f}",
            f"{p.paper_gpu_days:.2f} ({p.source})",
        ]
        for p in plans
    ]
    return f"cluster: {on.describe('float32')}\n{costs.aligned([head.split('|'), *rows], left=(0, 8))}"


def main(argv: Sequence[str] | None = None) -> list[Plan]:
    parser = costs.plan_parser(__doc__, costs.Cluster("2080ti", 1, 1, GPUS))
    parser.set_defaults(utilisation=None)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join([*SEARCHES, *TRAININGS])} (default: all)")
    given = parser.parse_args(argv)
    on = costs.Cluster(given.gpu, given.gpus, given.utilisation or paper_utilisation(), GPUS)
    plans = [plan(name, on) for name in given.runs or [*SEARCHES, *TRAININGS]]
    costs.show(plans, table(plans, on), given.json)
    return plans


if __name__ == "__main__":
    run_main(main)
