"""What claims are measured on: kept values, tensors and arms, the budget of CPU seconds, sizes from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from common.cpu import cpu_kind
from common.study import (
    ENDLESS,
    Arm,
    Judge,
    Study,
    Watch,
    claims_precision,
    fit_arm,
    kept,
    kept_tensors,
    labelled,
    open_sizes,
)
from tests.common.test_training import Line, data, options_of
from tests.refusals import refused


def fit_line(network: Line, watch: Watch, steps: int = 4, **options: Any) -> None:
    fit_arm(network, data(steps), watch, options_of(), batch_size=4, grad_clip=0.0, steps=steps, **options)


def test_values_are_made_once_for_the_same_settings(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict[str, float]:
        calls.append(1)
        return {"loss": float(len(calls)), "diverged": float("nan")}

    for settings in ({"lr": (1, 2)}, {"lr": [1, 2]}, {"lr": (1, 3)}):
        found = kept(tmp_path / "a" / "values.json", make, settings)
    assert found["loss"] == 2 and len(calls) == 2
    again = kept(tmp_path / "a" / "values.json", make, settings)
    assert again.keys() == {"loss", "diverged"} and again["diverged"] != again["diverged"] and len(calls) == 2


def test_tensors_are_made_once_for_the_same_settings(tmp_path: Path) -> None:
    def make(value: float) -> dict[str, Tensor]:
        return {"x": torch.full((2, 2), value).T}

    path = tmp_path / "x.safetensors"
    assert kept_tensors(path, lambda: make(1.0), {"n": 1})["x"].eq(1).all()
    assert kept_tensors(path, lambda: pytest.fail("made again"), {"n": 1})["x"].eq(1).all()
    assert kept_tensors(path, lambda: make(2.0), {"n": 2})["x"].eq(2).all()


def test_budget_of_cpu_seconds_ends_training_and_measuring_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("common.study.time.process_time", lambda: clock[0])
    step = Line.training_step

    def slow_step(self: Line, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        clock[0] += 1
        return step(self, batch, batch_idx)

    def measure(step: int) -> Mapping[str, float]:
        clock[0] += 100
        return {"value": float(step)}

    monkeypatch.setattr(Line, "training_step", slow_step)
    watch = Watch(looks=(1, 2), measure=measure, budget=3)
    fit_line(Line(), watch, steps=ENDLESS)
    assert watch.steps == watch.seconds == 3
    assert [(point["value"], point["seconds"]) for point in watch.curve] == [(1, 1), (2, 2), (3, 3)]


def test_the_end_is_measured_once_whether_looked_for_or_not() -> None:
    for looks, steps in ((), [4]), ([2], [2, 4]), ([2, 4], [2, 4]):
        watch = Watch(looks, lambda step: {"value": float(step)})
        fit_line(Line(), watch)
        assert [point["step"] for point in watch.curve] == steps


def line_arm(study: Study[Any], settings: Any, stop_at: int = 0) -> Arm[Line]:
    def train(network: Line, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
        def measure(step: int) -> Mapping[str, float]:
            if step == stop_at:
                raise KeyboardInterrupt
            return {"weight": float(network.weight.detach())}

        watch = Watch(range(1, 5), measure)
        fit_line(network, watch, folder=folder, checkpoint_every=1)
        return network, {**watch.record(), "tflop": 0.5}

    return study.arm("main-arm", 3, Line, train, settings)


def test_an_arm_is_trained_once_and_read_afterwards(tmp_path: Path) -> None:
    study = Study(None, tmp_path)
    first = line_arm(study, {"steps": 4})
    assert line_arm(study, {"steps": 4}) is first
    again = line_arm(Study(None, tmp_path), {"steps": 4})
    assert again.record == first.record and again.network.weight.equal(first.network.weight)
    assert (
        again.steps == 4 and again.at(2)["step"] == 2 and again.last["weight"] == float(first.network.weight.detach())
    )
    assert set(again.costs()) == {"steps_main_arm", "cpu_seconds_main_arm", "tflop_main_arm"}
    names = {path.name for path in (tmp_path / "arms").iterdir()}
    assert names == {"main-arm-seed3.json", "main-arm-seed3.safetensors"}
    study.forget()
    assert line_arm(study, {"steps": 4}) is not first
    record = json.loads((tmp_path / "arms" / "main-arm-seed3.json").read_text())
    assert record["settings"] == {"precision": "32-true", "cpu": cpu_kind(), "steps": 4}
    assert record["made"]["cpu"] == cpu_kind()


def test_an_interrupted_arm_goes_on_from_its_checkpoint_and_other_settings_or_another_cpu_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = line_arm(Study(None, tmp_path / "whole"), {"lr": 1})
    for settings, cpu, first in ({"lr": 1}, "one", 3), ({"lr": 2}, "one", 1), ({"lr": 1}, "other", 1):
        folder = tmp_path / f"cut{cpu}{settings['lr']}"
        monkeypatch.setattr("common.study.cpu_kind", lambda: "one")
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            line_arm(Study(None, folder), {"lr": 1}, stop_at=3)
        assert (folder / "arms" / "main-arm-seed3" / "checkpoints" / "last.ckpt").is_file()
        monkeypatch.setattr("common.study.cpu_kind", lambda cpu=cpu: cpu)
        seen: list[int] = []
        resumed = Watch.on_train_batch_end

        def count(self: Watch, trainer: pl.Trainer, *rest: Any, seen: list[int] = seen) -> None:
            resumed(self, trainer, *rest)  # noqa: B023
            seen.append(self.steps)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watch, "on_train_batch_end", count)
            arm = line_arm(Study(None, folder), settings)
        assert seen == list(range(first, 5))
        assert arm.network.weight.equal(whole.network.weight)
        assert [point["weight"] for point in arm.curve] == [point["weight"] for point in whole.curve]
        assert not (folder / "arms" / "main-arm-seed3").exists()


def test_an_arm_that_was_killed_after_its_last_checkpoint_has_the_record_of_one_that_was_not(tmp_path: Path) -> None:
    watches = [Watch((2,), lambda step: {"value": float(step)}) for _ in range(2)]
    for watch in watches:
        fit_line(Line(), watch, folder=tmp_path, checkpoint_every=1)
    first, again = ({**watch.record(), "peak_bytes": 0} for watch in watches)
    assert again == first and again["steps"] == 4


def test_arms_are_in_bf16_only_where_the_budgets_were_set_in_it_and_the_cpu_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for paper, declared in (("plain", ""), ("halved", "precision: bf16-mixed\n")):
        (tmp_path / paper).mkdir()
        (tmp_path / paper / "claims.yaml").write_text(f"{declared}tiers: {{}}\nclaims: []\n")
    monkeypatch.setattr("common.ledger.REPOSITORY", tmp_path)
    for possible, found in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr("common.study.bf16_possible", lambda _, possible=possible: possible)
        claims_precision.cache_clear()
        assert claims_precision("halved") == found and claims_precision("plain") == "32-true"
    claims_precision.cache_clear()


def test_judge_tells_equal_pictures_from_others_and_compares_equal_counts() -> None:
    judge = Judge()
    judge.features = lambda images: images.flatten(1).float()  # type: ignore[method-assign]
    real = torch.randint(256, (64, 3, 2, 2), dtype=torch.uint8)
    same, other = judge.distances(real[:32], real), judge.distances(255 - real[:32] // 4, real)
    assert same["fid"] < 1e-3 < other["fid"] and set(same) == {"fid", "kid_x1000", "precision", "recall"}
    assert judge.features_of_real(real[:16]).shape[0] == 16  # another set at the same address


def test_samples_of_the_first_seed_alone_are_shown(tmp_path: Path) -> None:
    study, images = Study(None, tmp_path), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    study.show(1, "second", images)
    study.show(0, "first", images)
    assert [path.name for path in tmp_path.glob("*.png")] == ["first.png"]


def test_labels_end_the_keys_of_an_arm() -> None:
    assert labelled({"fid": 1.0, "kid": 2.0}, "pixel") == {"fid_pixel": 1.0, "kid_pixel": 2.0}
    assert labelled({"fid": 1.0, "kid": 2.0}, "pixel", "kid") == {"kid_pixel": 2.0}


def test_what_an_earlier_start_and_a_study_beside_it_took_is_part_of_what_a_claim_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search keeps itself in its own folder: the second claim that uses it costs what the first start took."""
    now = [0.0]
    monkeypatch.setattr("common.study.time.perf_counter", lambda: now[0])

    def search(study: Study[None], seconds: float) -> None:
        with study.counted(tmp_path / "search"):
            now[0] += seconds

    study = Study(None, tmp_path)
    search(study, 30)
    assert study.reused_seconds == 0  # the measurement's own clock has counted them
    search(study, 1)
    assert study.reused_seconds == 0
    study.forget()
    search(study, 2)
    assert study.reused_seconds == 31
    with pytest.raises(KeyboardInterrupt), study.counted(tmp_path / "other"):
        now[0] += 5
        raise KeyboardInterrupt
    search(other := study.beside(Study(None, tmp_path / "beside")), 0)
    other.values("teacher", lambda: {"a": 1.0})
    other.forget()
    other.values("teacher", lambda: {"a": 1.0})
    with other.counted(tmp_path / "other"):
        pass
    assert study.reused_seconds == 31 + 5
    study.forget()
    assert study.reused_seconds == 0


def test_a_piece_that_others_need_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes take 100 s, a choice 10 s, two arms 20 s each; scores are made of all of them, others read them later."""
    now = [0.0]
    monkeypatch.setattr("common.study.time.perf_counter", lambda: now[0])
    study = Study(None, tmp_path)

    def takes(seconds: float) -> dict[str, float]:
        now[0] += seconds
        return {"a": 1.0}

    def codes() -> object:
        return study.values("codes", lambda: takes(100))

    def choice() -> object:
        return study.values("choice", lambda: [codes(), takes(10)][1])  # type: ignore[return-value]

    def train(network: nn.Linear, _: Path) -> tuple[nn.Module, dict[str, float]]:
        codes()
        return network, takes(20)

    def arm(seed: int) -> object:
        choice()
        return study.arm("plain", seed, lambda: nn.Linear(1, 1), train)

    def score(seed: int) -> object:
        return study.values(f"score-{seed}", lambda: [arm(seed), arm(seed), takes(1)][2])  # type: ignore[return-value]

    score(0)
    assert study.reused_seconds == 0 and now[0] == 131  # the measurement's own clock
    study.forget()
    score(0)
    assert study.reused_seconds == 131 and now[0] == 131
    arm(0)
    codes()
    assert study.reused_seconds == 131
    score(1)
    assert study.reused_seconds == 131 and now[0] == 131 + 21
    study.forget()
    codes()
    assert study.reused_seconds == 100
    study.forget()
    arm(1)
    assert study.reused_seconds == 130
    (tmp_path / "seconds" / "choice.json").unlink()  # of pieces from elsewhere nobody knows
    study.forget()
    score(1)
    assert study.reused_seconds == 121


@dataclass(frozen=True)
class Data:
    size: int
    flip: bool = True


@dataclass(frozen=True)
class Sizes:
    width: int
    names: tuple[str, ...]
    data: Data
    steps: int = 0


def test_sizes_are_the_papers_own_dataclass_and_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    text = "tiers: {small: {sizes: {width: 8, names: [a, b], data: {size: 4}}, budget: {steps: 9}}}\nclaims: []\n"
    path.write_text(text)
    assert open_sizes(Sizes, path, "small") == Sizes(8, ("a", "b"), Data(4), 9)
    assert open_sizes(Sizes, path, "small", 4) == Sizes(8, ("a", "b"), Data(4), 36)
    for old, new, word in (
        ("width: 8, ", "", "width"),
        ("width: 8", "width: wide", "width"),
        ("steps", "step", "step"),
    ):
        path.write_text(text.replace(old, new))
        refused(rf"tier small in claims\.yaml: .*{word}", open_sizes, Sizes, path, "small")
