"""The search's speed benchmark compares the same networks and says what it compared. No test looks at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import eeea_net as bench
from benchmarks.arms import Pace, Timing
from benchmarks.torch_forms import torchs_convolutions
from eeea_net import model
from eeea_net.proxy import Lesson, train_and_compare


def test_all_arms_train_the_same_networks() -> None:
    errors = {}
    for side in ("ours", "plain", "single", "best"):
        step = bench.make_step(bench.Arm(side, "tiny", "cpu"))
        errors[side] = [float(step(index)) for index in range(2)]  # type: ignore[arg-type]
    setting = bench.setting_of("tiny", "cpu")
    lesson = Lesson(setting)
    genotypes = [genotype for genotype, _ in zip(bench.networks(), range(2))]

    def level(layout: torch.memory_format) -> list[float]:
        found = [train_and_compare(one, setting.proxy, lesson, 0, "cpu", True, layout)["error"] for one in genotypes]
        return torch.tensor(found).tolist()

    assert errors["ours"] == level(torch.channels_last)
    with torchs_convolutions(model):
        assert errors["best"] == level(torch.channels_last)
        assert errors["plain"] == errors["single"] == level(torch.contiguous_format)
    bench.check_the_same_beginning("tiny", "cpu")


def test_other_networks_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 1.0, 1.1])
    monkeypatch.setattr("eeea_net.proxy.train_and_compare", lambda *_: {"training_loss": next(losses)})
    with pytest.raises(RuntimeError, match="tiny: losses of the second step differ"):
        bench.check_the_same_beginning("tiny", "cpu")


def test_rows_name_size_target_and_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Timing(1.0, 1.0, 1, [0.5], 1.0)
    plain = Timing(3.0, 3.0, 1, [0.5], 3.0)
    monkeypatch.setattr(bench, "take_turns", lambda *_: {"ours": same, "plain": plain, "single": plain, "best": same})
    rows = list(bench.rows_of("tiny", "cpu", tmp_path, Pace(1, 1, 1)))
    assert [row["target"] for row in rows] == [2.0, 2.0, None, 1.0, 1.0, 1.0]
    assert rows[0]["ratio"] == pytest.approx(3.0) and "plain loop" in rows[0]["name"]
    assert rows[4]["ours"] < 1.0  # ms a network
    far = {"ours": same, "plain": Timing(1, 1, 1, [0.6], 1), "single": same, "best": same}
    monkeypatch.setattr(bench, "take_turns", lambda *_: far)
    with pytest.raises(RuntimeError, match="tiny: mean errors differ"):
        next(bench.rows_of("tiny", "cpu", tmp_path, Pace(1, 1, 1)))


def test_steps_and_measurements_of_the_elastic_network_are_the_plain_ones() -> None:
    for work, make in (("step", bench.elastic_step), ("members", bench.members_step)):
        sides = [make(bench.Arm(side, "tiny", "cpu", work)) for side in ("ours", "plain")]
        for index in range(3):
            ours, plain = (float(step(index)) for step in sides)  # type: ignore[arg-type]
            assert ours == pytest.approx(plain, rel=0 if work == "members" else 1e-4), (work, index)


def test_rows_of_the_elastic_network_name_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same, slow = Timing(1.0, 1.0, 1, [0.5], 1.0), Timing(3.0, 3.0, 2, [0.5], 3.0)
    monkeypatch.setattr(bench, "take_turns", lambda *_: {"ours": same, "plain": slow, "compiled": slow})
    rows = list(bench.elastic_rows("tiny", "cpu", tmp_path, Pace(1, 1, 1)))
    assert [row["target"] for row in rows] == [1.2, 1.0, 1.2, 1.0, 1.5]
    assert all(row["holds"] for row in rows) and rows[-1]["ratio"] == pytest.approx(3.0)
    monkeypatch.setattr(bench, "take_turns", lambda *_: {"ours": same, "plain": Timing(1, 1, 1, [0.6], 1)})
    with pytest.raises(RuntimeError, match="tiny: losses differ"):
        next(bench.elastic_rows("tiny", "cpu", tmp_path, Pace(1, 1, 1)))
