"""Searches on disk: what is trained once, goes on exactly, and does not depend on where networks are trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.jobs import Job
from eeea_net import proxy
from eeea_net.comparison import random_search
from eeea_net.config import EvolutionOptions
from eeea_net.evolution import Member
from eeea_net.experiments import percentile_beta
from eeea_net.model import Network
from eeea_net.proxy import Lesson, Setting, fit, train_and_compare
from eeea_net.search import Evaluator, Generation, Search
from eeea_net.space import Chromosome
from tests.eeea_net.tiny_run import PROXY, SCALE, SETTING, SPACE, digits, evaluator

OPTIONS = EvolutionOptions(population=4, generations=3, survivors=0.5, beta=4.0, keep=2)


def populations(search: Search) -> list[list[Any]]:
    return [[(m.key, m.parents, m.objectives) for m in generation.members] for generation in search.generations]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Search]:
    folder = tmp_path_factory.mktemp("search")
    search = Search(OPTIONS, SCALE, evaluator(folder / "evaluations.json"), folder / "ours", seed=3)
    search.run()
    return folder, search


def test_a_search_trains_each_network_once_and_keeps_the_front_over_all_generations(
    whole: tuple[Path, Search],
) -> None:
    folder, search = whole
    recorded = json.loads((folder / "evaluations.json").read_text())["evaluations"]
    assert len(recorded) == search.costs()["evaluations"] == 4 + 2 + 2
    volumes = [generation.hypervolume for generation in search.generations]
    assert volumes == sorted(volumes)
    front = search.front()
    assert front[0].objectives[0] == search.best_error() == min(entry["error"] for entry in recorded.values())
    assert {member.key for member in search.chosen()} <= {member.key for member in front}
    assert all(SCALE.parameters(m.chromosome) <= 4.0 for m in search.generations[0].members)


def test_a_search_that_was_interrupted_within_a_generation_ends_with_the_same_generations(
    whole: tuple[Path, Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, trained = proxy.evaluate, []

    def counted(**options: Any) -> dict[str, float]:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(1)
        return real(**options)

    path = tmp_path / "evaluations.json"
    monkeypatch.setattr(proxy, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        Search(OPTIONS, SCALE, evaluator(path), tmp_path / "ours", seed=3).run()
    assert (tmp_path / "ours" / "generations" / "000.json").is_file()
    assert len(json.loads(path.read_text())["evaluations"]) == 5
    monkeypatch.setattr(proxy, "evaluate", real)
    again = Search(OPTIONS, SCALE, evaluator(path), tmp_path / "ours", seed=3)
    again.run()
    assert populations(again) == populations(whole[1])


def test_workers_give_the_population_of_one_process_and_a_dead_workers_network_is_trained_again(
    whole: tuple[Path, Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Setting.job

    def dying(self: Setting, genotype: Any) -> Job:
        job = plain(self, genotype)
        return Job("tests.eeea_net.job_functions.dies_once", {**job.options, "marker": str(tmp_path / "died")})

    monkeypatch.setattr(Setting, "job", dying)
    one = replace(OPTIONS, generations=1)
    search = Search(one, SCALE, evaluator(tmp_path / "e.json", "processes", 2), tmp_path / "ours", seed=3)
    search.run()
    assert (tmp_path / "died").exists()
    assert populations(search) == populations(whole[1])[:1]


def test_random_search_draws_as_many_networks_and_shares_what_was_trained(
    whole: tuple[Path, Search], tmp_path: Path
) -> None:
    folder, _ = whole
    known = Evaluator(SETTING, SPACE, folder / "evaluations.json")
    before = len(known.known)
    known.path = tmp_path / "evaluations.json"
    options = random_search(OPTIONS, 5)
    search = Search(options, SCALE, known, tmp_path / "random", seed=3)
    search.run()
    assert search.costs()["evaluations"] == 5 and before < len(known.known) <= before + 5


def test_children_above_beta_get_error_1_untrained_where_they_are_filtered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, beta=percentile_beta(30), filter_children=True)
    search = Search(options, SCALE, evaluator(tmp_path / "e.json"), tmp_path / "ours", seed=1)
    large, small = (SPACE.encode(SPACE.decode(one)) for one in _by_size())
    assert search._fits(Member(small, ""), False) and not search._fits(Member(large, ""), False)
    assert Search(OPTIONS, SCALE, search.evaluate, tmp_path, seed=1)._fits(Member(large, ""), False)
    monkeypatch.setattr(search, "_fits", lambda member, official: int(member.key, 16) % 2 == 0)
    search.run()
    skipped = {name for generation in search.generations for name in generation.skipped}
    members = {member.key: member for member in search.archive()}
    assert skipped and not skipped & set(search.evaluate.known)
    assert all(members[name].objectives[0] == 1.0 for name in skipped)
    assert search.costs()["evaluations"] == len(members) - len(skipped)
    assert Generation.load(search._path(2), 2) == search.generations[2]


def _by_size() -> tuple[Chromosome, Chromosome]:
    """The largest and the smallest of some random networks."""
    random = np.random.default_rng(0)
    drawn = sorted((SPACE.draw(random) for _ in range(100)), key=SCALE.parameters)
    return drawn[-1], drawn[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"evaluations": {"a": 1}}', '{"evaluations": {"a": {}}}'])
def test_damaged_evaluations_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluations.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluations.json"):
        evaluator(tmp_path / "evaluations.json")


def test_all_networks_see_the_same_batches_and_each_step_another() -> None:
    lesson, other = Lesson(SETTING, digits()), Lesson(SETTING, digits())
    assert torch.equal(lesson.batch(1)[0], other.batch(1)[0])
    assert not torch.equal(lesson.batch(0)[0], lesson.batch(1)[0])
    assert sum(len(y) for _, y in lesson.validation()) == len(digits().validation)
    assert not set(digits().validation.index_N.tolist()) & set(digits().train.index_N.tolist())


def test_a_network_that_diverges_is_not_a_number_and_ends_at_once() -> None:
    options = replace(PROXY, lr=1e6, steps=50, grad_clip=0.0)
    lesson = Lesson(replace(SETTING, proxy=options), digits())
    genotype = SPACE.decode(SPACE.draw(np.random.default_rng(0)))
    network = Network(genotype, options.network(10, 1))
    seen = []
    lesson.batch = lambda step: seen.append(step) or Lesson.batch(lesson, step)  # type: ignore[method-assign, func-returns-value]
    value = fit(network, options, lesson)
    if value == value:
        pytest.skip("this machine's arithmetic survives the rate")
    assert len(seen) < 50
    found = train_and_compare(genotype, options, lesson, 0)
    assert found["error"] != found["error"]


def test_training_a_network_learns(tmp_path: Path) -> None:
    options = replace(PROXY, channels=8, steps=30, lr=0.1)
    lesson = Lesson(replace(SETTING, proxy=options), digits())
    genotype = SPACE.decode(SPACE.draw(np.random.default_rng(1)))
    assert train_and_compare(genotype, options, lesson, 0)["error"] < 0.75  # 0.9 is chance
