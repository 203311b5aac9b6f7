"""What training and serving the paper's models costs in each storage tier: equation (1) and its inverse.

    make se_moe-plan  # the paper's five models, and the largest model of 1 x H200
    python se_moe/plan.py --gpu a100 --gpus 8 --alpha 0.1
    python se_moe/plan.py --gpus 1 --host_gb 200 --file_gb 2000 --json

Columns
  params B      dense and expert parameters
  resident GB   16 bytes a parameter on the devices, without tiers
  device GB     dense states and one layer's active experts with gradients, per device
  host GB       the cache: active experts with gradients and Adam moments, per device
  file GB       master weights and moments of all experts, per device
  fits          the tiers whose share is large enough on this machine
  ring GB       serving with two ring sections in half precision, on one device

alpha is the fraction of the experts that a step touches. It is a property of data and batch: a large batch touches
nearly all of them, and the host tier then gains nothing. `python se_moe/reproduce.py` measures it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from common import costs
from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Range, Share
from se_moe.planner import (
    FLOAT32,
    MIXED_PRECISION,
    Machine,
    all_resident_bytes,
    largest_model,
    paper_models,
    ring_bytes,
    storage_plan,
)

GPUS = {"a100-40": costs.Gpu(40, 312), **costs.GPUS}


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's models on the chosen GPUs, and the largest model for the chosen machine."""
    if options.gpu not in GPUS:
        raise UserError(f"unknown GPU {options.gpu!r}; known: {', '.join(GPUS)}")
    cost = FLOAT32 if options.precision == "float32" else MIXED_PRECISION
    share = {"host_bytes": options.host_gb * 1e9, "file_bytes": options.file_gb * 1e9}
    device_bytes = GPUS[options.gpu].memory_gb * 1e9
    models = []
    for model, gpus, paper in paper_models():
        machine = Machine(device_bytes, **share, devices=gpus)
        bytes_needed = storage_plan(model.dense, model.sparse, model.layers, options.alpha, machine, cost)
        models.append(
            {
                "name": model.name,
                "gpus": gpus,
                "dense": model.dense,
                "sparse": model.sparse,
                "paper_billions": paper,
                "resident_bytes": all_resident_bytes(model.dense, model.sparse, gpus),
                "ring_bytes": ring_bytes(model.dense, model.sparse, model.layers, 2),
                **asdict(bytes_needed),
            }
        )
    machine = Machine(device_bytes, **share, devices=options.gpus)
    largest = largest_model(options.dense, options.layers, options.alpha, machine, cost)
    return {
        "gpu": options.gpu,
        "alpha": options.alpha,
        "models": models,
        "largest": {"gpus": options.gpus, "layers": options.layers, **asdict(largest), "total": largest.total},
    }


def table(content: dict[str, Any]) -> str:
    """The plan as aligned text."""
    rows = [["model", "GPUs", "params B", "resident GB", "device GB", "host GB", "file GB", "fits", "ring GB"]]
    for m in content["models"]:
        fits = [tier for tier in ("device", "host", "file") if m[f"fits_{tier}"]]
        rows.append(
            [
                m["name"],
                str(m["gpus"]),
                f"{m['dense'] / 1e9:.1f} + {m['sparse'] / 1e9:.1f}",
                *(f"{m[k] / 1e9:.1f}" for k in ("resident_bytes", "device_bytes", "host_bytes", "file_bytes")),
                " ".join(fits) if len(fits) < 3 else "all",
                f"{m['ring_bytes'] / 1e9:.1f}",
            ]
        )
    found = content["largest"]
    limits = ", ".join(f"{tier} {value / 1e9:,.1f}B" for tier, value in found["sparse_by_tier"].items())
    return "\n".join(
        [
            f"{content['gpu']} ({GPUS[content['gpu']].memory_gb:g} GB), alpha {content['alpha']:g}; bytes per device",
            costs.aligned(rows, left=()),
            "",
            f"largest model on {found['gpus']} x {content['gpu']} with {found['dense'] / 1e9:g}B dense parameters and "
            f"{found['layers']} MoE layers: {found['total'] / 1e9:,.1f}B, the {found['binding']} tier binds",
            f"expert parameters that each tier alone would allow: {limits}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=Count, default=1, help="of the machine whose largest model is asked for")
    parser.add_argument("--host_gb", type=NotNegative, default=128, help="host memory per GPU")
    parser.add_argument("--file_gb", type=NotNegative, default=2000, help="drive space per GPU")
    parser.add_argument("--alpha", type=Share, default=0.1, help="fraction of the experts that a step touches")
    parser.add_argument(
        "--dense", type=Annotated[float, Range(1, 10**15)], default=1.0e9, help="dense parameters of the largest model"
    )
    parser.add_argument("--layers", type=Count, default=12, help="MoE layers of the largest model")
    parser.add_argument(
        "--precision",
        choices=("mixed", "float32"),
        default="mixed",
        help="numbers of the states: mixed keeps a float32 master of half-precision weights",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    content = plan(options)
    print(json.dumps(content, indent=2) if options.json else table(content))


if __name__ == "__main__":
    run_main(main)
