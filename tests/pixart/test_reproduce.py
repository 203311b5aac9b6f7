"""The smoke reproduction: the stable claims at a budget of seconds, through the same program as the small tier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data.shapes import Spec
from common.files import write_json
from pixart import reproduce
from pixart.experiments import alignment, poor_captions
from tests.claims import smoke_records, write_ledger


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return smoke_records(reproduce, tmp_path_factory.mktemp("pixart-smoke"))


@pytest.mark.smoke
def test_adaln_single_saves_parameters_and_memory(measured: dict[str, Any]) -> None:
    values = measured["P1"]["measured"][0]
    assert round(values["full_size_single_millions"], 6) == 611.349152
    assert values["full_size_block_millions"] > 825
    assert values["parameter_ratio"] <= 0.80
    assert values["memory_ratio"] < 1
    assert measured["P1"]["holds"]


@pytest.mark.smoke
def test_reparameterised_start_beats_scratch_at_equal_steps_and_equals_the_dit_at_500(measured: dict[str, Any]) -> None:
    values = measured["P2"]["measured"][0]
    assert values["difference_at_500"] <= 1e-4
    assert values["mse_ratio_equal_steps"] <= 0.85
    assert values["mse_ratio_random_tables"] <= 0.8
    assert measured["P2"]["holds"]


@pytest.mark.smoke
def test_only_dense_captions_make_wrong_ones_costly(measured: dict[str, Any]) -> None:
    values = measured["P3"]["measured"][0]
    assert values["penalty_dense"] >= 0.03
    assert values["penalty_dense"] >= 5 * values["penalty_web"]
    assert values["nouns_per_caption_dense"] > values["nouns_per_caption_web"]
    assert measured["P3"]["holds"]


def test_alignment_counts_missing_and_surplus_objects() -> None:
    white = torch.full((1, 3, 32, 32), 250, dtype=torch.uint8)
    red = white.clone()
    red[:, :, 4:14, 4:14] = torch.tensor([222, 40, 40], dtype=torch.uint8)[:, None, None]
    two = red.clone()
    two[:, :, 18:28, 18:28] = torch.tensor([45, 85, 225], dtype=torch.uint8)[:, None, None]
    one = Spec("color", "a red square", (("red", "square"),))
    both = Spec("attr", "a red square and a blue square", (("red", "square"), ("blue", "square")))
    free = Spec("single", "a square", ((None, "square"),))
    expected = [(red, one, 1.0), (two, both, 1.0), (red, both, 0.5), (two, one, 0.5), (white, one, 0.0), (red, free, 1)]
    for images, spec, value in expected:
        assert alignment(images, [spec])["alignment"] == value, spec
        assert alignment(images, [spec])["alignment_objects"] == value, spec


def test_poor_captions_keep_a_third_of_the_words_and_swap_a_fifth() -> None:
    captions = [f"apple{i} pear{i} plum{i}, fig{i}" for i in range(2000)]
    poor = poor_captions(captions, 0)
    assert poor == poor_captions(captions, 0) != poor_captions(captions, 1)
    words = [word for text in poor if text != "picture" for word in text.split()]
    assert 0.32 < len(words) / (4 * len(captions)) < 0.38
    foreign = sum(text != "picture" and not text.split()[0].endswith(str(i)) for i, text in enumerate(poor))
    kept = sum(text != "picture" for text in poor)
    assert 0.16 < foreign / kept < 0.24


def test_figures_are_drawn_for_the_claims_that_are_there(tmp_path: Path) -> None:
    from pixart.figures import SCALES, draw_figures

    arms = ("reparam", "scratch", "scratch_extra_steps", "dense", "web", "sa", "iddpm")
    names = [*arms, *(f"guidance_{name}" for name in SCALES)]
    metrics = {f"{key}_{name}": 0.5 for key in ("mse", "fid", "penalty", "alignment", "recall") for name in names}
    write_ledger(tmp_path / "pixart.json", "pixart", {"P2": metrics, "P6": metrics})
    for seed in (0, 1, 2):
        curve = [{"step": step, "seconds": 1.0, "mse": 0.5 / step, "penalty": 0.1} for step in (1, 2)]
        write_json(tmp_path / "arms" / f"dense-seed{seed}.json", {"seconds": 1.0, "steps": 2, "curve": curve})
    draw_figures(tmp_path / "pixart.json", tmp_path / "figures", tmp_path / "arms")
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"training_curves.png", "reparameterisation.png", "guidance.png", "samplers.png"}
    assert set(json.loads((tmp_path / "figures" / "captions.json").read_text())) == drawn
