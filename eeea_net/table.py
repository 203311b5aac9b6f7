"""A table of measured networks in place of training: nas-bench-graph (extra `nas`), searched by the same code.

Its 26,206 networks are graph networks, another space than the paper's; error, parameters and latency are measured ones.
The package's files are pickles of numbers; a restricted reader takes nothing else from them.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.evolution import generation_random, hypervolume
from eeea_net.config import EvolutionOptions
from eeea_net.evolution import TRIES, Member, first_generation, next_generation

LINKS = 9  # ways in which a network's four operations are joined
OPERATIONS = 9
SETS = ("cora", "arxiv", "cs")  # small, large, in between
INSTALL = "make setup EXTRAS=dev,nas"

Genes = tuple[int, ...]  # the links, then the four operations


ALLOWED = {("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype")}


class _Numbers(pickle.Unpickler):
    """Reads dictionaries of numbers, those of numpy among them, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"a table of nas-bench-graph names {module}.{name}: it is no table of numbers")
        return np.dtype if name == "dtype" else _scalar()


def _scalar() -> Any:
    from numpy._core import multiarray

    return multiarray.scalar  # type: ignore[attr-defined]


def installed() -> bool:
    return importlib.util.find_spec("nas_bench_graph") is not None


def hash_of(genes: Genes) -> int:
    """The package's number of a network: its links, then its operations as digits of a number of base 10."""
    number = genes[0]
    for operation in genes[1:]:
        number = number * (OPERATIONS + 1) + operation
    return number


def genes_of(number: int) -> Genes:
    """Inverse of `hash_of`."""
    operations = []
    for _ in range(4):
        number, operation = divmod(number, OPERATIONS + 1)
        operations.append(operation)
    return (number, *reversed(operations))


@cache
def read_table(name: str) -> Mapping[Genes, tuple[float, float, float]]:
    """Validation error 0..1, parameters in millions and latency in seconds of every network.

    Raises:
        UserError: the package or the table is missing, or it holds something else than numbers.
    """
    spec = importlib.util.find_spec("nas_bench_graph")
    if spec is None or spec.origin is None:
        raise UserError(f"the table of measured networks needs the package nas-bench-graph; {INSTALL} brings it")
    path = Path(spec.origin).parent / "light" / f"{name}.bench"
    if not path.is_file():
        raise UserError(f"nas-bench-graph has no table {name!r}")
    with path.open("rb") as file:
        rows = _Numbers(file).load()
    return {
        genes_of(int(number)): (1 - float(row["valid_perf"]), float(row["para"]), float(row["latency"]))
        for number, row in rows.items()
    }


@dataclass(frozen=True)
class TableSpace:
    """The networks of a table."""

    name: str

    @property
    def rows(self) -> Mapping[Genes, tuple[float, float, float]]:
        return read_table(self.name)

    @property
    def members(self) -> list[Genes]:
        return _members(self.name)

    def draw(self, random: np.random.Generator) -> Genes:
        return self.members[random.integers(len(self.members))]

    def key(self, genes: Genes) -> str:
        return str(hash_of(genes))

    def breed(
        self, mother: Genes, father: Genes, random: np.random.Generator, mutation: float, inversion: float
    ) -> Genes:
        """Uniform crossover, a gene drawn anew, two neighbouring operations swapped; until the table has the child."""
        for _ in range(TRIES):
            child = [pair[side] for pair, side in zip(zip(mother, father), random.integers(2, size=5))]
            if random.random() < mutation:
                gene = int(random.integers(5))
                child[gene] = int(random.integers(OPERATIONS if gene else LINKS))
            if random.random() < inversion:
                gene = 1 + int(random.integers(3))
                child[gene], child[gene + 1] = child[gene + 1], child[gene]
            if tuple(child) in self.rows:
                return tuple(child)
        return mother


@cache
def _members(name: str) -> list[Genes]:
    return list(read_table(name))


def search(name: str, options: EvolutionOptions, seed: int) -> list[Member[Genes]]:
    """All networks that an evolution looks at, measured."""
    space = TableSpace(name)

    def measured(members: list[Member[Genes]]) -> list[Member[Genes]]:
        return [member.measured(space.rows[member.chromosome]) for member in members]

    first = first_generation(space, options, generation_random(seed, 0), lambda genes: space.rows[genes][1])
    population = measured(first.members)
    everyone = {member.key: member for member in population}
    for number in range(1, options.generations):
        kept, children = next_generation(space, population, options, generation_random(seed, number), set(everyone))
        population = [*kept, *measured(children)]
        everyone |= {member.key: member for member in population}
    return list(everyone.values())


def volume(name: str, members: list[Member[Genes]]) -> float:
    """Normalised hypervolume, up to the 95th percentile of the table in each objective."""
    values = np.array(list(read_table(name).values()))
    reference, ideal = np.quantile(values, 0.95, axis=0), values.min(axis=0)
    return hypervolume([member.objectives for member in members], reference.tolist(), ideal.tolist())


def compare(name: str, options: EvolutionOptions, percentile: float, seed: int) -> dict[str, float]:
    """NSGA-II without a filter and with beta at a percentile of the parameters, and random search of equal size."""
    sizes = [row[1] for row in read_table(name).values()]
    plain = replace(options, beta=0.0)
    arms = {
        "nsga2": search(name, plain, seed),
        "early_exit": search(name, replace(options, beta=float(np.percentile(sizes, percentile))), seed),
    }
    arms["random"] = search(name, replace(plain, population=len(arms["nsga2"]), generations=1), seed)
    found = {}
    for arm, members in arms.items():
        found[f"hypervolume_{arm}_{name}"] = volume(name, members)
        found[f"parameters_{arm}_{name}"] = sum(member.objectives[1] for member in members)
        found[f"error_{arm}_{name}"] = 100 * min(member.objectives[0] for member in members)
    return found
