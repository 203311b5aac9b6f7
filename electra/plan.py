"""What the published models cost, computed from their configurations on the meta device (no memory, no GPU needed).

    make electra-plan  # the table, for one V100 as in the paper's small models
    python electra/plan.py --gpu h200 --gpus 8 large
    python electra/plan.py --json

Columns
  disc, gen, joint   parameters in millions: discriminator with its head, generator with its head and the shared
                     embeddings, and what is trained (shared parameters once)
  FLOPs (paper)      of the whole training, counted as the authors count them (flops.py), beside Tables 1 and 2
  inference (paper)  forward pass of one sequence of 128 tokens, likewise
  TFLOP/step         matrix products that this implementation runs for the whole batch: the vocabulary's logits at the
                     chosen tokens only, twice, because the backward pass computes them again
  GB/GPU             weights, gradients and both moments in float32 (16 bytes a parameter) and the activations kept for
                     the backward pass in bf16 (layer norms' and dropout's included), for the GPU's share of the batch;
                     "x n" where the share has to be taken in n micro-batches
  GPU-days           TFLOP/step x steps / (peak x utilisation)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import costs
from common.cli import parse_config
from common.errors import UserError, run_main
from electra.config import ElectraConfig, ElectraRun
from electra.flops import OFFICIAL_OUTPUT_SHARE, inference_flops, training_flops
from electra.masking import SpecialIds, slots_per_row
from electra.model import Batch
from electra.objectives import ElectraPretrainer

CONFIGS = Path(__file__).resolve().parent / "configs"
# Utilisation: what encoders of this size reach.
DEFAULT = costs.Cluster("v100", 1, 0.35)


@dataclass(frozen=True)
class Published:
    """What the paper reports of a model.

    Args:
        training_flops: Table 1 for small and base, Table 2 for large.
        inference_flops: Table 1.
        parameters: in millions, Tables 1 and 2.
        cost: Table 1.
    """

    training_flops: float
    inference_flops: float | None
    parameters: float
    cost: str | None


PUBLISHED = {
    "small": Published(1.4e18, 3.7e9, 14, "4 d on 1 V100"),
    "base": Published(6.4e19, 2.9e10, 110, "4 d on 16 TPUv3"),
    "large": Published(7.1e20, None, 335, None),
}


@dataclass(frozen=True)
class Plan:
    """Cost of one published model; see the module's text for the columns."""

    name: str
    discriminator_parameters: int
    generator_parameters: int
    shared_parameters: int
    trained_parameters: int
    batch: int
    length: int
    steps: int
    training_flops: float
    inference_flops: float
    step_flop: float
    activation_bytes_per_row: int
    state_bytes: int
    memory_gb_per_gpu: float
    micro_batches: int
    gpu_days: float
    paper: Published


def paper_config(name: str) -> tuple[ElectraRun, ElectraConfig]:
    """A published model's run and network, from configs/paper_<name>.yaml.

    Raises:
        UserError: no such model.
    """
    if name not in PUBLISHED:
        raise UserError(f"no published model {name!r}; there are: {', '.join(PUBLISHED)}")
    run, _ = parse_config(ElectraRun, CONFIGS / f"paper_{name}.yaml", "", [])
    return run, run.model.with_vocabulary(run.data.vocabulary_size)


def count_parameters(config: ElectraConfig, mask_probability: float = 0.15) -> tuple[int, int, int, int]:
    """(discriminator, generator, embeddings that both share, trained together), each with its head."""
    with torch.device("meta"):
        model = ElectraPretrainer(config, SpecialIds(), mask_probability=mask_probability)
    discriminator = costs.parameter_count(model.electra, model.discriminator_predictions)
    generator = costs.parameter_count(
        model.generator or model.electra,
        model.generator_embeddings,
        model.generator_predictions,
        model.generator_lm_head,
    )
    trained = costs.parameter_count(model)
    return discriminator, generator, discriminator + generator - trained, trained


@cache
def row_cost(config: ElectraConfig, length: int, mask_probability: float) -> tuple[float, int]:
    """(matrix-product FLOP of a training step, bytes of activations kept for backward in bf16) of one full row."""
    chosen = int(slots_per_row([length], mask_probability, length)[0])

    def size(tensor: Tensor) -> int:
        """2 bytes a number, 1 a dropout mask's entry. FlashAttention keeps no scores: those end in length x length."""
        scores = tensor.dim() >= 3 and tuple(tensor.shape[-2:]) == (length, length)
        if scores or tensor.dim() < 2:
            return 0
        return costs.half_bytes(tensor) // (2 if tensor.dtype == torch.bool else 1)

    flop = kept = 0
    with torch.device("meta"):
        model = ElectraPretrainer(config, SpecialIds(), mask_probability=mask_probability, max_length=length)
        ids_N = torch.zeros(length, dtype=torch.long)
        batch = Batch(ids_N, ids_N, ids_N, torch.zeros(2, dtype=torch.int32), (length,), length)
        select_M = torch.zeros(chosen, dtype=torch.long)
        for compute in (
            lambda: model.generator_predictions(model.generator_hidden(batch, ids_N, select_M)),
            lambda: model.discriminate(batch, ids_N),
        ):
            with torch.no_grad():
                flop += costs.flop(compute)
            kept += costs.kept_bytes(compute, model.parameters(), size)
    # Logits: once forward, once more and two products backward.
    head = 2 * chosen * model.generator_embeddings.word_embeddings.embedding_dim * config.vocab_size
    return 3 * flop + 4 * head, kept


def plan(name: str, cluster: costs.Cluster = DEFAULT) -> Plan:
    """Cost of one published model on a cluster."""
    run, config = paper_config(name)
    length, batch, steps = run.data.length, run.trainer.batch_size, run.trainer.max_steps
    counted = count_parameters(config, run.objective.mask_probability)
    row_flop, row_bytes = row_cost(config, length, run.objective.mask_probability)
    state = 16 * counted[-1]
    held = costs.fit(cluster, batch, state, row_bytes, what=name)
    return Plan(
        name,
        *counted,
        batch,
        length,
        steps,
        # The authors' table counts softmaxes at 15.625 % of the tokens, for Large's 25 % masks too.
        training_flops(config, "electra", steps, batch, length, output_share=OFFICIAL_OUTPUT_SHARE),
        inference_flops(config, 128),
        batch * row_flop,
        row_bytes,
        state,
        held.memory_gb,
        held.micro_batches,
        cluster.gpu_days(batch * row_flop * steps),
        PUBLISHED[name],
    )


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plans as aligned text."""
    head = (
        "model|disc M|gen M|joint M|paper M|batch x length|steps|FLOPs (paper)|inference (paper)|TFLOP/step|GB/GPU|"
        "GPU-days|paper's cost"
    )
    rows = [
        [
            p.name,
            *(f"{n / 1e6:.1f}" for n in (p.discriminator_parameters, p.generator_parameters, p.trained_parameters)),
            f"{p.paper.parameters:.0f}",
            f"{p.batch} x {p.length}",
            f"{p.steps:,}",
            f"{p.training_flops:.2e} ({p.paper.training_flops:.1e})",
            f"{p.inference_flops:.2e} ("
            + ("-" if p.paper.inference_flops is None else f"{p.paper.inference_flops:.1e}")
            + ")",
            f"{p.step_flop / 1e12:.2f}",
            str(costs.Fit(p.memory_gb_per_gpu, False, p.micro_batches)),
            f"{p.gpu_days:.2f}",
            p.paper.cost or "-",
        ]
        for p in plans
    ]
    return f"cluster: {cluster.describe()}; '-': not published\n" + costs.aligned([head.split("|"), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(PUBLISHED)} (default: all)")
    options = parser.parse_args(arguments)
    cluster = costs.cluster_of(options)
    plans = [plan(name, cluster) for name in options.models or PUBLISHED]
    costs.show(plans, table(plans, cluster), options.json)


if __name__ == "__main__":
    run_main(main)
