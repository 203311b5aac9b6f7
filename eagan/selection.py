"""Which individuals live on (section 4.3): NSGA-II on {1/IS, FID, size}, the released code's rule, or FID alone.

The released code (CARS' pNSGA-III) sorts by pairs of objectives, two of which it rewards for being large: FID and size
of big or bad generators protect them for a while. It is an option, not the paper's rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from common.evolution import Objectives, fronts, survivors
from eagan.config import Selection


@dataclass(frozen=True)
class Fitness:
    """What an individual is judged by: Inception Score (high), FID (low), parameters (few)."""

    inception_score: float
    fid: float
    parameters: int

    @property
    def failed(self) -> bool:
        """It diverged: its pictures could not be measured."""
        return not (math.isfinite(self.fid) and math.isfinite(self.inception_score) and self.inception_score > 0)


FAILED = Fitness(0.0, math.inf, 0)


def objectives(fitness: Sequence[Fitness]) -> Objectives:
    """[n, 3]: 1/IS, FID and size, to be minimised; infinite in all three for one that failed, however small it is."""
    rows = [[math.inf] * 3 if f.failed else [1 / f.inception_score, f.fid, f.parameters] for f in fitness]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def select(fitness: Sequence[Fitness], count: int, how: Selection, random: Random) -> list[int]:
    """`count` survivors by position, the best first (for cars: in the order they were taken).

    Args:
        random: of the stage that overflows (cars).
    """
    if how == "fid":
        order = sorted(range(len(fitness)), key=lambda i: (fitness[i].failed, fitness[i].fid))
        return order[:count]
    if how == "nsga2":
        return survivors(objectives(fitness), count)
    sure, candidates = cars_stages(fitness, count)
    return sure + random.sample(candidates, count - len(sure))


def cars_pools(fitness: Sequence[Fitness]) -> list[list[int]]:
    """The released rule's stages: stage k is the union of the k-th fronts of four sorts by 1/IS and one of FID, 1/FID,
    size and 1/size. Individuals that failed are in none.
    """
    alive = [i for i, f in enumerate(fitness) if not f.failed]
    table = objectives([fitness[i] for i in alive])
    with np.errstate(divide="ignore"):  # an FID of zero
        others = (table[:, 1], 1 / table[:, 1], table[:, 2], 1 / table[:, 2])
    sorts = [fronts(np.stack([table[:, 0], other], axis=1)) for other in others]
    stages = range(max(map(len, sorts), default=0))
    return [sorted({alive[i] for found in sorts if k < len(found) for i in found[k]}) for k in stages]


def cars_stages(fitness: Sequence[Fitness], count: int) -> tuple[list[int], list[int]]:
    """(those who are taken for sure, those of the stage that overflows, of whom the rest is drawn: none where a stage
    ends at `count`)."""
    sure: list[int] = []
    for pool in cars_pools(fitness):
        if len(sure) == count:
            return sure, []
        new = [i for i in pool if i not in sure]
        if len(sure) + len(new) > count:
            return sure, new
        sure += new
    return sure, [i for i in range(len(fitness)) if i not in sure] if len(sure) < count else []


def best(fitness: Sequence[Fitness]) -> int:
    """The individual with the lowest FID, whose genes (and weights) a stage hands on."""
    return min(range(len(fitness)), key=lambda i: (fitness[i].failed, fitness[i].fid))
