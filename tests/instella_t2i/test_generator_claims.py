"""Arms of the generators' claims, at sizes of seconds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.study import open_sizes
from instella_t2i import generator_experiments, reproduce
from instella_t2i.experiments import Sizes, Study
from tests.instella_t2i.tiny_text import save_language_model


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    sizes = open_sizes(Sizes, "instella_t2i", "smoke")
    small = sizes.generators
    small.blocks, small.stream_heads, small.batch, small.tokenizer_steps, small.steps = 2, 1, 8, 3, 3
    small.images, small.training_images = 12, 16
    save_language_model(folder / "text")
    return Study(sizes, folder / "study")


def test_arms_differ_in_one_option_and_share_the_tokenizer(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_experiments, "ENCODER", study.folder.parent / "text")
    for measure in (reproduce.c, reproduce.d, reproduce.f):
        found = measure(study, 0)
        assert all(math.isfinite(value) for value in found.values()) and -1 <= found["accuracy_gain"] <= 1
    generators = study.generators
    assert generators.options("x", 1e-3, 9).target == "x"  # type: ignore[attr-defined]
    assert generators.reader("last").layers == [1, 1] and generators.reader("diffusion").layers == [0, 1]
    first, last = (generators.generator(name, 0).network.state_dict() for name in ("diffusion", "last"))
    assert not torch.equal(first["proj_out.weight"], last["proj_out.weight"])
    steps = {name: generators.generator(name, 0).record["steps"] for name in ("diffusion", "autoregression", "x")}
    assert set(steps.values()) == {3}


def test_few_steps_are_measured_in_all_protocols(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_experiments, "ENCODER", study.folder.parent / "text")
    found = reproduce.h(study, 0)
    assert len(found) == 14 and all(math.isfinite(value) for value in found.values())


def test_learning_rate_and_guidance_are_chosen_with_equal_tries(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(generator_experiments, "ENCODER", study.folder.parent / "text")
    generators = study.generators
    monkeypatch.setattr(generators.sizes, "tune", True)
    for name in ("diffusion", "autoregression"):
        assert generators.learning_rate(name) in generator_experiments.LEARNING_RATES
        assert generators.guidance(name, 0) in generator_experiments.GUIDANCES
        kept = study.values(f"tuning-{name}", dict, generators.settings)["loss"]
        assert len(kept) == len(generator_experiments.LEARNING_RATES) and all(map(math.isfinite, kept.values()))
