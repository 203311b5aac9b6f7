"""What the published models cost, computed from their configurations on the meta device (no memory, no GPU needed).

    make electra-plan                                 the table, for one V100 as in the paper's small models
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

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.cli import parse_config
from common.errors import UserError, run_main
from electra.config import ElectraConfig, ElectraRun
from electra.flops import OFFICIAL_OUTPUT_SHARE, inference_flops, training_flops
from electra.masking import SpecialIds, slots_per_row
from electra.model import Batch, parameter_count
from electra.objectives import ElectraPretrainer

CONFIGS = Path(__file__).resolve().parent / "configs"


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
class Gpu:
    """Memory in GB and dense half-precision tensor-core peak in TFLOP/s (the makers' data sheets)."""

    memory_gb: float
    peak_tflops: float


GPUS = {"v100": Gpu(32, 125), "a100": Gpu(80, 312), "h100": Gpu(80, 989), "h200": Gpu(141, 989)}
# Fraction of the peak reached by encoders of this size; --utilisation overrides it.
UTILISATION = 0.35


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
    discriminator = parameter_count(model.electra, model.discriminator_predictions)
    generator = parameter_count(
        model.generator or model.electra,
        model.generator_embeddings,
        model.generator_predictions,
        model.generator_lm_head,
    )
    trained = parameter_count(model)
    return discriminator, generator, discriminator + generator - trained, trained


@lru_cache(maxsize=8)
def row_cost(config: ElectraConfig, length: int, mask_probability: float) -> tuple[float, int]:
    """(matrix-product FLOP of a training step, bytes of activations kept for backward in bf16) of one full row."""
    chosen = int(slots_per_row([length], mask_probability, length)[0])
    with torch.device("meta"):
        model = ElectraPretrainer(config, SpecialIds(), mask_probability=mask_probability, max_length=length)
        ids_N = torch.zeros(length, dtype=torch.long)
        cu_lengths = torch.zeros(2, dtype=torch.int32)
        batch = Batch(ids_N, ids_N, ids_N, cu_lengths, (length,), length)
        select_M = torch.zeros(chosen, dtype=torch.long)
        generator = _Generator(model)
        flop = sum(_forward_flop(part, batch, ids_N, select_M) for part in (generator, _Discriminator(model)))
        kept = sum(_kept_bytes(part, length, batch, ids_N, select_M) for part in (generator, _Discriminator(model)))
    # Logits: once forward, once more and two products backward.
    head = 2 * chosen * model.generator_embeddings.word_embeddings.embedding_dim * config.vocab_size
    return 3 * flop + 4 * head, kept


class _Generator(nn.Module):
    def __init__(self, model: ElectraPretrainer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, ids_N: Tensor, select_M: Tensor) -> Tensor:
        return self.model.generator_predictions(self.model.generator_hidden(batch, ids_N, select_M))


class _Discriminator(nn.Module):
    def __init__(self, model: ElectraPretrainer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, ids_N: Tensor, select_M: Tensor) -> Tensor:
        return self.model.discriminate(batch, ids_N)


def _forward_flop(module: nn.Module, *inputs: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops()


def _kept_bytes(module: nn.Module, length: int, *inputs: object) -> int:
    """Bytes that autograd keeps in training: 2 a number, 1 a dropout mask's entry; parameters and scores excluded.

    FlashAttention keeps no scores, which on the meta device are the tensors that end in length x length.
    """
    kept: dict[int, int] = {}
    holders: list[Tensor] = []  # keeps storages alive, so that their addresses stay distinct
    own = {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        scores = tensor.dim() >= 3 and tuple(tensor.shape[-2:]) == (length, length)
        if storage._cdata not in own and not scores and tensor.dim() > 1:
            size = tensor.element_size()
            kept[storage._cdata] = storage.nbytes() // size * (1 if tensor.dtype == torch.bool else 2)
            holders.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module.train()(*inputs)
    return sum(kept.values())


def plan(name: str, gpu: str = "v100", gpus: int = 1, utilisation: float = UTILISATION) -> Plan:
    """Cost of one published model on `gpus` x `gpu`."""
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if gpus < 1 or not 0 < utilisation <= 1:
        raise UserError(f"--gpus must be at least 1 and --utilisation in (0, 1], got {gpus} and {utilisation}")
    run, config = paper_config(name)
    length, batch, steps = run.data.length, run.trainer.batch_size, run.trainer.max_steps
    discriminator, generator, shared, trained = count_parameters(config, run.objective.mask_probability)
    row_flop, row_bytes = row_cost(config, length, run.objective.mask_probability)
    state = 16 * trained
    share = math.ceil(batch / gpus)
    room = 0.9 * GPUS[gpu].memory_gb * 1e9 - state  # a tenth for the allocator, workspaces and the batch itself
    if room < row_bytes:
        raise UserError(f"{name} does not fit a {gpu}: weights and optimizer alone take {state / 1e9:.1f} GB")
    micro_batches = math.ceil(share / (room // row_bytes))
    memory = (state + math.ceil(share / micro_batches) * row_bytes) / 1e9
    return Plan(
        name,
        discriminator,
        generator,
        shared,
        trained,
        batch,
        length,
        steps,
        # The authors' table counts softmaxes at 15.625 % of the tokens, for Large's 25 % masks too.
        training_flops(config, "electra", steps, batch, length, output_share=OFFICIAL_OUTPUT_SHARE),
        inference_flops(config, 128),
        batch * row_flop,
        row_bytes,
        state,
        memory,
        micro_batches,
        batch * row_flop * steps / (GPUS[gpu].peak_tflops * 1e12 * utilisation) / 86400,
        PUBLISHED[name],
    )


def table(plans: Sequence[Plan], gpu: str, gpus: int, utilisation: float) -> str:
    """The plans as aligned text."""
    head = (
        "model|disc M|gen M|joint M|paper M|batch x length|steps|FLOPs (paper)|inference (paper)|TFLOP/step|GB/GPU|"
        "GPU-days|paper's cost"
    )
    rows = [head.split("|")]
    for p in plans:
        inference = "-" if p.paper.inference_flops is None else f"{p.paper.inference_flops:.1e}"
        rows.append(
            [
                p.name,
                f"{p.discriminator_parameters / 1e6:.1f}",
                f"{p.generator_parameters / 1e6:.1f}",
                f"{p.trained_parameters / 1e6:.1f}",
                f"{p.paper.parameters:.0f}",
                f"{p.batch} x {p.length}",
                f"{p.steps:,}",
                f"{p.training_flops:.2e} ({p.paper.training_flops:.1e})",
                f"{p.inference_flops:.2e} ({inference})",
                f"{p.step_flop / 1e12:.2f}",
                f"{p.memory_gb_per_gpu:.1f}" + (f" x {p.micro_batches}" if p.micro_batches > 1 else ""),
                f"{p.gpu_days:.2f}",
                p.paper.cost or "-",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    machine = GPUS[gpu]
    cluster = (
        f"{gpus} x {gpu} ({machine.memory_gb:.0f} GB, {machine.peak_tflops:.0f} TFLOP/s peak) at {utilisation:.0%}"
    )
    return "\n".join([f"cluster: {cluster} of peak; '-': not published", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(PUBLISHED)} (default: all)")
    parser.add_argument("--gpu", default="v100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="fraction of the peak that is reached")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    plans = [plan(name, options.gpu, options.gpus, options.utilisation) for name in options.models or PUBLISHED]
    if options.json:
        print(json.dumps([asdict(p) for p in plans], indent=1))
    else:
        print(table(plans, options.gpu, options.gpus, options.utilisation))


if __name__ == "__main__":
    run_main(main)
