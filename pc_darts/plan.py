"""What the paper's searches and trainings cost on a named GPU; needs no GPU.

    make pc_darts-plan                              # the table, for one GTX 1080 Ti (the paper's CIFAR-10 search)
    python pc_darts/plan.py --gpu v100 --gpus 8  # the paper's ImageNet search
    python pc_darts/plan.py --json imagenet-search

Every row is one half of a config in pc_darts/configs (cifar.yaml, imagenet.yaml). Columns:
  params M         trained parameters (final networks: with the auxiliary head)
  MMAC             multiply-adds of convolutions and linear layers for one picture, forward, without auxiliary head
  pictures         of one epoch, both halves together in a search
  PFLOP            of the whole run: three forwards a training pass (2 FLOP a multiply-add); an epoch of search after
                   the warm-up has one pass for the architecture and one for the weights (second order: four and one)
  MB/picture       kept for the backward pass, float32, measured on two pictures
  GB/GPU           that, times the GPU's share of the batch, plus weights, gradients and optimisers
  GPU-days         PFLOP / (peak x utilisation). These networks are made of many small kernels: by default the
                   utilisation that the paper's own CIFAR-10 search implies on its GPU
  paper            the paper's GPU-days, on its own GPU
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from common import costs
from common.errors import UserError, run_main
from pc_darts.config import CONFIGS, RetrainOptions, RunConfig, SearchOptions, read_config
from pc_darts.counting import count
from pc_darts.genotypes import PUBLISHED
from pc_darts.losses import final_loss
from pc_darts.model import FinalNetwork
from pc_darts.search_space import SearchNetwork

# Peaks in float32 (the makers' data sheets), in which these networks are trained.
GPUS = {
    "1080ti": costs.Gpu(11, 11.3),
    "v100": costs.Gpu(16, 15.7),
    "a100": costs.Gpu(80, 19.5),
    "h100": costs.Gpu(80, 67),
    "h200": costs.Gpu(141, 67),
}
# (config, half, classes, training pictures, cell, paper's GPU-days, what the paper says)
RUNS: dict[str, tuple[str, str, int, int, str, float | None, str]] = {
    "cifar-search": ("cifar", "search", 10, 50_000, "", 0.1, "table 1, GTX 1080 Ti"),
    "cifar-final": ("cifar", "retrain", 10, 50_000, "PC_DARTS_cifar", None, "not stated"),
    "imagenet-search": ("imagenet", "search", 1000, 1_281_167, "", 3.8, "table 2, 11.5 h on 8 V100"),
    "imagenet-final": ("imagenet", "retrain", 1000, 1_281_167, "PC_DARTS_image", None, "not stated"),
}


@dataclass
class Plan:
    """Cost of one run; see the module's text for the columns."""

    name: str
    parameters: int
    macs: int
    batch_size: int
    epochs: int
    pictures: int
    pflop: float
    bytes_per_picture: int
    memory_gb_per_gpu: float
    gpu_days: float
    paper_gpu_days: float | None
    source: str


@cache
def _config(name: str) -> RunConfig:
    return read_config(["--config", str(CONFIGS / f"{name}.yaml")], "plan")[0]


def search_flop(options: SearchOptions, macs: int, pictures: int) -> float:
    """FLOP of a whole search with so many pictures for the weights an epoch.

    Architecture steps are as many as weight steps, on batches of the same size (the smaller half is repeated).
    """
    one_pass = 3 * 2 * macs * pictures
    passes = 4 if options.unrolled else 1
    return float(one_pass * (options.epochs + passes * (options.epochs - options.warmup_epochs)))


class Costs(NamedTuple):
    parameters: int
    macs: int
    pictures: int  # of an epoch
    flop: float  # of the run
    kept: int  # bytes a picture


@cache
def _costs(name: str) -> Costs:
    """Costs of one of RUNS, counted on the meta device."""
    file, half, classes, pictures, cell, _, _ = RUNS[name]
    config = _config(file)
    side, search, final = config.data.size, config.search, config.retrain
    with torch.device("meta"):
        x_BCHW, y_B = torch.empty(2, 3, side, side), torch.zeros(2, dtype=torch.long)
        if half == "search":
            halves = [round(share * pictures) for share in config.data.halves]
            supernet = SearchNetwork(search.network(classes), fused=False)
            counts = count(supernet, side)
            kept = costs.kept_bytes(lambda: F.cross_entropy(supernet(x_BCHW), y_B), supernet.parameters())
            flop = search_flop(search, counts.macs, halves[0])
            return Costs(counts.parameters, counts.macs, sum(halves), flop, kept // 2)
        network = FinalNetwork(PUBLISHED[cell], replace(final.network(classes), auxiliary=True))
        counts = count(network, side)

        def loss() -> torch.Tensor:
            logits_BK, auxiliary_BK = network.train().forward_with_auxiliary(x_BCHW)
            return final_loss(logits_BK, auxiliary_BK, y_B, final.auxiliary, final.smoothing)

        kept = costs.kept_bytes(loss, network.parameters())
    flop = 3.0 * 2 * counts.macs * pictures * final.epochs
    return Costs(counts.parameters_with_auxiliary, counts.macs, pictures, flop, kept // 2)


def paper_utilisation() -> float:
    """Share of a GTX 1080 Ti's peak that 0.1 GPU-days for the CIFAR-10 search mean."""
    days = RUNS["cifar-search"][5]
    assert days is not None
    return _costs("cifar-search").flop / (days * 86400) / (GPUS["1080ti"].peak_tflops * 1e12)


def cluster(gpu: str = "1080ti", gpus: int = 1, utilisation: float | None = None) -> costs.Cluster:
    """By default with `paper_utilisation`."""
    return costs.Cluster(gpu, gpus, paper_utilisation() if utilisation is None else utilisation, GPUS)


def plan(name: str, on: costs.Cluster) -> Plan:
    """Cost of one of RUNS on a cluster.

    Raises:
        UserError: no such run.
    """
    if name not in RUNS:
        raise UserError(f"no run {name!r}; there are: {', '.join(RUNS)}")
    file, half, _, _, _, days, source = RUNS[name]
    config = _config(file)
    options: SearchOptions | RetrainOptions = config.search if half == "search" else config.retrain
    cost = _costs(name)
    return Plan(
        name,
        cost.parameters,
        cost.macs,
        options.batch_size,
        options.epochs,
        cost.pictures,
        cost.flop / 1e15,
        cost.kept,
        (12 * cost.parameters + on.share(options.batch_size) * cost.kept) / 1e9,
        on.gpu_days(cost.flop),
        days,
        source,
    )


def table(plans: Sequence[Plan], on: costs.Cluster) -> str:
    """The plans as aligned text."""
    head = "run|params M|MMAC|batch|epochs|pictures|PFLOP|MB/picture|GB/GPU|GPU-days|paper"
    rows = [
        [
            p.name,
            f"{p.parameters / 1e6:.2f}",
            f"{p.macs / 1e6:,.1f}",
            f"{p.batch_size:,}",
            str(p.epochs),
            f"{p.pictures:,}",
            f"{p.pflop:,.1f}",
            f"{p.bytes_per_picture / 1e6:,.1f}",
            f"{p.memory_gb_per_gpu:,.1f}" + ("" if p.memory_gb_per_gpu < on.card.memory_gb else " too large"),
            f"{p.gpu_days:,.2f}",
            "-" if p.paper_gpu_days is None else f"{p.paper_gpu_days} ({p.source})",
        ]
        for p in plans
    ]
    text = costs.aligned([head.split("|"), *rows], left=(0, 10))
    return f"cluster: {on.describe('float32')}; '-': the paper does not say\n{text}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = costs.plan_parser(__doc__, costs.Cluster("1080ti", 1, 1, GPUS))
    parser.set_defaults(utilisation=None)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)} (default: all)")
    options = parser.parse_args(arguments)
    on = cluster(options.gpu, options.gpus, options.utilisation)
    plans = [plan(name, on) for name in options.runs or list(RUNS)]
    costs.show(plans, table(plans, on), options.json)


if __name__ == "__main__":
    run_main(main)
