"""What a search has to beat: random cells, random search within the same time, and DARTS (K = 1, no edge weights)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.files import read_object, reading, write_json
from pc_darts.config import SearchOptions
from pc_darts.genotypes import Choice, Genotype
from pc_darts.operations import PRIMITIVES

OPERATIONS = tuple(name for name in PRIMITIVES if name != "none")


def random_genotype(seed: int, nodes: int = 4) -> Genotype:
    """A cell drawn uniformly: every node takes two different earlier states and one of the seven operations on each."""
    generator = step_generator(seed, 0)
    cells: list[tuple[Choice, ...]] = []
    for _ in ("normal", "reduce"):
        choices: list[Choice] = []
        for node in range(nodes):
            states = torch.randperm(2 + node, generator=generator)[:2].tolist()
            drawn = torch.randint(len(OPERATIONS), (2,), generator=generator).tolist()
            choices += [(OPERATIONS[operation], state) for operation, state in zip(drawn, states)]
        cells.append(tuple(choices))
    concat = tuple(range(2, 2 + nodes))
    return Genotype(cells[0], concat, cells[1], concat)


def darts_options(options: SearchOptions, batch_size: int | None = None) -> SearchOptions:
    """The same search as DARTS: K = 1, no edge normalisation, no warm-up.

    Args:
        batch_size: by default the paper's comparison, 1/K of the batch, which takes about the same memory.
    """
    batch = max(1, options.batch_size // options.partial) if batch_size is None else batch_size
    return dataclasses.replace(options, partial=1, edge_normalisation=False, warmup_epochs=0, batch_size=batch)


@dataclass(frozen=True)
class Candidate:
    """A drawn cell, its accuracy on the validation pictures after a short training, and what that took."""

    seed: int
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class RandomSearch:
    """Every candidate in the order drawn; `best` is the one with the highest accuracy (the first of equals)."""

    candidates: list[Candidate]
    nodes: int

    @property
    def best(self) -> Genotype:
        return random_genotype(max(self.candidates, key=lambda candidate: candidate.accuracy).seed, self.nodes)

    @property
    def seconds(self) -> float:
        return sum(candidate.seconds for candidate in self.candidates)


def random_search(
    evaluate: Callable[[Genotype, int], tuple[float, float]],
    budget_seconds: float,
    folder: Path,
    seed: int,
    nodes: int = 4,
    at_most: int | None = None,
) -> RandomSearch:
    """Draw cells and train each briefly until the budget is spent; finished candidates are kept in `folder`.

    Args:
        evaluate: (genotype, number of the candidate) to (validation accuracy, seconds).
        budget_seconds: no candidate is begun whose expected end lies beyond it; at least one is trained.
        at_most: candidates, whatever the budget.

    Raises:
        UserError: the candidates on record in `folder` belong to another seed or number of nodes.
    """
    path = folder / "candidates.json"
    known: list[Candidate] = []
    if path.is_file():
        with reading(path):
            record = read_object(path)
            if (record["seed"], record["nodes"]) != (seed, nodes):
                raise UserError(f"{path} is of another random search; choose another --run_dir or delete that folder")
            known = [Candidate(**entry) for entry in record["candidates"]]
    while not known or (at_most is None or len(known) < at_most):
        spent = sum(candidate.seconds for candidate in known)
        if known and spent * (len(known) + 1) / len(known) > budget_seconds:
            break
        drawn = derive_seed(seed, len(known))
        accuracy, seconds = evaluate(random_genotype(drawn, nodes), len(known))
        known.append(Candidate(drawn, accuracy, seconds))
        entries = [asdict(candidate) for candidate in known]
        write_json(path, {"seed": seed, "nodes": nodes, "candidates": entries})
    return RandomSearch(known, nodes)
