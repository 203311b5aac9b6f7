"""What the authors' pre-training costs: parameters, FLOP of a crop, GPU-days, beside the paper's own figures.

    make scenesplat-plan                                  # joint training on three data sets
    python scenesplat/plan.py --gpu h100 --gpus 16 --utilisation 0.3
    python scenesplat/plan.py --voxels 100000 --json

Parameters are those of the networks themselves, built on the meta device. FLOP depend on the scenes: each pooling keeps
`KEPT` of the voxels and `OCCUPIED` of a kernel's places hold a neighbour, both measured on surfaces at 2 cm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import costs
from common.errors import run_main
from common.options import Count
from scenesplat.config import FIVE_STAGES, NetworkConfig

DEFAULT = costs.Cluster("h100", 16, 0.3)
VOXELS = 192_000  # of a training crop (released config)
CROPS = 800 * 2920  # epochs of the config x training scenes of table 2
PAPER_DAYS = 56.0  # 16 H100 for about 3.5 days (README of the released code)
KEPT, OCCUPIED = 0.28, 0.4
BYTES = 4 * 4  # of a weight with its gradient and AdamW's two averages


@dataclass(frozen=True)
class Plan:
    """One network. GFLOP of one forward pass of a crop; GB of weights, gradients and AdamW."""

    network: str
    parameters: int
    encoder: int
    decoder: int
    crop_gflop: float
    weights_gb: float
    gpu_days: float | None
    paper_gpu_days: float | None


def forward_flop(options: NetworkConfig, voxels: float) -> float:
    """FLOP of one forward pass: convolutions, products and attention, 2 a multiply-add."""
    total = 2 * voxels * 125 * OCCUPIED * options.in_channels * options.enc_channels[0]
    counts = [voxels * KEPT**s for s in range(len(options.enc_depths))]

    def blocks(count: float, depth: int, width: int, patch: int) -> float:
        products = (27 * OCCUPIED + 1 + 4 + 2 * options.mlp_ratio) * width**2
        return 2 * count * depth * (products + 2 * min(patch, count) * width)

    for s, depth in enumerate(options.enc_depths):
        if s:
            total += 2 * counts[s - 1] * options.enc_channels[s - 1] * options.enc_channels[s]
        total += blocks(counts[s], depth, options.enc_channels[s], options.enc_patch[s])
    widths = [*options.dec_channels, options.enc_channels[-1]]
    for s, depth in enumerate(options.dec_depths):
        total += 2 * (counts[s + 1] * widths[s + 1] + counts[s] * options.enc_channels[s]) * widths[s]
        total += blocks(counts[s], depth, widths[s], options.dec_patch[s])
    return total


def plan(cluster: costs.Cluster, voxels: int) -> list[Plan]:
    """The published networks; the time of the language pre-training."""
    import torch

    from scenesplat.model import PointTransformer

    found = []
    networks = {
        "language model, 11 attributes": NetworkConfig(),
        "language model, 14 attributes": NetworkConfig(in_channels=14),
        "five stages, 11 attributes": FIVE_STAGES,
        "five stages, 14 attributes": replace(FIVE_STAGES, in_channels=14),
    }
    for name, options in networks.items():
        with torch.device("meta"):
            network = PointTransformer(options)
        whole = costs.parameter_count(network)
        work = forward_flop(options, voxels)
        first = name == "language model, 11 attributes"
        days = cluster.gpu_days(3 * work * CROPS) if name.startswith("language") else None  # forward and backward
        found.append(
            Plan(
                name,
                whole,
                costs.parameter_count(network.embedding, network.enc),
                costs.parameter_count(network.dec),
                work / 1e9,
                whole * BYTES / 1e9,
                days,
                PAPER_DAYS if first and voxels == VOXELS else None,
            )
        )
    return found


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"network|parameters|encoder|decoder|GFLOP a crop|weights GB|{cluster.gpu}-days|authors' H100-days"
    rows = [
        [
            line.network,
            f"{line.parameters:,}",
            f"{line.encoder:,}",
            f"{line.decoder:,}",
            f"{line.crop_gflop:,.0f}",
            f"{line.weights_gb:.3g}",
            costs.number(line.gpu_days),
            costs.number(line.paper_gpu_days, 0),
        ]
        for line in plans
    ]
    return costs.aligned([head.split("|"), *rows]) + f"\n{cluster.describe()}, {CROPS:,} crops"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument("--voxels", type=Count, default=VOXELS, help="occupied voxels of a training crop")
    options = parser.parse_args(argv)
    cluster = costs.cluster_of(options)
    plans = plan(cluster, options.voxels)
    costs.show(plans, table(plans, cluster), options.json)
    return [asdict(line) for line in plans]


if __name__ == "__main__":
    run_main(main)
