"""What the released tokenizer and generators cost, worked out before anything runs: parameters, FLOP, GPU-days.

    make instella_t2i-plan                                        # the released sizes
    python instella_t2i/plan.py --gpu h100 --gpus 64 --utilisation 0.5
    python instella_t2i/plan.py --config instella_t2i/configs/small.yaml

Nothing is allocated: the networks are built on the meta device. A training step of the tokenizer is taken as three
forward passes; its perceptual network and discriminator are left out (the authors published neither).
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
from common.files import read_object
from instella_t2i.config import DecoderConfig, InstellaConfig, TokenizerConfig
from instella_t2i.generators import Shape, Text, make_generator
from instella_t2i.tokenizer import Tokenizer

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = costs.Cluster("a100", 8, 0.4)
BYTES = 4  # of a float32 number
OLMO = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}  # AMD-OLMo-1B
# Abstract: trained within 200 GPU-days; AMD's blog: over 220 images a second and GPU. What each part took is not said.
PAPER = "the paper: 200 MI300X-days in all, over 220 images/s a GPU (3.8e9 images at most)"


@dataclass(frozen=True)
class Plan:
    """One stage. Gigabytes are those of weights, gradients and AdamW, without activations."""

    stage: str
    parameters: int
    trained: int
    samples: int
    tflop_a_sample: float
    weights_gb: float
    gpu_days: float


def plan(config: InstellaConfig, cluster: costs.Cluster = DEFAULT) -> list[Plan]:
    """The two stages of the tokenizer."""
    with torch.device("meta"), torch.no_grad():
        tokenizer = Tokenizer(config.network)
        pictures = torch.empty(1, 3, config.data.size, config.data.size)
        encoding = costs.flop(lambda: tokenizer.quantizer(tokenizer.encoder(pictures)))
        codes = torch.empty(1, config.network.tokens, config.network.bits)

        def decoded(side: int) -> object:
            return tokenizer.paint(tokenizer.quantizer.values(codes), side)

        sides = {config.data.size, *config.decoder.sizes}
        decoding = {side: costs.flop(partial(decoded, side)) for side in sides}
    whole = costs.parameter_count(tokenizer)
    decoder = costs.parameter_count(tokenizer.decoder, tokenizer.to_pixel)
    mean = sum(decoding[side] for side in config.decoder.sizes) / len(config.decoder.sizes)
    rows: list[tuple[str, int, TokenizerConfig | DecoderConfig, float]] = [
        ("tokenizer", whole, config.tokenizer, 3 * (encoding + decoding[config.data.size])),
        ("decoder", decoder, config.decoder, encoding + 3 * mean),
    ]
    plans = []
    for stage, trained, options, each in rows:
        samples = options.steps * options.batch_size
        state = BYTES * (whole + 3 * trained) / 1e9
        plans.append(Plan(stage, whole, trained, samples, each / 1e12, state, cluster.gpu_days(each * samples)))
    return plans


def generator_plans(config: InstellaConfig, cluster: costs.Cluster) -> list[Plan]:
    """Both generators; a sample's picture is encoded and its caption read once each time that it is learned from."""
    network, options = config.network, {"diffusion": config.diffusion, "autoregression": config.autoregression}
    width, read = language_model(config)
    with torch.device("meta"), torch.no_grad():
        tokenizer = Tokenizer(network)
        pictures = torch.empty(1, 3, config.data.size, config.data.size)
        encoding = costs.flop(lambda: tokenizer.quantizer(tokenizer.encoder(pictures)))
        code = torch.empty(1, network.tokens, network.bits)
        mask = torch.ones(1, config.text.length, dtype=torch.bool, device="cpu")  # looked at, not computed with
        text = Text(torch.empty(config.stream.layers, 1, config.text.length, width), mask)
    plans = []
    for kind, stage in options.items():
        with torch.device("meta"), torch.no_grad():
            generator = make_generator(kind, config.stream, Shape(network.tokens, network.bits, width))
            given = (code, torch.empty(1), text) if kind == "diffusion" else (code[:, 1:], text)
            forward = costs.flop(partial(generator, *given))
        count, samples = costs.parameter_count(generator), stage.steps * stage.batch_size
        each = 3 * forward + encoding + read
        plans.append(
            Plan(kind, count, count, samples, each / 1e12, BYTES * 4 * count / 1e9, cluster.gpu_days(each * samples))
        )
    return plans


def language_model(config: InstellaConfig) -> tuple[int, float]:
    """(width, FLOP of reading a caption of full length) of the run's language model; AMD-OLMo-1B's without a folder."""
    about = Path(config.text.encoder) / "config.json"
    found = read_object(about) if about.is_file() else OLMO
    width, inner = found["hidden_size"], found["intermediate_size"]
    weights = found["num_hidden_layers"] * (4 * width**2 + 3 * width * inner)
    return width, 2.0 * weights * config.text.length


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"stage|parameters|trained|samples|TFLOP a sample|weights GB|{cluster.gpu}-days".split("|")
    rows = [
        [
            line.stage,
            f"{line.parameters:,}",
            f"{line.trained:,}",
            f"{line.samples:,}",
            f"{line.tflop_a_sample:,.3g}",
            f"{line.weights_gb:.3g}",
            f"{line.gpu_days:,.3g}",
        ]
        for line in plans
    ]
    return costs.aligned([head, *rows]) + f"\n{cluster.describe()}\n{PAPER}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument("--config", type=Path, default=CONFIGS / "paper.yaml", help="a run's options")
    options = parser.parse_args(argv)
    config, _ = parse_config(InstellaConfig, None, "", ["--config", str(options.config)])
    cluster = costs.cluster_of(options)
    plans = [*plan(config, cluster), *generator_plans(config, cluster)]
    costs.show(plans, table(plans, cluster), options.json)
    return [asdict(line) for line in plans]


if __name__ == "__main__":
    run_main(main)
