"""Evolution under several objectives, as NSGA-II has it (Deb et al. 2002): fronts, crowding, survivors, tournaments.

    ranks = front_ranks(objectives)                     # 0 is the Pareto front
    kept = survivors(objectives, 20)                    # by front, then by crowding distance
    random = generation_random(seed, generation)        # everything random in a generation is drawn from it
    parents = tournament(objectives[kept], 40, random)

Objectives are [n, m] arrays of numbers to be minimised. An individual of which any objective is not a number is worse
than every other: a network that diverged cannot win by being small. Sorting and hypervolume are moocore's (the compiled
library that pymoo stands on too), crowding distances are equal to pymoo's; ties keep the order they came in, so that a
generation is a function of (seed, generation) and of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

Objectives = NDArray[np.float64]


def generation_random(seed: int, generation: int) -> np.random.Generator:
    """The random numbers of one generation: the same whether the search was interrupted before it or not."""
    return np.random.default_rng([seed, generation])


def as_objectives(values: ArrayLike) -> Objectives:
    """[n, m]; a row with a value that is not a number becomes infinitely bad.

    Raises:
        ValueError: `values` is no table.
    """
    table: Objectives = np.array(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"objectives must be [individuals, objectives], not {list(table.shape)}")
    table[np.isnan(table).any(axis=1)] = np.inf
    return table


def dominates(one: ArrayLike, other: ArrayLike) -> bool:
    """No worse in any objective, and better in one."""
    first, second = as_objectives(np.stack([np.asarray(one), np.asarray(other)]))
    return bool((first <= second).all() and (first < second).any())


def front_ranks(objectives: ArrayLike) -> NDArray[np.int64]:
    """[n]: the front of each individual; 0 where nobody dominates it. Equal individuals share a front."""
    table = as_objectives(objectives)
    return np.asarray(moocore.pareto_rank(table), dtype=np.int64) if len(table) else np.zeros(0, dtype=np.int64)


def fronts(objectives: ArrayLike) -> list[list[int]]:
    """The individuals of each front, best front first, within a front in the order they came in."""
    ranks = front_ranks(objectives)
    return [np.flatnonzero(ranks == rank).tolist() for rank in range(ranks.max(initial=-1) + 1)]


def crowding_distance(front: ArrayLike) -> NDArray[np.float64]:
    """[n]: how far apart the neighbours of each member of one front are, in ranges of the front, on average.

    The members at the ends of an objective have infinite distance. An objective in which all are equal, or in which
    the range is infinite, says nothing (pymoo's rule).
    """
    table = as_objectives(front)
    if not len(table):
        return np.zeros(0)
    order = np.argsort(table, axis=0, kind="stable")
    ordered = np.take_along_axis(table, order, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranges = ordered[-1] - ordered[0]
        ends = np.full((1, table.shape[1]), np.inf)
        steps = np.diff(np.concatenate([-ends, ordered, ends]), axis=0) / np.where(ranges == 0, np.nan, ranges)
    steps = np.nan_to_num(steps, nan=0.0, posinf=np.inf)
    distances = np.zeros_like(table)
    np.put_along_axis(distances, order, steps[:-1] + steps[1:], axis=0)
    return distances.mean(axis=1)


def ranks_and_crowding(objectives: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[n] front of each individual, and [n] its crowding distance within that front."""
    table = as_objectives(objectives)
    ranks, crowding = front_ranks(table), np.zeros(len(table))
    for rank in range(ranks.max(initial=-1) + 1):
        crowding[ranks == rank] = crowding_distance(table[ranks == rank])
    return ranks, crowding


def survivors(objectives: ArrayLike, count: int) -> list[int]:
    """`count` individuals, the best first: by front, within a front the least crowded."""
    ranks, crowding = ranks_and_crowding(objectives)
    return np.lexsort((-crowding, ranks))[:count].tolist()


def tournament(objectives: ArrayLike, count: int, random: np.random.Generator) -> list[int]:
    """Winners of `count` duels between two drawn individuals: the better front, then the less crowded, then luck."""
    return duels(*ranks_and_crowding(objectives), count, random)


def duels(
    ranks: NDArray[np.int64], crowding: NDArray[np.float64], count: int, random: np.random.Generator
) -> list[int]:
    """A tournament of individuals whose fronts and crowding distances are known, as for one parent after the other."""
    pairs = random.integers(len(ranks), size=(count, 2))
    luck = random.random(count) < 0.5
    first, other = pairs[:, 0], pairs[:, 1]
    better = (ranks[first] < ranks[other]) | ((ranks[first] == ranks[other]) & (crowding[first] > crowding[other]))
    worse = (ranks[first] > ranks[other]) | ((ranks[first] == ranks[other]) & (crowding[first] < crowding[other]))
    return np.where(better | (~worse & luck), first, other).tolist()


def hypervolume(objectives: ArrayLike, reference: Sequence[float], ideal: Sequence[float] | None = None) -> float:
    """The volume that the individuals dominate, up to the point `reference`.

    Args:
        ideal: where given, the volume is a share of the box between `ideal` and `reference`: 0 to 1 where no individual
            is better than `ideal`.
    """
    table, limit = as_objectives(objectives), np.asarray(reference, dtype=np.float64)
    table = table[(table < limit).all(axis=1)]
    volume = float(moocore.hypervolume(table, ref=limit)) if len(table) else 0.0
    return volume if ideal is None else volume / float(np.prod(limit - np.asarray(ideal, dtype=np.float64)))


def spread(objectives: ArrayLike, count: int) -> list[int]:
    """Up to `count` members of the Pareto front that lie far apart: the best in the first objective, then always the
    one farthest from those taken, in ranges of the front; members equal to one taken are left out.
    """
    table = as_objectives(objectives)
    members = [index for index in np.flatnonzero(front_ranks(table) == 0) if np.isfinite(table[index]).all()]
    if not members:
        return []
    front = table[members]
    front = (front - front.min(axis=0)) / np.where(np.ptp(front, axis=0) == 0, 1.0, np.ptp(front, axis=0))
    taken = [int(np.lexsort(front.T[::-1])[0])]
    while len(taken) < min(count, len(members)):
        distances = np.linalg.norm(front[:, None] - front[taken], axis=2).min(axis=1)
        if distances.max() == 0:
            break
        taken.append(int(distances.argmax()))
    return [int(members[index]) for index in taken]
