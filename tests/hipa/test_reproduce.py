"""Every claim and the ablation table on a tiny teacher: what is measured, and that it is measured once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.ledger import read_claims
from common.paths import REPOSITORY
from common.study import open_sizes
from common.teacher import Teacher
from hipa import experiments, reproduce
from hipa.experiments import Sizes, Study
from tests.common.tiny_teacher import save_teacher

TINY = Sizes(
    batch=4, guidance=1.5, pairs=12, solver_steps=2, rank=3, images=12, base_steps=2, tune=True, lr=0.01, steps=4
)


@pytest.fixture
def study(cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    save_teacher(tmp_path / "teachers" / "emoji64", "v_prediction")
    monkeypatch.setattr(reproduce, "TEACHERS", tmp_path / "teachers")
    monkeypatch.setitem(experiments.LEARNING_RATES, "adaptor", (1e-3, 1e-2))
    monkeypatch.setitem(experiments.LEARNING_RATES, "full", (1e-3,))
    return Study(Teacher.load(tmp_path / "teachers" / "emoji64"), TINY, tmp_path / "study")


@pytest.mark.slow
def test_every_claim_is_measured_with_the_metrics_that_its_target_names(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = read_claims("hipa", "small")
    for measure in (reproduce.h1, reproduce.h1e, reproduce.h2, reproduce.h3, reproduce.h4, reproduce.h6):
        found = measure(study, 1)
        claim = known[next(name for name in known if name.lower() == measure.__name__)]
        assert {condition.metric for condition in claim.target.all_conditions()} <= set(found), claim.id
    first = study.measures("hipa", 1)
    assert reproduce.h4(study, 1)["forwards_ratio"] <= 0.1
    forwards = study.forwards("hipa")["forwards"]
    assert forwards == 12 * 2 * 2 + 3 * 4 * 4  # pairs with guidance, then forward and backward
    monkeypatch.setattr(Study, "training", lambda *_: pytest.fail("trained again"))
    again = Study(study.teacher, TINY, study.folder)
    assert again.measures("hipa", 1) == first


@pytest.mark.slow
def test_the_ablations_change_one_option_each(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ["rank_1", "full", "lambda_10", "gaussian", "latents", "data"]
    monkeypatch.setattr(reproduce, "ABLATIONS", shown)
    given: Any = SimpleNamespace(ablations=True)
    study.sizes.tune = False
    assert reproduce.ablations(study, given)
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["arm", "hipa", "spatial", "pixel", *shown]
    text = (study.results / "ablations_hipa.md").read_text()
    assert "| full | placement full | 100.0 % |" in text and "| rank_1 | rank 1 |" in text


def test_each_ablation_differs_from_the_recipe_in_what_it_says() -> None:
    teacher: Any = SimpleNamespace()
    study = Study(teacher, TINY, Path("unused"))
    recipe = study.config("hipa")
    for name in experiments.ABLATIONS:
        assert study.config(name) != recipe, name
    assert study.config("pixel").loss.spatial == "mse" and study.config("pixel").loss.weight == 0
    assert study.config("spatial").loss.spatial == "dists" and study.config("spatial").loss.weight == 0


@pytest.mark.parametrize("name", ["shapes32-v", "emoji64"])
def test_the_claims_adaptors_stay_within_the_share_that_the_targets_allow(name: str) -> None:
    sizes = open_sizes(Sizes, "hipa", "small")
    study = Study(Teacher.load(REPOSITORY / "ldm" / "pretrained" / name), sizes, Path("unused"))
    assert study.forwards("hipa")["trained_share"] <= 0.05
