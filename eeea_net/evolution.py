"""Generations: the first with early-exit initialisation (equation 6), the next by NSGA-II's selection (algorithm 1).

Everything random in generation g is drawn from (seed, g), and no chromosome comes twice, so that a search is a function
of its seed and of what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from common.errors import UserError
from common.evolution import duels, ranks_and_crowding, survivors
from eeea_net.config import EvolutionOptions
from eeea_net.official import official_survivors, official_tournament

C = TypeVar("C")
C_in = TypeVar("C_in")
TRIES = 10_000  # draws of one new member, of the first generation under beta and of a child that is new


class Breeds(Protocol[C_in]):
    """What evolution needs of a space (`space.Space`, `table.TableSpace`)."""

    def draw(self, random: np.random.Generator) -> C_in: ...
    def key(self, chromosome: C_in) -> str: ...
    def breed(
        self, mother: C_in, father: C_in, random: np.random.Generator, mutation: float, inversion: float
    ) -> C_in: ...


@dataclass(frozen=True)
class Member(Generic[C]):
    """An individual. objectives: error, parameters in millions, MACs in millions; empty before it was measured."""

    chromosome: C
    key: str
    parents: tuple[str, ...] = ()
    objectives: tuple[float, ...] = ()

    def measured(self, objectives: Sequence[float]) -> Member[C]:
        return replace(self, objectives=tuple(objectives))


@dataclass(frozen=True)
class FirstGeneration(Generic[C]):
    """Early-exit initialisation: who was let in, and out of how many."""

    members: list[Member[C]]
    draws: int
    seeded: int = 0  # members that were given, not drawn

    @property
    def accepted(self) -> float:
        """Share of the draws that were let in."""
        return (len(self.members) - self.seeded) / self.draws if self.draws else 1.0


def is_small_enough(parameters: float, beta: float, official: bool = False) -> bool:
    """Whether early exit lets a network in: at most beta (equation 6), below it in the authors' code; 0 lets all in.

    Args:
        parameters, beta: in millions.
    """
    return not beta or (parameters < beta if official else parameters <= beta)


def first_generation(
    space: Breeds[C],
    options: EvolutionOptions,
    random: np.random.Generator,
    parameters: Callable[[C], float],
    seeds: Sequence[C] = (),
) -> FirstGeneration[C]:
    """Random networks, of which only those of at most `beta` million parameters are let in; `seeds` come first.

    Raises:
        UserError: `beta` lets almost none in, or the space has not so many networks.
    """
    official = options.selection == "official_compat"
    members = {space.key(one): Member(one, space.key(one)) for one in seeds[: options.population]}
    seeded, draws, since, smallest = len(members), 0, 0, float("inf")
    while len(members) < options.population:
        found = space.draw(random)
        name, size = space.key(found), parameters(found)
        draws, since, smallest = draws + 1, since + 1, min(smallest, size)
        if is_small_enough(size, options.beta, official) and name not in members:
            members[name], since = Member(found, name), 0
        elif since == TRIES:
            raise UserError(
                f"--evolution.beta {options.beta:g}, population {options.population}: {TRIES} random networks in a row "
                f"are too large or known (the smallest has {smallest:.3g} million parameters); raise beta or give fewer"
            )
    return FirstGeneration([*members.values()], draws, seeded)


def next_generation(
    space: Breeds[C],
    population: Sequence[Member[C]],
    options: EvolutionOptions,
    random: np.random.Generator,
    known: set[str],
) -> tuple[list[Member[C]], list[Member[C]]]:
    """(survivors, children): the best share lives on, tournaments among them choose parents, children fill the rest.

    Args:
        population: measured members.
        known: keys of all members so far; a child is none of them.

    Raises:
        UserError: no new child can be found.
    """
    objectives = [member.objectives for member in population]
    count = min(max(2, int(options.survivors * len(population))), len(population) - 1)
    compat = options.selection == "official_compat"
    chosen = official_survivors(objectives, count) if compat else survivors(objectives, count)
    kept = [population[index] for index in chosen]
    values = [member.objectives for member in kept]
    standing = ranks_and_crowding(values)
    children: dict[str, Member[C]] = {}
    for _ in range(TRIES):
        if len(children) == len(population) - count:
            return kept, list(children.values())
        if compat:
            first, second = official_tournament(values, random)
        else:
            first, second = duels(*standing, 2, random)
            if first == second:  # a network has no child with itself but by mutation
                second = int(random.choice([index for index in range(count) if index != first]))
        mother, father = kept[first], kept[second]
        child = space.breed(mother.chromosome, father.chromosome, random, options.mutation, options.inversion)
        name = space.key(child)
        if name not in known and name not in children:
            children[name] = Member(child, name, (mother.key, father.key))
    raise UserError(
        f"{TRIES} children were bred and only {len(children)} of them are new: raise --evolution.mutation, or give "
        "fewer generations"
    )
