"""The smoke reproduction, and the machinery of the claims on a tiny study: budgets, sharing, resume, figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.ledger import read_claims
from common.reproduction import measure_claim
from common.study import Watch
from electra import experiments, reproduce
from electra.config import DataConfig
from electra.experiments import OBJECTIVES, SHARES, Sizes, Study
from electra.figures import draw_figures
from electra.tasks import Item, Task
from tests.claims import smoke_records, write_ledger
from tests.electra.tiny_run import WORDS, corpus

TINY = Sizes(
    width=16,
    layers=1,
    heads=2,
    vocabulary=120,
    length=24,
    batch=8,
    main=1.6e-4,
    generator=0.5,
    lr=2e-3,
    sweep="50",
    uncopied=3,
    warmup=2,
    held_out=16,
    judged=16,
    train_examples=24,
    test_examples=16,
    epochs=1,
    finetunings=1,
    tasks=("acceptability",),
)


def tiny_study(folder: Path, sizes: Sizes = TINY) -> Study:
    """A study on a text of the test's own, with a task of sentences in and out of order."""
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(sizes, folder / "study")
    study.data = DataConfig(corpus=str(corpus(folder)), vocabulary_size=sizes.vocabulary, length=sizes.length)
    items = [
        Item(" ".join(WORDS[(n + i * (1 if n % 2 else 7)) % len(WORDS)] for i in range(5)), label=n % 2)
        for n in range(56)
    ]
    parts = items[:24], items[24:40], items[40:]
    study._tasks["acceptability"] = Task(
        "acceptability", "classification", ("mixed", "ordered"), *parts, "accuracy", "order of words"
    )
    return study


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return tiny_study(tmp_path_factory.mktemp("electra-tiny"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("electra-smoke")
    records = smoke_records(reproduce, folder)
    return {**records, "curve": json.loads((folder / "study" / "arms" / "electra-seed0.json").read_text())["curve"]}


@pytest.mark.smoke
def test_generator_learns_by_likelihood_and_less_adversarially(measured: dict[str, Any]) -> None:
    values = measured["E6a"]["measured"][0]
    assert values["loss_gain"] >= 0.2
    assert values["loss_joint"] < 5.4 < math.log(500)
    assert measured["E6a"]["holds"]


@pytest.mark.smoke
def test_joint_training_moves_both_losses(measured: dict[str, Any]) -> None:
    first, last = measured["curve"][0], measured["curve"][-1]
    assert last["mlm_loss"] < first["mlm_loss"] - 0.2
    assert last["main_loss"] < first["main_loss"]
    assert last["rtd_auc"] > 0.53


@pytest.mark.smoke
def test_second_stage_without_a_copy_of_the_weights_calls_everything_original(measured: dict[str, Any]) -> None:
    assert measured["E6b"]["measured"][0]["recall_uncopied"] <= 0.01
    assert measured["E6b"]["holds"]


@pytest.mark.smoke
def test_flops_are_those_of_the_tables_and_of_the_authors_counter(measured: dict[str, Any]) -> None:
    values = measured["E8"]["measured"][0]
    assert values["flops_error_tables"] <= 0.02
    assert values["flops_error_counter"] <= 1e-9
    assert values["parameter_difference"] == 0
    assert measured["E8"]["holds"]


def test_arms_of_a_comparison_have_equal_flops_or_equal_steps(tiny: Study) -> None:
    specs = tiny.specs
    budget = TINY.main * 1e12
    for name in OBJECTIVES:
        assert abs(tiny.flops(specs[name]) - budget) <= tiny.flops(replace(specs[name], steps=1))
    assert specs["electra"].steps == specs["electra15"].steps < specs["mlm"].steps
    for name, share in SHARES.items():
        for kind in ("electra", "mlm"):
            assert abs(specs[f"{kind}-{name}"].steps - share * specs[kind].steps) <= 1
    same = ("size-eighth", "size-quarter", "size-full", "unigram", "uniform", "tying-none", "tying-all", "adversarial")
    assert {specs[name].steps for name in same} == {specs["electra-50"].steps}
    both = [tiny.flops(specs[name]) for name in ("two_stage_generator", "two_stage")]
    one_step = max(tiny.flops(replace(specs[name], steps=1)) for name in ("two_stage_generator", "two_stage"))
    assert abs(sum(both) - budget / 2) <= 2 * one_step
    assert abs(specs["two_stage"].steps - specs["two_stage_generator"].steps) <= 1


def test_every_claim_measures_what_its_target_names_and_trains_a_shared_arm_once(
    tiny: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = Study._train

    def counted(self: Study, name: str, *rest: Any) -> Any:
        trained.append(name)
        return train(self, name, *rest)

    monkeypatch.setattr(Study, "_train", counted)
    for name, claim in read_claims("electra", "small").items():
        if name == "E8":
            continue
        values = getattr(reproduce, name.lower())(tiny, 0)
        for condition in claim.target.all_conditions():
            assert math.isfinite(values[condition.metric]), (name, condition)
    needed = {name for arms, _, _ in reproduce.arms_of(tiny).values() for name in arms}
    assert sorted(trained) == sorted(needed)
    row = json.loads((tiny.folder / "example.json").read_text())[0]
    assert row[0]["was"] == row[0]["read"] == "[CLS]" and all(0 <= token["replaced"] <= 1 for token in row)
    assert any(token["written"] for token in row)


def test_another_study_of_the_folder_reads_arms_and_scores_unless_its_sizes_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_study(tmp_path)
    score = first.score("electra-6", 0, "acceptability")
    weights = first.pretrained("electra-6", 0).network.state_dict()
    again = tiny_study(tmp_path)
    monkeypatch.setattr(Study, "_train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(experiments, "finetune", lambda *_: pytest.fail("fine-tuned again"))
    assert again.score("electra-6", 0, "acceptability") == score
    found = again.pretrained("electra-6", 0).network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    monkeypatch.undo()
    faster = tiny_study(tmp_path, replace(TINY, lr=1e-3))
    faster.score("electra-6", 0, "acceptability")
    for path in ("arms/electra-6-seed0.json", "scores/electra-6-seed0-acceptability.json"):
        assert '"lr": 0.001' in (faster.folder / path).read_text(), f"{path} was not made again"


def test_changed_finetuning_rate_makes_a_score_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(tmp_path)
    study.score("scratch", 0, "acceptability")
    monkeypatch.setitem(experiments.RATES, "scratch", 2e-3)
    study.score("scratch", 0, "acceptability")
    known = json.loads((study.folder / "scores" / "scratch-seed0-acceptability.json").read_text())
    assert known["settings"]["rate"] == 2e-3


def test_changed_finetuning_measures_a_claim_anew_on_the_same_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def measure(study: Study, seed: int) -> dict[str, float]:
        calls.append(study.sizes.epochs)
        study.pretrained("electra-6", seed)
        return {"gain": 0.0}

    claim = read_claims("electra", "small")["E2"]
    for sizes in (TINY, TINY, replace(TINY, epochs=2)):
        measure_claim(claim, tiny_study(tmp_path, sizes), measure, seeds=[0])
        monkeypatch.setattr(Study, "_train", lambda *_: pytest.fail("trained again"))
    assert calls == [1, 2]


def test_an_interrupted_arm_ends_in_the_same_weights_and_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "CHECKPOINT_EVERY", 2)
    whole = tiny_study(tmp_path / "whole").pretrained("electra-25", 0)
    assert whole.steps >= 5
    study = tiny_study(tmp_path / "cut")
    ended = Watch.on_train_batch_end

    def stop(self: Watch, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == whole.steps - 1:
            raise KeyboardInterrupt
        ended(self, trainer, *rest)

    monkeypatch.setattr(Watch, "on_train_batch_end", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        study.pretrained("electra-25", 0)
    assert list((study.folder / "arms").glob("electra-25-seed0/checkpoints/last.ckpt"))
    monkeypatch.setattr(Watch, "on_train_batch_end", ended)
    resumed = tiny_study(tmp_path / "cut").pretrained("electra-25", 0)
    state = resumed.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.network.state_dict().items())

    def without_seconds(curve: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{key: value for key, value in point.items() if key != "seconds"} for point in curve]

    assert without_seconds(resumed.curve) == without_seconds(whole.curve)
    assert not (study.folder / "arms" / "electra-25-seed0").exists()


def test_the_bill_counts_shared_arms_once(tiny: Study, capsys: pytest.CaptureFixture[str]) -> None:
    found = reproduce.print_cost(tiny, seeds=3)
    lines = capsys.readouterr().out.splitlines()
    assert len({row["arm"] for row in found["arms"]}) == len(found["arms"])
    assert set(found["claims"]) == set(read_claims("electra", "small"))
    assert found["claims"]["E8"] == 0 and found["claims"]["E1"] > 0
    assert any(line.startswith("E3") and "2 new arms" in line for line in lines)


def test_figures_are_drawn_for_the_claims_that_are_there(tiny: Study, tmp_path: Path) -> None:
    values = {name: getattr(reproduce, name.lower())(tiny, 0) for name in ("E3", "E4a", "E4b", "E7a", "E7b")}
    some = {name: values[name] for name in ("E3", "E4a", "E4b")}
    write_ledger(tmp_path / "electra.json", "electra", some)
    draw_figures(tmp_path / "electra.json", tmp_path / "some", tmp_path)
    assert {path.name for path in (tmp_path / "some").glob("*.png")} == {"table5.png", "generator_size.png"}
    reproduce.keep_example(tiny)
    write_ledger(tmp_path / "electra.json", "electra", values)
    draw_figures(tmp_path / "electra.json", tmp_path / "all", tiny.folder)
    drawn = {path.name for path in (tmp_path / "all").glob("*.png")}
    assert drawn == {
        "learning_curves.png",
        "table5.png",
        "generator_size.png",
        "sample_efficiency.png",
        "corrupted_sentence.png",
    }
    assert set(json.loads((tmp_path / "all" / "captions.json").read_text())) == drawn
