"""The evolution: who shares weights with whom, weight resetting, selection, exact resume, equal results everywhere."""

from __future__ import annotations

import copy
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.evolution import ranks_and_crowding
from eagan import measuring
from eagan.genotypes import GENERATOR, PUBLISHED
from eagan.judge import open_judge
from eagan.measuring import Reference, draw, estimate_statistics, latents, measure_individual
from eagan.model import Generator
from eagan.searching import Search
from eagan.selection import FAILED, Fitness, best, cars_pools, cars_stages, objectives, select
from eagan.training import Diverged, Game
from tests.drills import forked
from tests.eagan.tiny_run import EVALUATION, NETWORK, OPTIONS, STAGE, judging, search
from tests.refusals import refused


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rounds(folder: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((folder / "rounds").glob("*.json"))]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As the forked search that is killed has, whose sums those of several threads would not equal."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stage_g(cache: None, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Search:
    found = search(tmp_path_factory.mktemp("g") / "stage")
    found.run()
    return found


@pytest.fixture(scope="module")
def stage_d(cache: None, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Search:
    found = search(tmp_path_factory.mktemp("d") / "stage", "discriminator")
    found.run()
    return found


# Selection


def random_fitness(count: int, seed: int = 0) -> list[Fitness]:
    random = np.random.default_rng(seed)
    return [
        Fitness(*row)
        for row in zip(random.uniform(1, 9, count), random.uniform(5, 80, count), random.integers(1, 9, count))
    ]


@pytest.mark.parametrize("how", ["nsga2", "cars", "fid"])
def test_selection_keeps_half_and_never_one_that_failed_while_others_live(how: Any) -> None:
    fitness = random_fitness(12)
    fitness[3] = fitness[7] = FAILED
    fitness[5] = Fitness(math.nan, 3.0, 1)
    for count in (1, 6, 9):
        kept = select(fitness, count, how, Random(0))
        assert len(kept) == len(set(kept)) == count and not {3, 5, 7} & set(kept)
    assert len(select(fitness, 11, how, Random(0))) == 11


def test_nobody_who_is_replaced_dominates_a_survivor() -> None:
    fitness = random_fitness(16)
    kept, table = select(fitness, 8, "nsga2", Random(0)), objectives(fitness)
    for gone in set(range(16)) - set(kept):
        for stays in kept:
            assert not ((table[gone] <= table[stays]).all() and (table[gone] < table[stays]).any())
    assert best(fitness) == min(range(16), key=lambda i: fitness[i].fid) == select(fitness, 1, "fid", Random(0))[0]


def test_a_stage_of_the_released_rule_that_fits_exactly_leaves_nothing_to_luck() -> None:
    fitness = random_fitness(12)
    first, second = cars_pools(fitness)[:2]
    both = sorted({*first, *second})
    assert cars_stages(fitness, len(first)) == (first, [])
    assert (sorted(cars_stages(fitness, len(both))[0]), cars_stages(fitness, len(both))[1]) == (both, [])
    assert all(select(fitness, len(first), "cars", Random(seed)) == first for seed in range(3))
    assert cars_stages(fitness, 12)[1] == []


def test_nsga2_agrees_with_pymoo() -> None:
    """In ranks and crowding of the survivors: between members of a front that are equally far apart pymoo draws."""
    from pymoo.algorithms.moo.nsga2 import RankAndCrowdingSurvival
    from pymoo.core.individual import Individual
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem

    for seed in range(5):
        table = objectives(random_fitness(14, seed))
        people = Population.create(*[Individual(F=row) for row in table])
        draws = np.random.default_rng(seed)
        left = RankAndCrowdingSurvival().do(Problem(n_var=1, n_obj=3), people, n_survive=7, random_state=draws)
        ranks, crowding = ranks_and_crowding(table)
        ours = sorted((ranks[i], crowding[i]) for i in select(random_fitness(14, seed), 7, "nsga2", Random(0)))
        theirs = sorted((one.get("rank"), one.get("crowding")) for one in left)
        assert np.allclose([rank for rank, _ in ours], [rank for rank, _ in theirs])
        assert np.allclose([c for _, c in ours], [c for _, c in theirs])


# Stage 1: many to one


def test_generators_of_stage_1_share_their_weights_and_one_discriminator(stage_g: Search) -> None:
    assert not stage_g.pairs and stage_g.generator.genotype is None
    a, b = (Generator(NETWORK, one.generator) for one in stage_g.population[:2])
    from eagan.model import inherit

    inherit(a, stage_g.generator.state_dict())
    inherit(b, stage_g.generator.state_dict())
    assert torch.equal(a.l1.weight, b.l1.weight) and torch.equal(a.to_rgb[0].running_mean, b.to_rgb[0].running_mean)
    assert stage_g.discriminator.genotype == PUBLISHED["base_D"]


def test_nobody_is_drawn_twice_and_half_survives(stage_g: Search) -> None:
    first, second = (r["individuals"] for r in rounds(stage_g.folder))
    assert [len(first), len(second), sum(row["kept"] for row in first)] == [4, 4, 2]
    kept = [row["generator"] for row in first if row["kept"]]
    everybody = [json.dumps(row["generator"]) for row in (*first, *second[2:])]
    assert {json.dumps(g) for g in kept} == {json.dumps(row["generator"]) for row in second[:2]}
    assert len(set(everybody)) == 6
    assert len(stage_g.seen["generator"]) == STAGE.warmup_steps + 6  # what warmed up counts as seen


def test_the_best_is_handed_on_not_the_last(stage_g: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    last = rounds(stage_g.folder)[-1]["individuals"]
    wanted = min(last, key=lambda row: row["fid"])
    assert wanted["best"] and sum(row["best"] for row in last) == 1
    again = search(stage_g.folder)  # a finished stage is not repeated
    monkeypatch.setattr(Game, "discriminator_step", lambda *_: pytest.fail("trained again"))
    found = again.run()
    assert [[*cell] for cell in found.generator or ()] == wanted["generator"]
    assert found.weights["generator"].keys() == Generator(NETWORK, found.generator).state_dict().keys()


def test_a_killed_search_goes_on_with_identical_populations_and_weights(
    stage_g: Search, stage_d: Search, tmp_path: Path
) -> None:
    for whole in (stage_g, stage_d):
        folder = tmp_path / whole.searched / "stage"

        def begun(folder: Path = folder, searched: Any = whole.searched) -> None:
            one = search(folder, searched)
            one.stage_killed = one._one_step  # type: ignore[attr-defined]

            def step() -> None:
                if one.step == 9:
                    import os

                    os.kill(os.getpid(), signal.SIGKILL)
                one.stage_killed()  # type: ignore[attr-defined]

            one._one_step = step  # type: ignore[method-assign]
            one.train()

        assert forked(begun) == -signal.SIGKILL
        again = search(folder, whole.searched)
        again.run()
        assert [r["individuals"] for r in rounds(folder)] == [r["individuals"] for r in rounds(whole.folder)]
        assert equal(state_of(again.generator), state_of(whole.generator))
        assert equal(state_of(again.discriminator), state_of(whole.discriminator))
        assert all(equal(state_of(a[0]), state_of(b[0])) for a, b in zip(again.pairs, whole.pairs))


@pytest.mark.parametrize("number", [0, 1])
def test_a_search_that_dies_while_it_evaluates_has_not_lost_the_round(
    stage_d: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "stage"
    with monkeypatch.context() as patched:
        end = Search._end_round

        def dies(one: Search, ended: int) -> None:
            if ended == number:
                raise KeyboardInterrupt
            end(one, ended)

        patched.setattr(Search, "_end_round", dies)
        with pytest.raises(KeyboardInterrupt):
            search(folder, "discriminator").train()
    again = search(folder, "discriminator")
    again.run()
    assert [r["individuals"] for r in rounds(folder)] == [r["individuals"] for r in rounds(stage_d.folder)]
    assert equal(state_of(again.discriminator), state_of(stage_d.discriminator))


# Stage 2: one to one


def test_training_one_pair_leaves_every_other_generator_untouched(stage_d: Search, tmp_path: Path) -> None:
    one = search(tmp_path / "stage", "discriminator")
    one.train(stop_after=STAGE.warmup_steps + 1)
    pointers = {p.data_ptr() for generator, _ in one.pairs for p in generator.parameters()}
    assert len(pointers) == 4 * len([*one.generator.parameters()])
    before = [state_of(generator) for generator, _ in one.pairs]
    position = one._random("individual", one.step).choice(range(4))
    one._one_step()
    for number, (generator, _) in enumerate(one.pairs):
        assert equal(before[number], state_of(generator)) == (number != position)


def ended(tmp_path: Path, reset: bool) -> tuple[Search, list[dict[str, Tensor]], int, list[int]]:
    """A stage after its first round's selection: (stage, generators before it, best, parents of the new ones)."""
    options = replace(OPTIONS, weight_resetting=reset)
    one = search(tmp_path / "stage", "discriminator", options=options)
    one.train(stop_after=STAGE.warmup_steps + STAGE.round_steps - 1)
    one._one_step()
    one.step += 1
    before = [state_of(generator) for generator, _ in one.pairs]
    one._end_round(0)
    return one, before, one.history[-1]["best"], [one.parent for one in one.population]  # type: ignore[misc]


def test_weight_resetting_gives_everybody_the_best_pairs_generator(cache: None, tmp_path: Path) -> None:
    one, before, first, _ = ended(tmp_path, True)
    assert sum(equal(state, before[first]) for state in before) == 1
    assert all(equal(state_of(generator), before[first]) for generator, _ in one.pairs)
    moments = [optimiser.state_dict()["state"] for _, optimiser in one.pairs]
    assert all(torch.equal(m[0]["exp_avg_sq"], moments[0][0]["exp_avg_sq"]) for m in moments)
    pointers = {p.data_ptr() for generator, _ in one.pairs for p in generator.parameters()}
    assert len(pointers) == 4 * len([*one.generator.parameters()])  # copies, not references


def test_without_it_weights_move_with_their_individual_and_children_copy_a_parent(cache: None, tmp_path: Path) -> None:
    one, before, first, parents = ended(tmp_path, False)
    assert len({json.dumps(p) for p in parents}) > 1
    for (generator, _), parent in zip(one.pairs, parents):
        assert equal(state_of(generator), before[first if parent is None else parent])


# Individuals that fail


def test_a_diverged_individual_gets_the_worst_fitness_and_the_run_goes_on(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = search(tmp_path / "stage")
    original, victims = Game.discriminator_step, []

    def step(self: Game, number: int, generator: Any, *rest: Any) -> float:
        genes = rest[-2]
        if number >= STAGE.warmup_steps and not victims:
            victims.append(genes)
        if genes in victims and number >= STAGE.warmup_steps:
            raise Diverged
        return original(self, number, generator, *rest)

    monkeypatch.setattr(Game, "discriminator_step", step)
    one.run()
    first = rounds(one.folder)[0]["individuals"]
    (victim,) = [row for row in first if row["failed"]]
    assert not victim["kept"] and victim["failed_because"] == "a loss or gradient was not finite"
    assert one.history[0]["failed"] == 1 and all(torch.isfinite(p).all() for p in one.generator.parameters())


def test_where_everybody_diverges_the_run_stops(cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = search(tmp_path / "stage")
    monkeypatch.setattr(Game, "discriminator_step", lambda self, step, *_: _fails(step))
    refused("the stage loss became nan at step", one.train)


def _fails(step: int) -> float:
    if step >= STAGE.warmup_steps:
        raise Diverged
    return 1.0


def test_a_step_whose_gradient_is_not_finite_is_not_made(cache: None, tmp_path: Path) -> None:
    one = search(tmp_path / "stage")
    one.train(stop_after=2)
    genes = GENERATOR.sample(Random(0))
    before = {name: p.clone() for name, p in one.generator.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eagan.training.generator_loss", lambda fake: (fake - fake.detach()).abs().sqrt().mean())
        with pytest.raises(Diverged):
            one.game.generator_step(2, one.generator, one.discriminator, one.optimisers["generator"], genes)
    assert all(torch.equal(before[name], p) for name, p in one.generator.named_parameters())


# Evaluation


def test_a_population_is_worth_the_same_here_and_in_other_processes(stage_g: Search, tmp_path: Path) -> None:
    again = search(stage_g.folder)
    again._open()
    here = again._evaluate()
    again.evaluation = replace(EVALUATION, engine="processes", workers=2)
    assert again._evaluate() == here


def test_each_individual_is_measured_once_a_round_with_the_same_z(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    asked: list[str] = []
    monkeypatch.setattr(measuring, "draw", lambda g, z, *rest: (seen.append(z), draw(g, z, *rest))[1])
    monkeypatch.setattr(
        measuring, "measure_individual", lambda **o: (asked.append(json.dumps(o["genes"])), measure_individual(**o))[1]
    )
    one = search(tmp_path / "stage")
    one.run()
    assert len(asked) == 8 and len(set(asked[:4])) == 4 and len(set(asked[4:])) == 4
    assert all(torch.equal(z, seen[0]) for z in seen)
    z = latents(20, NETWORK.latent_dim)
    assert torch.equal(z[:7], latents(7, NETWORK.latent_dim)) and len(z.unique(dim=0)) == 20


def test_normalisation_is_estimated_exactly_and_the_supernet_is_left_alone(stage_g: Search) -> None:
    before = state_of(stage_g.generator)
    stage_g._evaluate()
    assert equal(before, state_of(stage_g.generator))
    torch.manual_seed(3)
    generator = Generator(NETWORK, PUBLISHED["best_G"]).eval()
    other = copy.deepcopy(generator)
    estimate_statistics(generator, 64)
    estimate_statistics(other, 100)  # other batches
    assert torch.allclose(generator.to_rgb[0].running_mean, other.to_rgb[0].running_mean, atol=1e-6)
    seen: list[Tensor] = []
    generator.to_rgb[0].register_forward_hook(lambda *args: seen.append(args[2]))
    from common.metrics.measures import fixed_noise

    with torch.no_grad():
        generator(fixed_noise(measuring.STATISTICS, (NETWORK.latent_dim,), measuring.STATISTICS_SEED))
    weight, bias = generator.to_rgb[0].weight, generator.to_rgb[0].bias
    normal = (seen[0] - bias[:, None, None]) / weight[:, None, None]
    assert normal.mean((0, 2, 3)).abs().max() < 1e-4 and (normal.std((0, 2, 3)) - 1).abs().max() < 1e-3
    drawn = {way: draw(generator, latents(8, NETWORK.latent_dim), way, 4) for way in ("running", "batch", "genotype")}  # type: ignore[arg-type]
    assert torch.equal(drawn["running"], drawn["genotype"]) and not torch.equal(drawn["running"], drawn["batch"])


def test_real_pictures_against_themselves_are_at_no_distance(cache: None, tmp_path: Path) -> None:
    place = judging(tmp_path)
    judge, reference = open_judge(place.judge), Reference(place.reference)
    same = measuring.score_features(reference.train_ND, reference.train_ND, judge, 2, "real pictures")
    floor = reference.floor(judge, 2, 1000)
    assert same.fid < 1e-6 < floor.fid and floor.images == 24 and floor.judge == same.judge == "classes64"


# The baselines


def test_the_coupled_baseline_evolves_pairs_from_two_supernets(cache: None, tmp_path: Path) -> None:
    one = search(tmp_path / "stage", "both")
    found = one.run()
    assert not one.pairs and one.generator.genotype is None and one.discriminator.genotype is None
    assert all(person.generator and person.discriminator for person in one.population)
    assert found.generator and found.discriminator and set(found.weights) == {"generator", "discriminator"}
