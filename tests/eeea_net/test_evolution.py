"""Early-exit initialisation and the generations that follow, on errors that are a function of the genes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from common.errors import UserError
from common.evolution import fronts, generation_random
from eeea_net.config import EvolutionOptions
from eeea_net.evolution import Member, first_generation, is_small_enough, next_generation
from eeea_net.official import official_tournament
from eeea_net.space import Chromosome, Space, key
from tests.eeea_net.tiny_run import SCALE, SPACE

PAPER = EvolutionOptions(population=40, generations=30, beta=0.0)


def made_up_error(chromosome: Chromosome) -> float:
    """Better with separable convolutions and with late states, with something of every gene's own."""
    good = sum(str(gene).startswith("sep") for gene in chromosome) + sum(g for g in chromosome if isinstance(g, int))
    own = int(hashlib.md5(str(chromosome).encode()).hexdigest()[:6], 16) / 16**6
    return 1 / (2 + good + own)


def evolve(options: EvolutionOptions, seed: int = 0) -> list[list[Member[Chromosome]]]:
    """All generations; also counts that nobody comes twice."""
    first = first_generation(SPACE, options, generation_random(seed, 0), SCALE.parameters)
    found, known = [], set()

    def measured(members: list[Member[Chromosome]]) -> list[Member[Chromosome]]:
        return [m.measured(SCALE.objectives(m.chromosome, made_up_error(m.chromosome))) for m in members]

    found.append(measured(first.members))
    for number in range(1, options.generations):
        known |= {member.key for member in found[-1]}
        kept, children = next_generation(SPACE, found[-1], options, generation_random(seed, number), known)
        found.append([*kept, *measured(children)])
    return found


def test_thirty_generations_of_forty_are_1084_networks_that_never_repeat_and_improve() -> None:
    generations = evolve(PAPER)
    everyone = {member.key: member for generation in generations for member in generation}
    assert len(everyone) == 1084  # 40 + 29 x 36, the authors' count
    assert all(len(generation) == 40 for generation in generations)
    for before, after in pairwise(generations):
        assert len({member.key for member in before} & {member.key for member in after}) == 4
        best = {before[index].key for index in fronts([m.objectives for m in before])[0]}
        assert {member.key for member in after[:4]} & best  # elitism
    volumes = []
    values: list[tuple[float, ...]] = []
    for generation in generations:
        values += [member.objectives for member in generation]
        volumes.append(SCALE.hypervolume(values))
    assert volumes == sorted(volumes) and volumes[-1] > volumes[0]
    parents = {name for generation in generations[1:] for member in generation for name in member.parents}
    assert parents <= set(everyone)


def test_a_search_is_a_function_of_its_seed() -> None:
    short = replace(PAPER, generations=3)
    keys = [[member.key for generation in evolve(short, seed) for member in generation] for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_early_exit_lets_in_what_has_at_most_beta_million_parameters() -> None:
    options = replace(PAPER, beta=3.0)
    first = first_generation(SPACE, options, generation_random(0, 0), SCALE.parameters)
    sizes = [SCALE.parameters(member.chromosome) for member in first.members]
    assert len(sizes) == 40 and max(sizes) <= 3.0
    drawn = np.random.default_rng(5)
    share = np.mean([SCALE.parameters(SPACE.draw(drawn)) <= 3.0 for _ in range(500)])
    assert first.accepted == pytest.approx(share, abs=0.1) and first.draws > 60
    assert is_small_enough(3.0, 3.0) and not is_small_enough(3.0, 3.0, official=True)
    assert is_small_enough(99.0, 0.0)


def test_with_nine_operations_beta_5_rejects_nothing() -> None:
    nine = Space(5, tuple(name for name in SPACE.operations if name != "conv_7x1_1x7"))
    first = first_generation(nine, replace(PAPER, beta=5.0), generation_random(0, 0), SCALE.parameters)
    assert first.accepted >= 0.95


def test_a_beta_below_every_network_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eeea_net.evolution.TRIES", 50)
    with pytest.raises(UserError, match=r"--evolution.beta 0.1, .* too large or known \(the smallest has"):
        first_generation(SPACE, replace(PAPER, beta=0.1), generation_random(0, 0), SCALE.parameters)


def test_a_space_without_new_children_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eeea_net.evolution.TRIES", 50)
    tiny = Space(1, ("skip_connect",))
    one = tiny.draw(np.random.default_rng(0))
    population = [Member(one, str(number), (), (float(number), 1.0, 1.0)) for number in range(4)]
    with pytest.raises(UserError, match="50 children were bred and only 0 of them are new"):
        next_generation(tiny, population, replace(PAPER, population=4), generation_random(0, 1), {key(one)})


def test_a_diverged_network_does_not_survive() -> None:
    population = [Member((name, 0), name, (), (0.5 + i, 1.0 + i, 1.0)) for i, name in enumerate("abcde")]
    population[0] = population[0].measured((float("nan"), 0.0, 0.0))
    for selection in ("textbook", "official_compat"):
        options = replace(PAPER, population=5, survivors=0.4, selection=selection)  # type: ignore[arg-type]

        class Fresh(Space):
            counter = iter(range(1000))

            def breed(self, *_: object) -> Chromosome:  # type: ignore[override]
                return ("skip_connect", next(self.counter))

        kept, children = next_generation(Fresh(), population, options, generation_random(0, 1), set())
        assert "a" not in {member.key for member in kept} and len(children) == 3


def test_seeds_join_the_first_generation_and_are_no_draws() -> None:
    seed = SPACE.encode(SPACE.decode(SPACE.draw(np.random.default_rng(9))))
    first = first_generation(SPACE, PAPER, generation_random(0, 0), SCALE.parameters, [seed])
    assert first.members[0].chromosome == seed and len(first.members) == 40
    assert first.draws == 39 and first.accepted == 1.0


def test_the_authors_tournament_draws_two_different_parents_by_error_and_parameters_alone() -> None:
    survivors = [(0.5, 1.0, 9.0), (0.4, 1.0, 99.0), (0.9, 9.0, 0.1), (0.8, 8.0, 0.2)]
    pairs = [official_tournament(survivors, generation_random(0, g)) for g in range(200)]
    assert all(mother != father for mother, father in pairs)
    wins = np.bincount([index for pair in pairs for index in pair], minlength=4)
    assert wins[1] > wins[0] and wins[1] > wins[3] > wins[2]
