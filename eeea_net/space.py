"""The search space: chromosomes, the cells that they stand for, and the operators that breed them (section 3.1).

A chromosome is a tuple of genes, an operation and the state that it reads by turns; two such pairs a block, the blocks
of the normal cell first. Block b reads states 0 to b only: neither its direct predecessor nor, for the first block, the
cell right before (the authors' code).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from eeea_net.config import SpaceOptions
from eeea_net.genotypes import OPERATIONS, Cell, Genotype

Chromosome = tuple[str | int, ...]


@dataclass(frozen=True)
class Space:
    """All chromosomes of a number of blocks over some operations.

    Args:
        blocks: of a cell. The paper writes 4, every published cell has 5.
        operations: 9 of table 2, or 10 with the 7x1-1x7 convolution of the authors' code.
        concat: what a cell's output is: blocks that no later one reads (all published cells) or all (the paper).
    """

    blocks: int = 5
    operations: tuple[str, ...] = OPERATIONS
    concat: str = "unused"

    @classmethod
    def of(cls, options: SpaceOptions) -> Space:
        """The space that options name."""
        chosen = tuple(name for name in OPERATIONS if options.operations == 10 or name != "conv_7x1_1x7")
        return cls(options.blocks, chosen, options.concat)

    @property
    def genes(self) -> int:
        return 8 * self.blocks

    def states(self, gene: int) -> int:
        """How many states the pair that begins at an even `gene` may read."""
        return gene % (4 * self.blocks) // 4 + 1

    def holds(self, chromosome: Chromosome) -> bool:
        """Whether every gene is one of its choices."""
        return len(chromosome) == self.genes and all(
            chromosome[gene] in self.operations and chromosome[gene + 1] in range(self.states(gene))
            for gene in range(0, self.genes, 2)
        )

    def pair(self, gene: int, random: np.random.Generator) -> tuple[str, int]:
        """A drawn (operation, state) for an even gene."""
        return self.operations[random.integers(len(self.operations))], int(random.integers(self.states(gene)))

    def draw(self, random: np.random.Generator) -> Chromosome:
        """A chromosome, every choice equally likely."""
        return tuple(part for gene in range(0, self.genes, 2) for part in self.pair(gene, random))

    def decode(self, chromosome: Chromosome) -> Genotype:
        """The two cells of a chromosome."""
        pairs = [(str(chromosome[gene]), int(chromosome[gene + 1])) for gene in range(0, len(chromosome), 2)]
        cells = []
        for half in (pairs[: 2 * self.blocks], pairs[2 * self.blocks :]):
            everything = Cell(tuple(half), tuple(range(2, 2 + self.blocks)))
            cells.append(everything if self.concat == "all" else Cell(tuple(half), everything.unread()))
        return Genotype(*cells)

    def encode(self, genotype: Genotype) -> Chromosome:
        """The chromosome of a genotype with as many blocks; states beyond a block's choices are kept.

        Raises:
            UserError: it has another number of blocks.
        """
        for cell in (genotype.normal, genotype.reduce):
            if cell.blocks != self.blocks:
                raise UserError(
                    f"a cell of {cell.blocks} blocks is no member of a space of {self.blocks} (cell.blocks)"
                )
        return tuple(gene for cell in (genotype.normal, genotype.reduce) for pair in cell.pairs for gene in pair)

    def mutate(self, chromosome: Chromosome, random: np.random.Generator) -> Chromosome:
        """One pair drawn anew."""
        gene = 2 * int(random.integers(self.genes // 2))
        return replaced(chromosome, gene, self.pair(gene, random))

    def invert(self, chromosome: Chromosome, random: np.random.Generator) -> Chromosome:
        """Two neighbouring pairs change places, where each may read the other's state."""
        possible = [
            gene
            for gene in range(0, self.genes - 2, 2)
            if int(chromosome[gene + 3]) < self.states(gene) and int(chromosome[gene + 1]) < self.states(gene + 2)
        ]
        return inversion(chromosome, possible[random.integers(len(possible))]) if possible else chromosome

    def breed(
        self,
        mother: Chromosome,
        father: Chromosome,
        random: np.random.Generator,
        mutation: float,
        inversion: float,
    ) -> Chromosome:
        """A child by uniform crossover, mutated and inverted with these probabilities."""
        child = crossover(mother, father, random.integers(2, size=self.genes).tolist())
        if random.random() < mutation:
            child = self.mutate(child, random)
        if random.random() < inversion:
            child = self.invert(child, random)
        return child

    def key(self, chromosome: Chromosome) -> str:
        """Its name (`key`)."""
        return key(chromosome)


def key(chromosome: Chromosome) -> str:
    """The name of a chromosome: MD5 of its genes by their number, the authors' hash."""
    genes = {str(number): gene for number, gene in enumerate(chromosome)}
    return hashlib.md5(str(genes).encode(), usedforsecurity=False).hexdigest()


def crossover(mother: Chromosome, father: Chromosome, mask: Sequence[int]) -> Chromosome:
    """Uniform crossover: each gene is the father's where the mask is 1, else the mother's (probability 0.5 each)."""
    return tuple(theirs if chosen else hers for hers, theirs, chosen in zip(mother, father, mask, strict=True))


def replaced(chromosome: Chromosome, gene: int, pair: Sequence[str | int]) -> Chromosome:
    """With the (operation, state) pair at an even gene replaced."""
    return (*chromosome[:gene], *pair, *chromosome[gene + 2 :])


def inversion(chromosome: Chromosome, gene: int) -> Chromosome:
    """The pair at an even gene and the next one change places; the last pair does so with the one before.

    The authors' code overwrites the first with the second instead.
    """
    gene = min(gene, len(chromosome) - 4)
    first, second = chromosome[gene : gene + 2], chromosome[gene + 2 : gene + 4]
    return replaced(replaced(chromosome, gene, second), gene + 2, first)
