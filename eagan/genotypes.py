"""Architectures as genes: which are valid, how they are drawn, and how one edge of them is changed.

Source: arXiv 2111.15097 sections 3.1, 3.2 and 4.3; marsggbo/EAGAN for the encoding, which is one integer an edge where
the paper has one-hot rows. Its operators' faults are not copied: both genes of a pair of down-sampling edges are -1 or
none is, every edge of a discriminator is sampled, and a crossover of equal parents ends.

A cell of a generator is [up0, up1 | c0, c1 | c2, c3, c4]: node0 = up0(x), node1 = up1(x),
node2 = c0(node0) + c1(node1), node3 = c2(node0) + c3(node1) + c4(node2). A cell of a discriminator is
[c0 | c1, c2 | c3, c4 | down0, down1]: node1 = c0(x), node2 = c1(x) + c2(node1), node3 = c3(node1) + c4(x),
output = down0(node2) + down1(node3).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from common.errors import UserError, first_line
from common.files import read_object, write_json

Genes = tuple[tuple[int, ...], ...]

CELLS, GENES = 3, 7
NONE, SKIP = 0, 1
KEEP = -1  # of both down-sampling edges: the cell keeps its sides
NORMAL_OPS = ("none", "skip", "conv 1x1", "conv 3x3", "conv 5x5", "dilated 3x3", "dilated 5x5")
UP_OPS = ("nearest", "bilinear", "transposed")
DOWN_OPS = ("average", "maximum", "conv 3x3", "conv 5x5", "dilated 3x3", "dilated 5x5")
TRIES = 200  # of a new child, before a fresh sample takes its place

UP_EDGES = ("up0", "up1", "c0", "c1", "c2", "c3", "c4")
DOWN_EDGES = ("c0", "c1", "c2", "c3", "c4", "down0", "down1")


@dataclass(frozen=True)
class Space:
    """The architectures of one of the two networks.

    Args:
        edges: their names, in the order of the genes; choices: the genes that each may have.
        inputs: genes of which not all may be none, for each node that needs an input.
        paired: the first of two genes that are -1 together or not at all; None where there are none.
    """

    name: str
    edges: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    paired: int | None = None

    def connected(self, genes: Genes) -> bool:
        """Every gene is one that its edge may have, and every node has an input."""
        return all(
            all(gene in choice for gene, choice in zip(cell, self.choices))
            and all(any(cell[edge] != NONE for edge in group) for group in self.inputs)
            for cell in genes
        )

    def valid(self, genes: Genes) -> bool:
        """`connected`, and down-sampling edges in pairs."""
        return self.connected(genes) and not any(self.half_paired(cell) for cell in genes)

    def half_paired(self, cell: Sequence[int]) -> bool:
        """Whether one of the paired edges keeps the sides and the other does not: their sum has no meaning."""
        if self.paired is None:
            return False
        return (cell[self.paired] == KEEP) != (cell[self.paired + 1] == KEEP)

    def sample(self, random: Random) -> Genes:
        """A valid architecture, uniform over the genes."""
        cells: list[tuple[int, ...]] = []
        while len(cells) < CELLS:
            cell = [random.choice(choice) for choice in self.choices]
            if self.paired is not None:
                if cell[self.paired] == KEEP:
                    cell[self.paired + 1] = KEEP
                elif cell[self.paired + 1] == KEEP:
                    continue
            if self.valid((tuple(cell),)):
                cells.append(tuple(cell))
        return tuple(cells)

    def change(self, genes: Genes, cell: int, edge: int, gene: int) -> Genes:
        """One edge with another gene. To keep the sides, or to begin to halve them, concerns both paired edges."""
        changed = list(genes[cell])
        changed[edge] = gene
        if self.paired is not None and edge >= self.paired:
            other = 2 * self.paired + 1 - edge
            if gene == KEEP or changed[other] == KEEP:
                changed[other] = gene
        return (*genes[:cell], tuple(changed), *genes[cell + 1 :])

    def mutations(self, genes: Genes) -> Iterator[tuple[tuple[int, int], Genes]]:
        """((cell, edge), child): every valid child that differs in one edge."""
        for cell in range(CELLS):
            for edge, choice in enumerate(self.choices):
                for gene in choice:
                    child = self.change(genes, cell, edge, gene)
                    if child != genes and self.valid(child):
                        yield (cell, edge), child

    def crossovers(self, genes: Genes, other: Genes) -> Iterator[tuple[tuple[int, int], Genes]]:
        """((cell, edge), child): every valid child that takes one differing edge from `other`."""
        for cell in range(CELLS):
            for edge in range(GENES):
                child = self.change(genes, cell, edge, other[cell][edge])
                if child != genes and self.valid(child):
                    yield (cell, edge), child


_NORMAL = tuple(range(len(NORMAL_OPS)))
_UP = tuple(range(len(UP_OPS)))
_DOWN = (KEEP, *range(len(DOWN_OPS)))
GENERATOR = Space("generator", UP_EDGES, (_UP, _UP, *[_NORMAL] * 5), ((2, 3), (4, 5, 6)))
DISCRIMINATOR = Space(
    "discriminator", DOWN_EDGES, (_NORMAL[1:], *[_NORMAL] * 4, _DOWN, _DOWN), ((1, 2), (3, 4)), paired=5
)

# The authors' exps/*.npy.
PUBLISHED: dict[str, Genes] = {
    "best_G": ((1, 1, 1, 0, 2, 3, 1), (1, 1, 0, 1, 3, 0, 5), (0, 1, 0, 3, 0, 0, 3)),
    "cifar10_D": ((3, 0, 3, 0, 2, 0, 0), (1, 0, 3, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
    "stl10_D": ((3, 0, 3, 0, 2, 0, 0), (4, 0, 4, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
    "base_D": ((3, 0, 3, 0, 2, 0, 0), (3, 0, 3, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
}
SIMPLE = "simple"  # the plain discriminator of five convolutions, which has no genes


def one_edge(
    children: Iterator[tuple[tuple[int, int], Genes]], random: Random, taken: Collection[Genes]
) -> Genes | None:
    """A child by an edge drawn uniformly and then a gene drawn uniformly; None where no new one is left."""
    by_edge: dict[tuple[int, int], list[Genes]] = {}
    for edge, child in children:
        if child not in taken:
            by_edge.setdefault(edge, []).append(child)
    return random.choice(by_edge[random.choice(list(by_edge))]) if by_edge else None


def breed(
    space: Space, parents: Sequence[Genes], random: Random, taken: Collection[Genes], crossover: float, mutation: float
) -> tuple[Genes, int | None]:
    """A child that was never there before (section 4.3): a copy of a parent with one edge of another parent, with the
    probability `crossover`, and then one new gene, with the probability `mutation`.

    Returns:
        the child, and the position of the parent that it is a copy of; None for a fresh sample, where the parents'
        surroundings are used up.
    """
    for _ in range(TRIES):
        first = random.randrange(len(parents))
        child: Genes | None = parents[first]
        if random.random() < crossover:
            other = parents[random.randrange(len(parents))]
            child = one_edge(space.crossovers(parents[first], other), random, ()) or child
        assert child is not None
        if random.random() < mutation:
            child = one_edge(space.mutations(child), random, taken)
        if child is not None and child not in taken:
            return child, first
    return fresh(space, random, taken), None


def fresh(space: Space, random: Random, taken: Collection[Genes]) -> Genes:
    """A sample that was never there before; where a tiny space is used up, any."""
    for _ in range(TRIES):
        if (genes := space.sample(random)) not in taken:
            return genes
    return genes


def parse(space: Space, content: Any, where: str) -> Genes:
    """Genes from nested lists.

    Raises:
        UserError: it is no architecture of this space.
    """
    wanted = f"expected {CELLS} lists of {GENES} whole numbers, a {space.name}"
    try:
        genes = tuple(tuple(int(gene) for gene in cell) for cell in content)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: {str(content)[:80]} is no genotype; {wanted}") from None
    whole = all([*cell] == [*given] for cell, given in zip(genes, content))
    if not whole or len(genes) != CELLS or any(len(cell) != GENES for cell in genes):
        raise UserError(f"{where}: {str(content)[:80]} is no genotype; {wanted}")
    if not space.valid(genes):
        raise UserError(
            f"{where}: {json.dumps(genes)} is no valid {space.name}: a gene is out of its range, a node has no input, "
            "or one of two down-sampling edges is -1 alone"
        )
    return genes


def open_genes(space: Space, name: str, option: str) -> Genes:
    """A published architecture by its name, or one of a file: JSON that a search wrote, or the authors' .npy.

    Raises:
        UserError: neither, or not valid.
    """
    if name in PUBLISHED:
        return parse(space, PUBLISHED[name], f"{option} {name}")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{option} {name}: no such file; published architectures are {', '.join(PUBLISHED)}")
    if path.suffix == ".npy":  # one network's
        return parse(space, _array(path, option), f"{option} {name}")
    content = read_object(path)
    if space.name not in content:
        raise UserError(f"{option} {name}: it has no {space.name}; it has {', '.join(content) or 'nothing'}")
    return parse(space, content[space.name], f"{option} {name}")


def _array(path: Path, option: str) -> Any:
    """Nested lists of the authors' files (exps/*.npy); what would have to be unpickled is refused."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False).tolist()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{option} {path} is no array of numbers ({first_line(error)})") from None


def save_genes(path: Path, **genes: Genes | None) -> None:
    """{"generator": [...], "discriminator": [...]}, atomically; what is None is left out."""
    write_json(path, {name: found for name, found in genes.items() if found is not None})
