"""What a recipe costs before it runs: FLOP, activations kept for backward, memory of a GPU, GPU-days; tables of plans.

Counted on the networks themselves, which may lie on the meta device: no memory and no GPU are needed then.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cli import Config, Parser, parse_config
from common.errors import UserError
from common.options import Count, Portion

HEADROOM = 0.9  # of a GPU's memory; the rest is for the allocator, workspaces and the batch itself


@dataclass(frozen=True)
class Gpu:
    """Memory in GB and dense peak in TFLOP/s."""

    memory_gb: float
    peak_tflops: float


# The makers' data sheets; peaks in half precision on tensor cores.
GPUS = {"v100": Gpu(32, 125), "a100": Gpu(80, 312), "h100": Gpu(80, 989), "h200": Gpu(141, 989)}


@dataclass(frozen=True)
class Cluster:
    """`gpus` cards of one kind, of whose peak the fraction `utilisation` is reached.

    Raises:
        UserError: a kind that is not in `cards`, no cards, or a fraction outside (0, 1].
    """

    gpu: str
    gpus: int
    utilisation: float
    cards: Mapping[str, Gpu] = field(default_factory=lambda: GPUS, repr=False)

    def __post_init__(self) -> None:
        if self.gpu not in self.cards:
            raise UserError(f"unknown GPU {self.gpu!r}; known: {', '.join(self.cards)}")
        if self.gpus < 1 or not 0 < self.utilisation <= 1:
            raise UserError(
                f"--gpus must be at least 1 and --utilisation in (0, 1], got {self.gpus} and {self.utilisation}"
            )

    @property
    def card(self) -> Gpu:
        return self.cards[self.gpu]

    @property
    def room(self) -> float:
        """Bytes of one card that a program can fill."""
        return HEADROOM * self.card.memory_gb * 1e9

    def share(self, batch: int) -> int:
        """Samples of the largest share of a batch."""
        return math.ceil(batch / self.gpus)

    def gpu_days(self, flop: float) -> float:
        return flop / (self.card.peak_tflops * 1e12 * self.utilisation) / 86400

    def describe(self, peak: str = "peak") -> str:
        """`8 x h100 (80 GB, 989 TFLOP/s peak) at 35% of peak`."""
        card, percent = self.card, round(100 * self.utilisation, 1)
        size = f"{card.memory_gb:g} GB, {card.peak_tflops:g} TFLOP/s {peak}"
        return f"{self.gpus} x {self.gpu} ({size}) at {percent:g}% of peak"


@dataclass(frozen=True)
class Fit:
    """How a GPU holds its share of a batch; `recomputed`: each block's activations are computed again for backward."""

    memory_gb: float
    recomputed: bool
    micro_batches: int

    def __str__(self) -> str:
        again = " +ckpt" if self.recomputed else ""
        return f"{self.memory_gb:,.1f}{again}" + (f" x {self.micro_batches}" if self.micro_batches > 1 else "")


def fit(
    cluster: Cluster,
    batch: int,
    state: float,
    kept: float,
    recomputed: float | None = None,
    split: bool = True,
    what: str = "one sample",
) -> Fit:
    """The share of a batch on one GPU: as it is, else with recomputation, else in micro-batches.

    Args:
        state: bytes of weights, gradients and optimizer on one GPU.
        kept: bytes that one sample keeps for its backward pass; `recomputed`: the same with recomputation.
        split: into micro-batches; else a share that does not fit is given with its size.
        what: one sample, for the message.

    Raises:
        UserError: not even one sample fits.
    """
    share = cluster.share(batch)
    again = recomputed is not None and state + share * kept > cluster.room
    each = recomputed if again and recomputed is not None else kept
    at_once = int((cluster.room - state) // each) if split else share
    if at_once < 1:
        raise UserError(
            f"{what} does not fit a {cluster.gpu}: weights, gradients and optimizer alone take {state / 1e9:.1f} GB"
        )
    micro_batches = math.ceil(share / at_once)
    return Fit((state + math.ceil(share / micro_batches) * each) / 1e9, again, micro_batches)


def parameter_count(*modules: nn.Module | None) -> int:
    """Parameters of all modules together, shared ones once."""
    return sum(p.numel() for p in {p for m in modules if m is not None for p in m.parameters()})


def flop(compute: Callable[[], object]) -> int:
    """FLOP of `compute()`: convolutions, matrix products and attention, 2 a multiply-add.

    Attention is written out meanwhile: the fused form of CPUs is not among the operators that torch counts.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        compute()
    return counter.get_total_flops()


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the storage under a tensor."""
    return tensor.untyped_storage().nbytes()


def half_bytes(tensor: Tensor) -> int:
    """Bytes of the storage under a tensor if its numbers had two bytes each."""
    return tensor.untyped_storage().nbytes() // max(1, tensor.element_size()) * 2


def kept_bytes(
    compute: Callable[[], object], parameters: Iterable[nn.Parameter], size: Callable[[Tensor], int] = stored_bytes
) -> int:
    """Bytes that `compute()` keeps for its backward pass, parameters excluded, each storage once.

    Args:
        size: bytes of a kept tensor's storage; of several tensors on one storage the largest counts.
    """
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = max(kept.get(storage, 0), size(tensor))
            alive.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(kept.values())


def number(value: float | None, digits: int = 1) -> str:
    """A cell: `1,234.5`, or "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of cells, the head first, in columns as wide as their widest cell; those in `left` begin at the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def plan_parser(text: str | None, default: Cluster) -> Parser:
    """The options that every plan has."""
    parser = Parser(description=text)
    parser.add_argument("--gpu", default=default.gpu, help=f"one of {', '.join(default.cards)}")
    parser.add_argument("--gpus", type=Count, default=default.gpus, help="how many of these GPUs")
    parser.add_argument(
        "--utilisation",
        type=Portion,
        default=default.utilisation,
        help="fraction of the peak that is reached",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def plan_options(
    text: str | None, default: Cluster, config_class: type[Config], config_file: Path, argv: Sequence[str] | None
) -> tuple[Config, Cluster, bool]:
    """What a plan of a training run is asked for: the run's options, the cluster, and whether to print JSON."""
    parser = plan_parser(text, default)
    parser.add_argument(
        "--config", type=Path, default=config_file, help="a run's options (default: the published recipe)"
    )
    parser.add_argument("--teacher", help="a diffusers directory (default: the config's; absent: Stable Diffusion)")
    options = parser.parse_args(argv)
    given = ["--config", str(options.config)] + (["--teacher", options.teacher] if options.teacher else [])
    config, _ = parse_config(config_class, None, "", given)
    return config, cluster_of(options), options.json


def cluster_of(options: argparse.Namespace, cards: Mapping[str, Gpu] = GPUS) -> Cluster:
    """What `plan_parser`'s options name."""
    return Cluster(options.gpu, options.gpus, options.utilisation, cards)


def show(plans: Sequence[Any], text: str, as_json: bool) -> None:
    """Print plans (dataclasses) as the table `text` or as JSON."""
    print(json.dumps([asdict(plan) for plan in plans], indent=2) if as_json else text)
