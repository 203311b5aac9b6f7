"""The search space and PC-DARTS as citizens of nni 3.0 (optional): `pip install nni==3.0`.

    space = DartsSpace(channels=8, cells=3, classes=10, partial=4)          # any strategy of nni searches it
    strategy = PartialDarts(warmup_epochs=15)                               # PC-DARTS as a one-shot strategy
    strategy(RawFormatModelSpace(space, Lightning(module, trainer, loader, loader)), SequentialExecutionEngine())
    cell = strategy.genotype()                                              # pc_darts.genotypes.Genotype

Every edge holds a LayerChoice over the eight operations (equation 2 around it), every node an InputChoice of two of its
edges; labels are shared by all cells of a kind. nni's differentiable InputChoice is a softmax over the incoming edges,
which is edge normalisation (equation 3). Samples with K = 1 are networks of the DARTS space for nni's multi-trial
strategies (random, regularised evolution). nni ranks raw alphas across edges and knows no `none`; the derivation here
is the authors'.

Shape suffixes: B batch, C channels, H W sides, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

try:
    from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace
    from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedInput, DifferentiableMixedLayer
    from nni.nas.strategy import DARTS
except Exception as error:  # nni fails in many ways where its own requirements do not fit
    raise UserError(
        f"pc_darts.nni_adapter needs nni 3.0, which cannot be imported here ({error}); install it with "
        "`pip install nni==3.0`, or use pc_darts/train.py, which does without"
    ) from None

from pc_darts.genotypes import Choice, Genotype, derive, edge_count
from pc_darts.operations import PRIMITIVES, BatchNorm, FactorizedReduce, ReLUConvBN, make_operation, rearrange
from pc_darts.search_space import STEM_MULTIPLIER, is_reduction, make_stem

KINDS = ("normal", "reduce")


class PartialEdge(nn.Module):
    """Equation 2 around a choice of nni: 1/K of the channels pass the chosen or mixed operation, the others do not."""

    def __init__(self, channels: int, stride: int, partial: int, label: str) -> None:
        super().__init__()
        self.processed, self.partial, self.stride = channels // partial, partial, stride
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        operations: dict[str, nn.Module] = {}
        for name in PRIMITIVES:
            operation = make_operation(name, self.processed, stride, affine=False)
            if "pool" in name:
                operation = nn.Sequential(operation, BatchNorm(self.processed, affine=False))
            operations[name] = operation
        self.choice = LayerChoice(operations, label=label)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        chosen = self.choice(x_BCHW[:, : self.processed])
        if self.partial == 1:
            return chosen
        bypass = x_BCHW[:, self.processed :]
        if self.stride == 2:
            bypass = self.pool(bypass)
        return rearrange(torch.cat([chosen, bypass], 1), self.partial, "shuffle", None)


class ChoiceCell(nn.Module):
    """A cell whose edges and nodes are choices."""

    def __init__(
        self,
        before_last: int,
        last: int,
        channels: int,
        nodes: int,
        partial: int,
        reduction: bool,
        after_reduction: bool,
    ) -> None:
        super().__init__()
        kind = KINDS[reduction]
        self.nodes = nodes
        first = FactorizedReduce if after_reduction else ReLUConvBN
        self.preprocess0 = first(before_last, channels, affine=False)
        self.preprocess1 = ReLUConvBN(last, channels, affine=False)
        places = [(node, state) for node in range(nodes) for state in range(2 + node)]
        self.edges = nn.ModuleList(
            PartialEdge(channels, 2 if reduction and state < 2 else 1, partial, f"{kind}_edge{number}")
            for number, (_, state) in enumerate(places)
        )
        self.inputs = nn.ModuleList(
            InputChoice(2 + node, n_chosen=2, reduction="sum", label=f"{kind}_node{node}") for node in range(nodes)
        )

    def forward(self, s0_BCHW: Tensor, s1_BCHW: Tensor) -> Tensor:
        states = [self.preprocess0(s0_BCHW), self.preprocess1(s1_BCHW)]
        first = 0
        for node in range(self.nodes):
            incoming = [self.edges[first + place](state) for place, state in enumerate(states)]
            first += len(states)
            states.append(self.inputs[node](incoming))
        return torch.cat(states[2:], 1)


class DartsSpace(ModelSpace, label_prefix="cell"):  # type: ignore[call-arg]
    """The DARTS space of section 2.1 as a model space of nni; K = `partial`, CIFAR-like stem."""

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        classes: int = 10,
        partial: int = 4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.nodes = nodes
        width, stem = channels, STEM_MULTIPLIER * channels
        self.stem = make_stem("cifar", in_channels, stem, stem // 2)["stem"]
        before_last = last = stem
        after_reduction = False
        self.cells = nn.ModuleList()
        for index in range(cells):
            reduction = is_reduction(index, cells)
            width *= 2 if reduction else 1
            self.cells.append(ChoiceCell(before_last, last, width, nodes, partial, reduction, after_reduction))
            before_last, last, after_reduction = last, nodes * width, reduction
        self.classifier = nn.Linear(last, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to logits [B, K]."""
        s0_BCHW = s1_BCHW = self.stem(x_BCHW)
        for cell in self.cells:
            s0_BCHW, s1_BCHW = s1_BCHW, cell(s0_BCHW, s1_BCHW)
        return self.classifier(s1_BCHW.mean((2, 3)))


def genotype_of(sample: Mapping[str, Any], nodes: int = 4) -> Genotype:
    """Library. The cell that a sample of `DartsSpace` stands for.

    Raises:
        UserError: a label is missing, or a chosen edge carries `none`, which no cell has.
    """
    short = {str(label).rsplit("/", 1)[-1]: value for label, value in sample.items()}
    cells: dict[str, list[Choice]] = {}
    for kind in KINDS:
        cells[kind] = []
        edge = 0
        for node in range(nodes):
            try:
                states = sorted(short[f"{kind}_node{node}"])
                chosen = [(short[f"{kind}_edge{edge + state}"], state) for state in states]
            except KeyError as missing:
                raise UserError(f"the sample has no choice {missing}; expected a sample of DartsSpace") from None
            if any(name == "none" for name, _ in chosen):
                raise UserError(f"{kind} node {node} takes an edge that carries `none`; such a sample is no cell")
            cells[kind] += chosen
            edge += 2 + node
    concat = tuple(range(2, 2 + nodes))
    return Genotype(tuple(cells["normal"]), concat, tuple(cells["reduce"]), concat)


def sample_of(genotype: Genotype, labels: Mapping[str, Any]) -> dict[str, Any]:
    """The sample of a `DartsSpace` for a cell; edges that the cell does not take carry `none`.

    labels: the space's own, `space.simplify()`.
    """
    short: dict[str, Any] = {}
    for kind, choices in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        short |= {f"{kind}_edge{edge}": "none" for edge in range(edge_count(genotype.nodes))}
        first = 0
        for node in range(genotype.nodes):
            pair = choices[2 * node : 2 * node + 2]
            short[f"{kind}_node{node}"] = sorted(state for _, state in pair)
            short |= {f"{kind}_edge{first + state}": name for name, state in pair}
            first += 2 + node
    return {label: short[str(label).rsplit("/", 1)[-1]] for label in labels}


class PartialDarts(DARTS):
    """PC-DARTS as a one-shot strategy: warm-up, Adam on alphas and betas, the authors' derivation.

    Partial channels are the space's (`DartsSpace(partial=K)`); the architecture's optimiser is nni's, which is the
    paper's (Adam, betas 0.5 and 0.999, decay 1e-3).
    """

    def __init__(self, warmup_epochs: int = 15, arc_learning_rate: float = 6e-4, **options: Any) -> None:
        super().__init__(warmup_epochs=warmup_epochs, arc_learning_rate=arc_learning_rate, **options)

    def architecture(self) -> dict[str, Tensor]:
        """Alphas [E, O] and betas [E] of both kinds of cell, named as in `SearchNetwork`."""
        nodes = self._nodes()
        logits: dict[str, Tensor] = {}
        for module in self.supernet.modules():
            if isinstance(module, (DifferentiableMixedLayer, DifferentiableMixedInput)):
                logits[str(module.label).rsplit("/", 1)[-1]] = module._arch_alpha.detach()
        found = {}
        for kind in KINDS:
            edges = range(edge_count(nodes))
            found[f"alphas_{kind}"] = torch.stack([logits[f"{kind}_edge{edge}"] for edge in edges])
            found[f"betas_{kind}"] = torch.cat([logits[f"{kind}_node{node}"] for node in range(nodes)])
        return found

    def genotype(self) -> Genotype:
        """The derived cell."""
        found = self.architecture()
        return derive(found["alphas_normal"], found["alphas_reduce"], found["betas_normal"], found["betas_reduce"])

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[Any]:
        """The space frozen to the derived cell, instead of nni's argmax of raw alphas."""
        space = self.model_space
        yield space.freeze(sample_of(self.genotype(), space.simplify()))

    def _nodes(self) -> int:
        supernet = self.supernet
        assert isinstance(supernet, DartsSpace)
        return supernet.nodes
