"""What a run costs, worked out before it starts: FLOP, memory and GPU-days of every stage, beside the paper's 88.

    make lightgen-plan                                        # the paper's recipe on A100s
    python lightgen/plan.py --gpu h100 --gpus 8 --utilisation 0.5
    python lightgen/plan.py --preset base
    python lightgen/plan.py --config lightgen/configs/small.yaml

Nothing is allocated: the network is built on the meta device. Text states, latents, the teacher's pictures and the own
samples that lose are left out: they are made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import costs
from common.cli import parse_config
from common.errors import run_main
from common.files import read_object
from lightgen.config import LightgenConfig, NetworkConfig
from lightgen.losses import masked_loss
from lightgen.model import Fluid, Grid, preset
from lightgen.schedules import mask_law, masked_count

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = costs.Cluster("a100", 32, 0.4)
PAPER_DAYS = 88.0  # A100 days in all, abstract
BYTES = 4  # of a float32 number
SD35 = (16, 8)  # channels and stride of the paper's autoencoder
T5_WIDTH = 4096


@dataclass(frozen=True)
class Plan:
    """One stage. Gigabytes are those of weights, averages, gradients and AdamW, without activations."""

    stage: str
    tokens: int
    parameters: int
    samples: int
    pflop: float
    weights_gb: float
    gpu_days: float
    paper_days: float | None


def model_of(network: NetworkConfig, channels: int, text_width: int) -> Fluid:
    """The network on the meta device."""
    with torch.device("meta"):
        return Fluid(network, channels, text_width)


def step_flop(model: Fluid, length: int, grid: Grid, times: int = 4, least: float = 0.7) -> float:
    """FLOP of one picture's forward and backward pass at the law's mean share of masked tokens.

    Args:
        model: on the meta device; length: of a caption; times: drawn a token; least: share of masked tokens.
    """
    count, token = grid[0] * grid[1], model.head.token
    raster = model.config.order == "raster"
    masked = count if raster else masked_count(count, float(mask_law(least).mean()))
    with torch.device("meta"), torch.no_grad():
        states, order = torch.empty(1, length, model.text.first.in_features), torch.zeros(1, count, dtype=torch.long)
        tokens, noise = torch.empty(1, count, token), torch.empty(times, 1, masked, token)
        t = torch.zeros(times, 1, masked, dtype=torch.long)
        return 3.0 * costs.flop(lambda: masked_loss(model, tokens, order, masked, model.text(states), t, noise, grid))


def plan(config: LightgenConfig, cluster: costs.Cluster = DEFAULT) -> list[Plan]:
    """The stages of a run."""
    channels, stride = latents_of(config.autoencoder)
    width = text_width(config.text.encoder)
    network, stages, length = config.network, config.stages, config.text.length
    model = model_of(network, channels, width)
    parameters = costs.parameter_count(model)
    lines = []

    def line(name: str, tokens: int, samples: int, flop: float, copies: int, paper: float | None) -> None:
        weights = BYTES * copies * parameters / 1e9
        lines.append(Plan(name, tokens, parameters, samples, flop / 1e15, weights, cluster.gpu_days(flop), paper))

    grids = [(size // stride // network.patch,) * 2 for size in stages.sizes]
    for size, steps, grid in zip(stages.sizes, stages.steps, grids):
        samples = steps * config.trainer.batch_size
        each = step_flop(model, length, grid, stages.batch_mul, stages.mask_min)
        line(f"{size} px", grid[0] * grid[1], samples, samples * each, 5, None)
    if config.preferences.pairs:
        samples = config.preferences.steps * config.preferences.batch_size
        each = step_flop(model, length, grids[-1], 1, stages.mask_min)
        # Winner and loser, each with a step of the policy and a forward pass of the reference.
        line("DPO, pairs", grids[-1][0] * grids[-1][1], samples, samples * 2 * each * 4 / 3, 5, None)
    total = sum(found.pflop for found in lines) * 1e15
    seen = sum(found.samples for found in lines)
    line("all", grids[-1][0] * grids[-1][1], seen, total, 5, PAPER_DAYS if _is_paper(config) else None)
    return lines


def _is_paper(config: LightgenConfig) -> bool:
    return config.network == preset("large") and config.trainer.batch_size == 2048


def latents_of(where: str) -> tuple[int, int]:
    """(channels, stride) of the latents; Stable Diffusion 3.5's where no folder is."""
    if where == "pixels":
        return 3, 1
    file = Path(where) / "vae" / "config.json"
    if not file.is_file():
        return SD35
    found = read_object(file, kinds={"latent_channels": int, "block_out_channels": list})
    return int(found["latent_channels"]), 2 ** (len(found["block_out_channels"]) - 1)


def text_width(encoder: str | None) -> int:
    """Of a text encoder; FLAN-T5-XXL's where no folder is."""
    if encoder is not None and not (Path(encoder) / "config.json").is_file():
        return T5_WIDTH
    from common.data.text import TextEncoder

    return TextEncoder(encoder).width


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"stage|tokens|parameters|pictures|PFLOP|weights GB|{cluster.gpu}-days|paper's A100-days"
    rows = [
        [
            line.stage,
            f"{line.tokens:,}",
            f"{line.parameters:,}",
            f"{line.samples:,}",
            f"{line.pflop:,.4g}",
            f"{line.weights_gb:.3g}",
            f"{line.gpu_days:,.3g}",
            "-" if line.paper_days is None else f"{line.paper_days:g}",
        ]
        for line in plans
    ]
    return costs.aligned([head.split("|"), *rows]) + f"\n{cluster.describe()}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument(
        "--config", type=Path, default=CONFIGS / "paper.yaml", help="a run's options (default: the paper's recipe)"
    )
    parser.add_argument("--preset", choices=("base", "large", "huge"), help="take this network instead")
    options = parser.parse_args(argv)
    config, _ = parse_config(LightgenConfig, None, "", ["--config", str(options.config)])
    if options.preset:
        config.network = preset(options.preset)
    cluster = costs.cluster_of(options)
    plans = plan(config, cluster)
    costs.show(plans, table(plans, cluster), options.json)
    return [asdict(line) for line in plans]


if __name__ == "__main__":
    run_main(main)
