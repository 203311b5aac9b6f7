"""The claims of every paper: what claims.yaml says is what stands in results/ and what reproduce.py can measure."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from common.ledger import Condition, read_claims, read_sizes
from common.paths import REPOSITORY, RESULTS
from report.build import load, waiting
from tests.refusals import refused

PAPERS = sorted(path.parent.name for path in REPOSITORY.glob("*/claims.yaml"))


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if (RESULTS / f"{paper}.json").is_file()])
def test_every_record_has_the_target_of_the_claims_file(paper: str) -> None:
    records = json.loads((RESULTS / f"{paper}.json").read_text(encoding="utf-8"))["claims"]
    for record in records:
        claim = read_claims(paper, record["tier"])[record["id"]]
        written = json.loads(json.dumps(asdict(claim)))
        assert {key: record[key] for key in ("statement", "paper", "target")} == {
            key: written[key] for key in ("statement", "paper", "target")
        }
        assert [row["seed"] for row in record["measured"]] == written["seeds"]
    # What nobody has measured yet has no record, and the report says so: it is counted beside the rest.
    known = set(read_claims(paper, "small"))
    measured = {record["id"] for record in records if record["tier"] == "small"}
    assert measured <= known
    left = len(known - measured)
    assert waiting(load(RESULTS)[paper], REPOSITORY / paper) == (f", {left} not measured yet" if left else "")


@pytest.mark.parametrize("paper", PAPERS)
def test_every_claim_has_a_function_that_measures_it_and_a_smoke_claim_is_a_small_one_too(paper: str) -> None:
    reproduce = importlib.import_module(f"{paper}.reproduce")
    small, smoke = read_claims(paper, "small"), read_claims(paper, "smoke")
    assert set(smoke) <= set(small) and smoke
    for name in small:
        assert callable(getattr(reproduce, name.lower())), name


FILE = """
tiers:
  small: {seeds: [0, 1, 2], sizes: {width: 8, data: {size: 4, flip: false}}, budget: {steps: 10}}
  smoke: {seeds: [0], budget: {steps: 1}}
claims:
  - id: T1
    statement: more is more
    paper: {value: 3.5, source: table 1}
    target:
      text: at least 1
      metric: gain
      op: ">="
      value: 1
      conditions: [loss < 1e-5]
    rungs: [1, 4]
    tiers:
      small: {seeds: [0, 1, 2, 3], sizes: {data: {size: 6}}, budget: {images: 5}}
      smoke: {target: {text: above 0, metric: gain, op: ">", value: 0}}
  - id: T2
    statement: less is more
    paper: {value: none, source: none}
    target: {text: below 0, metric: loss, op: "<", value: 0.0}
    tiers: [small]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy" / "claims.yaml"
    path.parent.mkdir()
    path.write_text(FILE, encoding="utf-8")
    return path


def test_a_claim_has_what_its_tier_shares_and_what_it_says_itself(file: Path) -> None:
    small, smoke = read_claims(file, "small"), read_claims(file, "smoke")
    assert list(small) == ["T1", "T2"] and list(smoke) == ["T1"]
    assert small["T1"].seeds == (0, 1, 2, 3) and small["T2"].seeds == (0, 1, 2) and smoke["T1"].seeds == (0,)
    assert small["T1"].sizes == {"width": 8, "data": {"size": 6, "flip": False}}
    assert small["T2"].sizes["data"]["size"] == 4
    assert small["T1"].budget == {"steps": 10, "images": 5} and smoke["T1"].budget == {"steps": 1}
    assert small["T1"].target.all_conditions() == (Condition("gain", ">=", 1.0), Condition("loss", "<", 1e-5))
    assert smoke["T1"].target.all_conditions() == (Condition("gain", ">", 0.0),)
    assert small["T1"].rungs == (1, 4) and small["T2"].rungs == (1,) and smoke["T1"].rungs == (1,)
    assert read_sizes(file, "small") == {"width": 8, "data": {"size": 4, "flip": False}, "steps": 10}


def test_a_rung_multiplies_budgets_and_nothing_else(file: Path) -> None:
    once, four = read_claims(file, "small"), read_claims(file, "small", 4)
    assert four["T1"].budget == {"steps": 40, "images": 20} and four["T1"].rung == 4
    assert {**asdict(four["T1"]), "budget": 0, "rung": 0} == {**asdict(once["T1"]), "budget": 0, "rung": 0}
    assert read_sizes(file, "small", 4) == {"width": 8, "data": {"size": 4, "flip": False}, "steps": 40}
    shared = FILE.replace("budget: {steps: 10}}", "budget: {steps: {first: 10, rate: 0.5}}, rungs: [1, 16]}")
    file.write_text(shared.replace("    rungs: [1, 4]\n", "    timed: true\n"), encoding="utf-8")
    found = read_claims(file, "small", 16)
    assert found["T1"].timed and found["T1"].rungs == (1,) and found["T2"].rungs == (1, 16)
    assert found["T2"].budget == {"steps": {"first": 160, "rate": 8.0}}


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_whose_claims_have_rungs_opens_its_study_at_the_rung_asked_for(paper: str) -> None:
    claims = read_claims(paper, "small").values()
    program = (REPOSITORY / paper / "reproduce.py").read_text(encoding="utf-8")
    assert all(claim.rungs == (1,) for claim in claims) or re.search(r"\b(given|options)\.rung\b", program)
    assert not [claim.id for claim in claims if claim.timed and claim.rungs != (1,)]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("    statement: more is more\n", "", "toy/claims.yaml: claim T1: statement is missing"),
        ("statement: more is more", "statement: [more]", r"claim T1: statement is \['more'\], expected a text"),
        ("value: 1\n", 'value: "1"\n', "claim T1, target: value is '1', expected a number"),
        ("value: 1\n", "value: true\n", "claim T1, target: value is True, expected a number"),
        ('op: ">="', 'op: "=="', "claim T1, target: comparison '==' is unknown, expected one of >=, >"),
        ("loss < 1e-5", "loss below 1e-5", "claim T1, target: comparison 'below' is unknown"),
        ("loss < 1e-5", "loss < little", 'claim T1, target: condition .* is not of the form "recall_drop > 0.0"'),
        ("source: table 1", "place: table 1", "claim T1, paper: unknown key 'place', expected one of value, source"),
        ("rungs: [1, 4]", "rungs: [0, 4]", "claim T1, rungs: expected different whole numbers from 1 on"),
        (
            "rungs: [1, 4]",
            "rungs: [1, 4]\n    timed: true",
            "claim T1: rungs is .1, 4., but a claim about time has rung 1",
        ),
        ("rungs: [1, 4]", "timed: 1", "claim T1: timed is 1, expected true or false"),
        ("budget: {images: 5}", "budget: {images: five}", "budget: images is 'five', expected a number, which a rung"),
        ("seeds: [0, 1, 2, 3]", "seeds: [0, 0, 1]", "claim T1, seeds: expected different whole numbers from 0 on"),
        ("seeds: [0, 1, 2, 3]", "seeds: [0, 1]", "claim T1: seeds has fewer than 3 in tier small"),
        ("tiers: [small]", "tiers: [large]", "claim T2: tier 'large' is not among those of the file, small, smoke"),
        ("id: T2", "id: T1", "claim T1 is there twice"),
        ("budget: {images: 5}", "budgets: {images: 5}", "claim T1, tier small: unknown key 'budgets'"),
        ("smoke: {seeds: [0], ", "smoke: {seeds: 0, ", "tier smoke: seeds is 0, expected a list"),
        ("claims:", "claim:", "toy/claims.yaml: unknown key 'claim', expected one of tiers, claims"),
        ("tiers:\n  small: {", "tiers:\n  small: [{", "toy/claims.yaml is not valid YAML"),
    ],
)
def test_a_mistake_is_named_by_file_claim_and_key(file: Path, old: str, new: str, sentence: str) -> None:
    assert old in FILE
    file.write_text(FILE.replace(old, new, 1), encoding="utf-8")
    tier = "smoke" if "tier smoke" in sentence else "small"
    refused(sentence, read_claims, file, tier)  # type: ignore[arg-type]


def test_a_missing_file_and_a_missing_tier_are_named(file: Path, tmp_path: Path) -> None:
    refused(r"nowhere/claims\.yaml cannot be read", read_claims, tmp_path / "nowhere" / "claims.yaml", "small")
    refused(r"toy/claims\.yaml has no tier 'paper'; it has small, smoke", read_claims, file, "paper")
