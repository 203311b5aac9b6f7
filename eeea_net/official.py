"""Selection as the authors' program does it (`nsga2.py`), for comparison: `--evolution.selection official_compat`.

It differs from NSGA-II: dominance looks at the first two objectives only; crowding distances are taken over the whole
population; the last front is ordered by the distances of other individuals; the others stay in the order in which they
were found; a tournament is by dominance among drawn halves of the survivors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.evolution import as_objectives

Objectives = Sequence[float]
COMPARED = 2  # objectives that dominance looks at


def official_dominates(one: Objectives, other: Objectives) -> bool:
    """In error and parameters alone."""
    first, second = one[:COMPARED], other[:COMPARED]
    return all(a <= b for a, b in zip(first, second)) and any(a < b for a, b in zip(first, second))


def official_fronts(population: Sequence[Objectives]) -> list[list[int]]:
    """Fronts whose members stand in the order in which sorting comes upon them; equal ones together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for index, values in enumerate(population):
        groups.setdefault(tuple(values), []).append(index)
    distinct = list(groups)
    below = {one: [other for other in distinct if official_dominates(one, other)] for one in distinct}
    above = {one: sum(one in of for of in below.values()) for one in distinct}
    front, found = [one for one in distinct if not above[one]], []
    while front:
        found.append([index for one in front for index in groups[one]])
        following = []
        for one in front:
            for other in below[one]:
                above[other] -= 1
                if not above[other]:
                    following.append(other)
        front = following
    return found


def official_crowding(population: Sequence[Objectives]) -> list[float]:
    """Distances over the whole population, summed over objectives; the ends of each are infinite."""
    distances = [0.0] * len(population)
    order = list(range(len(population)))
    for objective in range(len(population[0])):
        order.sort(key=lambda index: population[index][objective])  # ties stay as the objective before left them
        values = [population[index][objective] for index in order]
        distances[order[0]] = distances[order[-1]] = float("inf")
        if values[-1] == values[0]:
            continue
        for place in range(1, len(order) - 1):
            distances[order[place]] += (values[place + 1] - values[place - 1]) / (values[-1] - values[0])
    return distances


def official_survivors(population: Sequence[Objectives], count: int | None = None) -> list[int]:
    """Front by front as they were found; the last front falls by the crowding of the first individuals of the list."""
    population = as_objectives(population).tolist()  # not a number is the worst here too
    found = official_fronts(population)
    crowding = official_crowding(population)
    last = [index for _, index in sorted(zip(crowding, found[-1]), reverse=True)]
    return [*(index for front in found[:-1] for index in front), *last][:count]


def official_tournament(survivors: Sequence[Objectives], random: np.random.Generator) -> tuple[int, int]:
    """(mother, father): of two drawn halves of the survivors, each time one that none before it in the half beats."""
    half = max(1, len(survivors) // 2)
    drawn = random.permutation(len(survivors))[: 2 * half].tolist()
    winners = []
    for part in (drawn[:half], drawn[half:]):
        best = part[0]
        for index in part[1:]:
            if official_dominates(survivors[index], survivors[best]):
                best = index
        winners.append(best)
    return winners[0], winners[-1]
