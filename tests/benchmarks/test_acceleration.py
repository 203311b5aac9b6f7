"""The head-to-head runner on a tiny teacher: every method within its budget, resumed pieces, one pair cache, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.acceleration import methods, protocol, report
from benchmarks.acceleration import runner as runner_module
from benchmarks.acceleration.protocol import BUDGETS, Bench, Budget, Method, OverBudgetError, Sampler
from benchmarks.acceleration.runner import Runner, Settings, known_methods, summary, write_results
from common.images import open_rgb
from common.teacher import Teacher
from tests.common.tiny_teacher import save_teacher

FIRST = {
    "teacher_ddim",
    "teacher_dpm",
    "progressive_distillation",
    "direct_distillation",
    "lcm",
    "rectified_flow",
    "instaflow",
    "instaflow_stacked",
    "hipa",
}
TINY = 6000  # forward-equivalents


@pytest.fixture(scope="module")
def bench(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "B1", TINY)
        patch.setattr(protocol, "PROMPT_POOL", 40)
        patch.setattr(protocol, "DATA_IMAGES", 32)
        patch.setattr(protocol, "BATCH", 8)
        patch.setattr(runner_module, "REFERENCE_STEPS", 4)
        teacher = Teacher.load(save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", "v_prediction"))
        yield Bench(teacher, "B1", 2.0)


@pytest.fixture(scope="module")
def runner(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    settings = Settings(images=12, tuning_images=12, tuning_share=0.2, seeds=(0, 1))
    return Runner(bench, settings, tmp_path_factory.mktemp("pieces"))


def test_every_file_of_methods_is_a_row() -> None:
    known = known_methods()
    assert set(known) >= FIRST
    assert all(len(method.grid) == 4 for method in known.values()), "equally many tries for every method"
    assert {known[name].steps for name in ("teacher_ddim", "teacher_dpm", "rectified_flow")} == {(1, 2, 4, 8, 25)}
    assert known["instaflow"].steps == known["direct_distillation"].steps == (1,)


@pytest.mark.parametrize("name", sorted(FIRST))
def test_method_stays_within_its_budget_and_draws_every_column(name: str, bench: Bench) -> None:
    method = known_methods()[name]
    budget = Budget(TINY)
    sampler = method.build(bench, budget, method.grid[1], 0)
    spent = sum(budget.spent.values())
    if method.tuned == "learning rate":
        assert 0.8 * TINY <= spent <= TINY and sampler.trained > 0
    else:
        assert spent == 0 and sampler.trained == 0
    noise = torch.randn(3, *bench.teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    states = bench.teacher.encode(["a red star"] * 3)
    for steps in method.steps[:3]:
        latents = sampler.draw(noise, states, steps)
        assert latents.shape == noise.shape and torch.isfinite(latents).all()
        assert torch.equal(latents, sampler.draw(noise, states, steps)), "the same noise gives the same image"
        assert sampler.forwards(steps) >= steps


def test_pairs_are_charged_though_another_method_made_them(bench: Bench) -> None:
    first, second = Budget(TINY), Budget(TINY)
    pairs = [bench.pairs(budget, 0.4) for budget in (first, second)]
    assert pairs[0].folder == pairs[1].folder and len(pairs[0]) == len(pairs[1])
    evaluations = bench.teacher_source().evaluations
    assert evaluations == 2 * protocol.PAIR_STEPS["B1"]
    assert first.spent == second.spent == {"pairs": len(pairs[0]) * evaluations}


def test_budget_refuses_what_it_cannot_pay() -> None:
    budget = Budget(100)
    budget.charge("pairs", 60)
    with pytest.raises(OverBudgetError, match=r"training: 50 forward-equivalents asked for, 40 of 100 left"):
        budget.charge("training", 50)
    assert budget.left == 40 and budget.steps(1.0, 3, batch=4) == 3


def test_tuning_takes_the_try_with_the_lowest_distance(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def build(bench: Bench, budget: Budget, value: float, seed: int) -> Sampler:
        tried.append((value, budget.total, seed))
        return Sampler(lambda noise, states, steps: noise * value, float)

    def images(draw: Any, prompts: Any, steps: int) -> torch.Tensor:
        value = float(draw(torch.ones(1), None, 1))
        return prompts.reference if value == pytest.approx(3e-4) else torch.zeros_like(prompts.reference)

    monkeypatch.setattr(runner, "_images", images)
    method = Method("fake", (1,), "nothing", "learning rate", build)
    found = runner.tune("fake", method)
    assert found["chosen"] == {"1": 3e-4} and [value for value, *_ in tried] == list(method.grid)
    assert {total for _, total, _ in tried} == {0.2 * TINY}
    assert not {seed for *_, seed in tried} & set(runner.settings.seeds)
    runner.tune("fake", method)
    assert len(tried) == 4, "finished tries are not repeated"


def test_pieces_are_kept_results_merged_and_pictures_drawn(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["teacher_dpm", "direct_distillation", "instaflow"]
    runs = [run for name in names for run in runner.run([name])]
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("teacher_dpm", 0),
        *[(name, seed) for name in names[1:] for seed in (0, 1)],
    ]
    forbidden = {n: Method(m.title, m.steps, m.trains, m.tuned, _never) for n, m in known_methods().items()}
    monkeypatch.setattr(runner_module, "known_methods", lambda: forbidden)
    assert runner.run(names) == runs
    path = tmp_path / "acceleration.json"
    write_results(path, runs[:1], runner)
    content = write_results(path, runs[1:], runner)
    assert json.loads(path.read_text()) == json.loads(json.dumps(content)) and len(content["runs"]) == 5
    assert content["teacher"]["sha256"] == runner.bench.teacher.checksum()
    one = next(row for row in summary(runs) if row["method"] == "instaflow")
    values = [run["steps"]["1"]["fd_data"] for run in runs if run["method"] == "instaflow"]
    assert one["metrics"]["fd_data"]["mean"] == pytest.approx(sum(values) / 2) and one["seeds"] == 2
    for key in ("fd_teacher", "accuracy", "entropy", "hf_error", "perceptual", "latency_ms", "forwards_per_image"):
        assert key in one["metrics"]
    assert "InstaFlow" in report.table(content, "B1")
    rows = report.expected_order(content)
    assert {row["name"].split(": ")[1] for row in rows} >= {"InstaFlow against direct distillation"}
    report.draw_curves(content, tmp_path / "figures")
    (runner.folder / "shown.json").write_text(json.dumps(["prompt"] * 12))
    titles = {name: name for name in names}
    report.draw_sheets(runner, names, titles, tmp_path / "figures")
    captions = json.loads((tmp_path / "figures" / "captions.json").read_text())
    wanted = {"fd_against_steps_B1.png", "fd_against_cost.png", "same_noise_B1_1.png"}
    assert wanted <= set(captions)
    assert all((tmp_path / "figures" / name).stat().st_size > 1000 for name in captions)
    sheet = tmp_path / "figures" / "same_noise_B1_1.png"
    before, listed = open_rgb(sheet), captions[sheet.name]
    runner.images_of("instaflow", 0).unlink()  # the samples are gone: its row stays where it was
    report.draw_sheets(runner, names, titles, tmp_path / "figures")
    assert (open_rgb(sheet) == before).all()
    kept = json.loads((tmp_path / "figures" / "captions.json").read_text())[sheet.name]
    assert kept == listed and "instaflow" in kept


def _never(*_: Any) -> Sampler:
    raise AssertionError("a finished piece was measured again")


def test_new_method_joins_by_adding_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "identity_map.py").write_text(
        "from benchmarks.acceleration.protocol import Method, Sampler\n"
        "METHOD = Method('identity', (1,), '-', 'guidance', lambda *_: Sampler(lambda z, s, n: z, float))\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert known_methods()["identity_map"].title == "identity"
