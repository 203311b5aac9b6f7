"""Plots and captions: what is written, what is merged, what the numbers are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.figures import (
    bars,
    curve,
    draw_ladder,
    keep_captions,
    kept_logs,
    ladder,
    over_seeds,
    panels,
    save_figure,
    series,
    small_claims,
    training_curve,
)
from common.files import write_json

CLAIM = {"id": "X1", "tier": "small", "measured": [{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 5.0}]}


def listing(folder: Path) -> dict[str, str]:
    return json.loads((folder / "captions.json").read_text())


def test_a_figure_is_written_with_its_caption_and_without_the_librarys_version(tmp_path: Path) -> None:
    figure, axes = panels(2, 3, 2)
    bars(axes[0], CLAIM, {"one": "a", "two": "b"}, "title")
    curve(axes[1], CLAIM, {1.0: "a", 2.0: "b"}, label="line")
    save_figure(figure, tmp_path / "made" / "plot.png", "What it shows.")
    with Image.open(tmp_path / "made" / "plot.png") as picture:
        assert picture.size == (660, 220) and "Software" not in picture.info
    assert listing(tmp_path / "made") == {"plot.png": "What it shows."}
    assert [patch.get_height() for patch in axes[0].patches] == [2.0, 5.0]


def test_captions_of_other_programs_stay_and_those_without_a_picture_go(tmp_path: Path) -> None:
    for name in ("old.png", "mine.png", "theirs.svg"):
        (tmp_path / name).write_bytes(b"")
    keep_captions(tmp_path, {"old.png": "Old.", "theirs.svg": "Theirs.", "mine.png": "Mine."})
    (tmp_path / "old.png").unlink()
    keep_captions(tmp_path, {"mine.png": "Mine, again.", "never.png": "Never drawn."})
    assert list(listing(tmp_path).items()) == [("theirs.svg", "Theirs."), ("mine.png", "Mine, again.")]


def test_a_figure_without_caption_leaves_the_listing_alone(tmp_path: Path) -> None:
    save_figure(panels()[0], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_means_and_sample_deviations_are_over_seeds() -> None:
    mean, spread = series(CLAIM, ["a", "b"])
    assert mean.tolist() == [2.0, 5.0] and spread.tolist() == [pytest.approx(2**0.5), 0.0]
    assert over_seeds([[4.0, 5.0]])[1].tolist() == [0.0, 0.0]
    assert np.isnan(over_seeds([[None, 1.0], [2.0, 1.0]])[0]).tolist() == [True, False]


def test_a_ladder_has_a_point_a_rung_and_its_target_as_a_line(tmp_path: Path) -> None:
    target = {"metric": "a", "op": ">=", "value": 2.5}
    rungs = [{"rung": 4, "mean": 3.0, "std": 0.5}, {"rung": 16, "mean": None, "std": None}]
    claim = {**CLAIM, "target": target, "mean": 2.0, "std": 1.0, "rungs": rungs}
    _, (axis,) = panels()
    ladder(axis, claim)
    (points,) = (container.lines[0] for container in axis.containers)
    assert points.get_xdata().tolist() == [1, 4, 16] and points.get_ydata().tolist()[:2] == [2.0, 3.0]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [2.5]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1x", "4x", "16x"]
    assert axis.get_ylabel() == "a"
    ladder(axis, claim, {"a": "length of something that is long to say (m)"})
    assert axis.get_ylabel().split("\n") == ["length of something that", "is long to say (m)"]
    write_json(tmp_path / "r.json", {"claims": [claim, {**CLAIM, "id": "X2"}]})
    assert draw_ladder(tmp_path / "r.json", tmp_path) == tmp_path / "ladder.png"
    assert listing(tmp_path)["ladder.png"].startswith("Metric against budget")
    write_json(tmp_path / "r.json", {"claims": [CLAIM]})
    assert draw_ladder(tmp_path / "r.json", tmp_path) is None


def test_only_claims_of_the_small_tier_are_drawn(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"claims": [CLAIM, {**CLAIM, "id": "X2", "tier": "smoke"}]})
    assert list(small_claims(tmp_path / "r.json")) == ["X1"]


def test_logs_of_other_checkpoints_do_not_stack(tmp_path: Path) -> None:
    for seed, steps in enumerate([(1, 2), (1, 3), (1, 2)]):
        curve_of = [{"step": step, "loss": step + seed} for step in steps]
        write_json(tmp_path / f"arm-seed{seed}.json", {"curve": curve_of})
    logs = kept_logs(tmp_path, "arm-seed*.json")
    assert [log["curve"][0]["loss"] for log in logs] == [1, 3]
    axis = panels()[1][0]
    training_curve(axis, logs, "loss", 10.0)
    assert axis.lines[0].get_xydata().tolist() == [[10.0, 2.0], [20.0, 3.0]]
