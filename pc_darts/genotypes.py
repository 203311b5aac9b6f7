"""A searched cell as data: two operations for every node; published tables; derivation from alphas and betas.

Source: arXiv 1907.05737 section 3.3 and figures 3, 4; yuhuixu1993/PC-DARTS, genotypes.py and model_search.py.

State indices: 0 and 1 are the two inputs of a cell, 2, 3, ... its nodes. Edges are numbered node by node: node 0 has
the edges from states 0, 1; node 1 from states 0, 1, 2; and so on. Shape suffixes: E edges of a cell, O operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt, log
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_json
from common.literals import logged_call
from pc_darts.operations import FURTHER_OPERATIONS, PRIMITIVES

Choice = tuple[str, int]  # operation, state it reads


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell: two (operation, state) a node, and the states whose concatenation is the output.

    Raises:
        UserError: an unknown operation, a state that is not there yet, or an odd number of choices.
    """

    normal: tuple[Choice, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Choice, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for kind in ("normal", "reduce"):
            try:
                choices = tuple((str(name), int(state)) for name, state in getattr(self, kind))
                concat = tuple(int(state) for state in getattr(self, f"{kind}_concat"))
            except (TypeError, ValueError):
                raise UserError(f"genotype: {kind} must be a list of (operation, state) pairs") from None
            object.__setattr__(self, kind, choices)
            object.__setattr__(self, f"{kind}_concat", concat)
            if not choices or len(choices) % 2:
                raise UserError(f"genotype: {kind} has {len(choices)} choices, expected two for every node")
            for i, (name, state) in enumerate(choices):
                if name not in PRIMITIVES + FURTHER_OPERATIONS or name == "none":
                    raise UserError(f"genotype: {kind} names the operation {name!r}, which no final network has")
                if not 0 <= state < 2 + i // 2:
                    raise UserError(f"genotype: node {i // 2} of {kind} reads state {state}, which comes after it")
            if not concat or not all(0 <= state < 2 + len(choices) // 2 for state in concat):
                raise UserError(f"genotype: {kind}_concat {list(concat)} names states that the cell does not have")

    def choices(self, reduction: bool) -> tuple[Choice, ...]:
        return self.reduce if reduction else self.normal

    def concat(self, reduction: bool) -> tuple[int, ...]:
        return self.reduce_concat if reduction else self.normal_concat

    @property
    def nodes(self) -> int:
        return len(self.normal) // 2

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """A published name, JSON, or what the authors' programs log: `Genotype(normal=[...], ...)`.

        Raises:
            UserError: the text is none of them.
        """
        text = text.strip()
        if text in PUBLISHED:
            return PUBLISHED[text]
        try:
            fields = logged_call(text) if text.startswith("Genotype(") else json.loads(text)
            return cls(**{name: fields[name] for name in ("normal", "normal_concat", "reduce", "reduce_concat")})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"genotype {text[:60]!r} cannot be read; expected one of {', '.join(PUBLISHED)}, JSON with normal, "
                "normal_concat, reduce and reduce_concat, or a logged Genotype(...)"
            ) from None

    @classmethod
    def load(cls, name_or_path: str | Path) -> Genotype:
        """A published name or a file with JSON or a logged genotype.

        Raises:
            UserError: neither, or the file cannot be read.
        """
        if str(name_or_path) in PUBLISHED:
            return PUBLISHED[str(name_or_path)]
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"genotype {str(name_or_path)!r} is neither a readable file nor one of {', '.join(PUBLISHED)}"
            ) from None
        return cls.parse(text)


def _cell(text: str) -> tuple[Choice, ...]:
    """`sep3:1 skip:0 ...` with the short names of the paper's figures."""
    return tuple((SHORT_NAMES[name], int(state)) for name, state in (item.split(":") for item in text.split()))


SHORT_NAMES = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "sep7": "sep_conv_7x7",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
    "conv7": "conv_7x1_1x7",
}
_FOUR = (2, 3, 4, 5)
# genotypes.py of yuhuixu1993/PC-DARTS (figures 3 and 4 of the paper) and of quark0/darts.
PUBLISHED: dict[str, Genotype] = {
    "PC_DARTS_cifar": Genotype(
        _cell("sep3:1 skip:0 sep3:0 dil3:1 sep5:0 sep3:1 avg:0 dil3:1"),
        _FOUR,
        _cell("sep5:1 max:0 sep5:1 sep5:2 sep3:0 sep3:3 sep3:1 sep3:2"),
        _FOUR,
    ),
    "PC_DARTS_image": Genotype(
        _cell("skip:1 sep3:0 sep3:0 skip:1 sep3:1 sep3:3 sep3:1 dil5:4"),
        _FOUR,
        _cell("sep3:0 skip:1 dil5:2 max:1 sep3:2 sep3:1 sep5:0 sep3:3"),
        _FOUR,
    ),
    "DARTS_V1": Genotype(
        _cell("sep3:1 sep3:0 skip:0 sep3:1 skip:0 sep3:1 sep3:0 skip:2"),
        _FOUR,
        _cell("max:0 max:1 skip:2 max:0 max:0 skip:2 skip:2 avg:0"),
        _FOUR,
    ),
    "DARTS_V2": Genotype(
        _cell("sep3:0 sep3:1 sep3:0 sep3:1 sep3:1 skip:0 skip:0 dil3:2"),
        _FOUR,
        _cell("max:0 max:1 skip:2 max:1 max:0 skip:2 skip:2 max:1"),
        _FOUR,
    ),
    "NASNet": Genotype(
        _cell("sep5:1 sep3:0 sep5:0 sep3:0 avg:1 skip:0 avg:0 avg:0 sep3:1 skip:1"),
        (2, 3, 4, 5, 6),
        _cell("sep5:1 sep7:0 max:1 sep7:0 avg:1 sep5:0 skip:3 avg:2 sep3:2 max:1"),
        (4, 5, 6),
    ),
    "AmoebaNet": Genotype(
        _cell("avg:0 max:0 sep3:0 sep5:2 sep3:0 avg:3 sep3:1 skip:1 skip:0 avg:1"),
        (4, 5, 6),
        _cell("avg:0 sep3:1 max:0 sep7:2 sep7:0 avg:1 max:0 max:1 conv7:0 sep3:5"),
        (3, 4, 6),
    ),
}


def edge_count(nodes: int) -> int:
    """2 + 3 + ... edges of a search cell with `nodes` nodes: 14 for 4."""
    return nodes * (nodes + 3) // 2


def node_count(edges: int) -> int:
    """Inverse of `edge_count`.

    Raises:
        UserError: no cell has so many edges.
    """
    nodes = (isqrt(9 + 8 * edges) - 3) // 2
    if nodes < 1 or edge_count(nodes) != edges:
        raise UserError(f"{edges} edges fit no cell; expected 2, 5, 9, 14, 20, ... rows of alphas")
    return nodes


def edge_softmax(betas_E: Tensor) -> Tensor:
    """Softmax over the edges into each node (equation 3), in the order of the edges."""
    return torch.cat([part.softmax(-1) for part in betas_E.split([2 + i for i in range(node_count(len(betas_E)))])])


@dataclass(frozen=True)
class Cap:
    """A bound on a cost that is a sum over the chosen operations.

    total: cost of the final network of a genotype. operation: cost of (reduction cell?, operation, state it reads).
    """

    limit: float
    total: Callable[[Genotype], float]
    operation: Callable[[bool, str, int], float]
    name: str = "cost"


def derive(
    alphas_normal: Tensor,
    alphas_reduce: Tensor,
    betas_normal: Tensor | None = None,
    betas_reduce: Tensor | None = None,
    cap: Cap | None = None,
) -> Genotype:
    """The discrete cell of section 3.3: each node keeps the two edges whose best operation weighs most.

    An operation weighs softmax(alpha) * softmax(beta), `none` being excluded from the choice but not from the softmax.
    With a `cap`, every weight is divided by exp(price * cost), with the lowest price that meets it.

    Args:
        alphas_normal, alphas_reduce: [E, O] logits over PRIMITIVES. betas_*: [E] logits, or None.

    Raises:
        UserError: the cap is below the cheapest cell, or the shapes fit no cell.
    """
    weights = {False: _edge_weights(alphas_normal, betas_normal), True: _edge_weights(alphas_reduce, betas_reduce)}
    free = _discretise(weights, None, 0.0)
    if cap is None or cap.total(free) <= cap.limit:
        return free
    low, high = 0.0, 1.0 / max(cap.limit, 1e-12)
    while cap.total(_discretise(weights, cap, high)) > cap.limit:
        low, high = high, high * 4
        if high * cap.limit > 1e12:
            least = cap.total(_discretise(weights, cap, high))
            raise UserError(f"no cell has a {cap.name} of {cap.limit:g} or less; the cheapest one has {least:g}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cap.total(_discretise(weights, cap, middle)) > cap.limit else (low, middle)
    return _discretise(weights, cap, high)


def _edge_weights(alphas_EO: Tensor, betas_E: Tensor | None) -> list[list[float]]:
    if alphas_EO.ndim != 2 or alphas_EO.shape[1] != len(PRIMITIVES):
        raise UserError(f"alphas have the shape {list(alphas_EO.shape)}, expected [edges, {len(PRIMITIVES)}]")
    weights_EO = alphas_EO.detach().float().cpu().softmax(-1)
    if betas_E is not None:
        weights_EO = weights_EO * edge_softmax(betas_E.detach().float().cpu())[:, None]
    return weights_EO.tolist()


def _discretise(weights: Mapping[bool, Sequence[Sequence[float]]], cap: Cap | None, price: float) -> Genotype:
    cells: dict[bool, list[Choice]] = {False: [], True: []}
    for reduction, rows in weights.items():
        edge = 0
        for node in range(node_count(len(rows))):
            best: list[tuple[float, str, int]] = []
            for state in range(2 + node):
                scores = [
                    (weight if cap is None else _priced(weight, price * cap.operation(reduction, name, state)), name)
                    for name, weight in zip(PRIMITIVES, rows[edge], strict=True)
                    if name != "none"
                ]
                score, name = max(scores, key=lambda pair: pair[0])  # the first of equals, like argmax
                best.append((score, name, state))
                edge += 1
            best.sort(key=lambda entry: -entry[0])  # stable: the earlier state of equals
            cells[reduction] += [(name, state) for _, name, state in best[:2]]
    concat = {reduction: tuple(range(2, 2 + len(choices) // 2)) for reduction, choices in cells.items()}
    return Genotype(tuple(cells[False]), concat[False], tuple(cells[True]), concat[True])


def _priced(weight: float, charge: float) -> float:
    """Logarithm of weight / exp(charge); weights that underflowed stay comparable."""
    return log(max(weight, 1e-300)) - charge
