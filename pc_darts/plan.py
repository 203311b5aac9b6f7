"""What the paper's searches and trainings cost on a named GPU; needs no GPU.

    make pc_darts-plan                                     the table, for one GTX 1080 Ti (the paper's CIFAR-10 search)
    python pc_darts/plan.py --gpu v100 --gpus 8            the paper's ImageNet search
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

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_main
from pc_darts.config import CONFIGS, RetrainOptions, RunConfig, SearchOptions, read_config
from pc_darts.counting import count, saved_bytes
from pc_darts.genotypes import PUBLISHED
from pc_darts.losses import final_loss
from pc_darts.model import FinalNetwork
from pc_darts.search_space import SearchConfig, SearchNetwork


@dataclass(frozen=True)
class Gpu:
    """Memory in GB and float32 peak in TFLOP/s (the makers' data sheets)."""

    memory_gb: float
    peak_tflops: float


GPUS = {
    "1080ti": Gpu(11, 11.3),
    "v100": Gpu(16, 15.7),
    "a100": Gpu(80, 19.5),
    "h100": Gpu(80, 67),
    "h200": Gpu(141, 67),
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


def _search(config: RunConfig, classes: int, pictures: int) -> tuple[int, int, int, float, int]:
    """(parameters, macs, pictures of an epoch, FLOP, bytes a picture)."""
    options = config.search
    shape = SearchConfig(options.channels, options.cells, options.nodes, classes, options.partial, stem=options.stem)
    torch.manual_seed(0)
    network = SearchNetwork(shape, fused=False)
    counts = count(network, config.data.size)
    halves = tuple(round(share * pictures) for share in config.data.halves)
    side = config.data.size
    x_BCHW, y_B = torch.randn(2, 3, side, side), torch.zeros(2, dtype=torch.long)
    kept = saved_bytes(lambda: F.cross_entropy(network(x_BCHW), y_B), list(network.parameters()))
    flop = search_flop(options, counts.macs, halves[0])
    return counts.parameters, counts.macs, sum(halves), flop, kept // 2


def _final(
    options: RetrainOptions, side: int, classes: int, pictures: int, cell: str
) -> tuple[int, int, int, float, int]:
    torch.manual_seed(0)
    network = FinalNetwork(PUBLISHED[cell], options.channels, options.layers, classes, options.stem, True)
    counts = count(network, side)
    x_BCHW, y_B = torch.randn(2, 3, side, side), torch.zeros(2, dtype=torch.long)

    def loss() -> torch.Tensor:
        logits_BK, auxiliary_BK = network.train().forward_with_auxiliary(x_BCHW)
        return final_loss(logits_BK, auxiliary_BK, y_B, options.auxiliary, options.smoothing)

    kept = saved_bytes(loss, list(network.parameters()))
    flop = 3.0 * 2 * counts.macs * pictures * options.epochs
    return counts.parameters_with_auxiliary, counts.macs, pictures, flop, kept // 2


@cache
def _costs(name: str) -> tuple[int, int, int, float, int]:
    """(parameters, MACs, pictures of an epoch, FLOP of the run, bytes a picture) of one of RUNS."""
    file, half, classes, pictures, cell, _, _ = RUNS[name]
    config = _config(file)
    if half == "search":
        return _search(config, classes, pictures)
    return _final(config.retrain, config.data.size, classes, pictures, cell)


def paper_utilisation() -> float:
    """Share of a GTX 1080 Ti's peak that 0.1 GPU-days for the CIFAR-10 search mean."""
    days = RUNS["cifar-search"][5]
    assert days is not None
    return _costs("cifar-search")[3] / (days * 86400) / (GPUS["1080ti"].peak_tflops * 1e12)


def plan(name: str, gpu: str = "1080ti", gpus: int = 1, utilisation: float | None = None) -> Plan:
    """Cost of one of RUNS on `gpus` x `gpu`.

    Raises:
        UserError: no such run or GPU, or numbers out of range.
    """
    if name not in RUNS:
        raise UserError(f"no run {name!r}; there are: {', '.join(RUNS)}")
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if gpus < 1 or (utilisation is not None and not 0 < utilisation <= 1):
        raise UserError(f"--gpus must be at least 1 and --utilisation in (0, 1], got {gpus} and {utilisation}")
    file, half, _, _, _, days, source = RUNS[name]
    config = _config(file)
    options: SearchOptions | RetrainOptions = config.search if half == "search" else config.retrain
    parameters, macs, epoch, flop, kept = _costs(name)
    used = paper_utilisation() if utilisation is None else utilisation
    share = math.ceil(options.batch_size / gpus)
    return Plan(
        name,
        parameters,
        macs,
        options.batch_size,
        options.epochs,
        epoch,
        flop / 1e15,
        kept,
        (12 * parameters + share * kept) / 1e9,
        flop / (GPUS[gpu].peak_tflops * 1e12 * used) / 86400,
        days,
        source,
    )


def table(plans: Sequence[Plan], gpu: str, gpus: int, utilisation: float) -> str:
    """The plans as aligned text."""
    head = "run|params M|MMAC|batch|epochs|pictures|PFLOP|MB/picture|GB/GPU|GPU-days|paper"
    rows = [head.split("|")]
    for p in plans:
        rows.append(
            [
                p.name,
                f"{p.parameters / 1e6:.2f}",
                f"{p.macs / 1e6:,.1f}",
                f"{p.batch_size:,}",
                str(p.epochs),
                f"{p.pictures:,}",
                f"{p.pflop:,.1f}",
                f"{p.bytes_per_picture / 1e6:,.1f}",
                f"{p.memory_gb_per_gpu:,.1f}" + ("" if p.memory_gb_per_gpu < GPUS[gpu].memory_gb else " too large"),
                f"{p.gpu_days:,.2f}",
                "-" if p.paper_gpu_days is None else f"{p.paper_gpu_days} ({p.source})",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i in (0, 10) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    card = GPUS[gpu]
    cluster = f"{gpus} x {gpu} ({card.memory_gb:.0f} GB, {card.peak_tflops} TFLOP/s float32) at {utilisation:.1%}"
    return "\n".join([f"cluster: {cluster} of peak; '-': the paper does not say", *(line.rstrip() for line in lines)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--gpu", default="1080ti", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--utilisation", type=float, help="share of the peak that is reached")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options: Any = parser.parse_args(arguments)
    used = paper_utilisation() if options.utilisation is None else options.utilisation
    plans = [plan(name, options.gpu, options.gpus, used) for name in options.runs or list(RUNS)]
    if options.json:
        print(json.dumps([asdict(p) for p in plans], indent=2))
    else:
        print(table(plans, options.gpu, options.gpus, used))


if __name__ == "__main__":
    run_main(main)
