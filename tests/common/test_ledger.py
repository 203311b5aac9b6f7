"""The claims ledger: what is recorded, when a claim holds, and that targets cannot move."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import ledger
from common.errors import UserError
from common.ledger import (
    Claim,
    Condition,
    PaperValue,
    Target,
    bench_row,
    check_targets,
    peak_memory,
    peak_resident,
    record,
    verdict,
    within_noise,
    write_claims,
    write_rows,
)
from common.paths import REPOSITORY
from tests.refusals import refused

CLAIM = Claim(
    id="L1",
    statement="A latent model beats a pixel model at equal time.",
    paper=PaperValue("FID 38 lower", "Fig. 6"),
    target=Target("FD at least 15 % lower", "fd_drop", ">=", 0.15, (Condition("speedup", ">", 4.0),)),
    tier="small",
)
GOOD = [{"fd_drop": 0.1, "speedup": 5.0}, {"fd_drop": 0.2, "speedup": 9.0}, {"fd_drop": 0.3, "speedup": 10.0}]


def test_record_has_the_keys_of_the_design() -> None:
    rec = record(CLAIM, GOOD, seconds=12, peak_memory_bytes=1000)
    assert list(rec) == [
        "id", "statement", "paper", "target", "measured", "mean", "std", "holds", "within_noise", "tier",
        "seconds", "peak_memory_bytes", "precision", "cpu", "hardware", "versions", "commit",
    ]  # fmt: skip
    assert rec["paper"] == {"value": "FID 38 lower", "source": "Fig. 6"}
    assert rec["measured"][1] == {"seed": 1, "fd_drop": 0.2, "speedup": 9.0}
    assert rec["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(rec)) == rec


def test_a_verdict_is_within_noise_where_the_spread_crosses_a_target_that_decides_it() -> None:
    def found(drops: list[float], speeds: list[float]) -> tuple[bool, bool, str]:
        rows = [{"fd_drop": drop, "speedup": speed} for drop, speed in zip(drops, speeds)]
        rec = record(CLAIM, rows, seconds=1, peak_memory_bytes=1)
        said = verdict(rec)
        stored = rec.pop("within_noise")
        assert verdict(rec) == said and within_noise(rec) is stored  # an older record says the same
        return said.holds, said.within_noise, said.text

    fast, slow, unsteady = [9.0, 9.1, 9.2], [3.0, 3.1, 3.2], [3.0, 3.5, 5.0]
    assert found([0.30, 0.31, 0.32], fast) == (True, False, "holds")
    assert found([0.10, 0.20, 0.30], fast) == (True, True, "holds (within noise)")  # 0.2 +- 0.1 about 0.15
    assert found([0.10, 0.12, 0.16], fast) == (False, True, "does not hold (within noise)")
    assert found([0.10, 0.12, 0.16], unsteady) == (False, True, "does not hold (within noise)")
    assert found([0.10, 0.12, 0.16], slow) == (False, False, "does not hold")  # the speed fails by far
    assert found([0.30, 0.31, 0.32], slow) == (False, False, "does not hold")
    assert found([0.15, 0.15, 0.15], fast) == (True, False, "holds")  # exact numbers have no noise
    assert found([0.30, 0.31, float("nan")], fast) == (False, False, "does not hold")


@pytest.mark.parametrize(
    ("holds", "text"),
    [
        ("y", "holds"),
        ("n", "does not hold"),
        ("yy", "from rung 1 on"),
        ("ny", "from rung 4 on"),
        ("nny", "from rung 16 on"),
        ("yny", "from rung 16 on"),
        ("nn", "not up to rung 4"),
        ("nnn", "not up to rung 16"),
        ("ynn", "up to rung 1, not from rung 4 on"),
        ("nyn", "up to rung 4, not from rung 16 on"),
    ],
)
def test_the_words_of_a_verdict_say_from_which_rung_on_a_claim_holds(tmp_path: Path, holds: str, text: str) -> None:
    path = tmp_path / "ldm.json"
    for rung, letter in zip((1, 4, 16), holds):
        drop = 0.3 if letter == "y" else 0.0
        rows = [{"fd_drop": drop, "speedup": 9.0}] * 3
        write_claims(path, [record(replace(CLAIM, rung=rung), rows, seconds=rung, peak_memory_bytes=1)])
    (rec,) = json.loads(path.read_text(encoding="utf-8"))["claims"]
    found = verdict(rec)
    assert found.text == text and found.holds is (holds[0] == "y") is rec["holds"]
    assert found.rungs == tuple((rung, letter == "y") for rung, letter in zip((1, 4, 16), holds))
    assert (
        rec["seconds"] == 1.0 and [entry["seconds"] for entry in rec.get("rungs", [])] == [4.0, 16.0][: len(holds) - 1]
    )


def test_rungs_stay_when_rung_1_is_measured_again_and_none_comes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "ldm.json"
    first, fourth = (record(replace(CLAIM, rung=n), GOOD, seconds=n, peak_memory_bytes=1) for n in (1, 4))
    refused("claim L1: rung 4 is measured, rung 1 is not on record yet", write_claims, path, [fourth])
    write_claims(path, [first, fourth])
    write_claims(path, [{**first, "seconds": 7.0}])
    write_claims(path, [{**fourth, "seconds": 8.0}])
    (rec,) = json.loads(path.read_text(encoding="utf-8"))["claims"]
    assert rec["seconds"] == 7.0 and [(entry["rung"], entry["seconds"]) for entry in rec["rungs"]] == [(4, 8.0)]
    assert not {"id", "target", "statement"} & rec["rungs"][0].keys()
    easier = replace(CLAIM, rung=4, target=replace(CLAIM.target, value=0.05))
    refused("another target", write_claims, path, [record(easier, GOOD, seconds=1, peak_memory_bytes=1)])


def test_mean_and_sample_deviation_are_those_of_the_headline_metric() -> None:
    rec = record(CLAIM, GOOD, seconds=1, peak_memory_bytes=1)
    assert rec["mean"] == pytest.approx(0.2)
    assert rec["std"] == pytest.approx(0.1)  # n - 1
    assert rec["holds"] is True


def test_claim_fails_when_only_a_further_condition_fails() -> None:
    slow = [{**row, "speedup": 3.0} for row in GOOD]
    assert record(CLAIM, slow, seconds=1, peak_memory_bytes=1)["holds"] is False


@pytest.mark.parametrize(("op", "holds"), [(">=", True), ("<=", True), (">", False), ("<", False)])
def test_comparison_at_the_threshold(op: ledger.Op, holds: bool) -> None:
    claim = replace(CLAIM, target=Target("", "x", op, 0.5))
    assert record(claim, [0.5, 0.5, 0.5], seconds=1, peak_memory_bytes=1)["holds"] is holds


def test_small_tier_refuses_fewer_than_three_different_seeds() -> None:
    refused("at least 3 different seeds, got 2", record, CLAIM, GOOD[:2], seconds=1, peak_memory_bytes=1)
    refused("got 2", record, CLAIM, GOOD, seconds=1, peak_memory_bytes=1, seeds=[0, 1, 1])
    assert record(replace(CLAIM, tier="smoke"), GOOD[:1], seconds=1, peak_memory_bytes=1)["std"] == 0.0


def test_a_diverged_seed_is_recorded_as_null_and_the_claim_does_not_hold(tmp_path: Path) -> None:
    rec = record(CLAIM, [*GOOD[:2], {"fd_drop": float("nan"), "speedup": 9.0}], seconds=1, peak_memory_bytes=1)
    assert rec["measured"][2]["fd_drop"] is None
    assert (rec["mean"], rec["std"], rec["holds"]) == (None, None, False)
    write_claims(tmp_path / "ldm.json", [rec])


def test_missing_metric_is_named() -> None:
    with pytest.raises(UserError, match="metric 'speedup' was not measured for seed 2"):
        record(CLAIM, [*GOOD[:2], {"fd_drop": 0.1}], seconds=1, peak_memory_bytes=1)


def test_unknown_tier_and_comparison_are_refused() -> None:
    refused("tier 'huge'", replace, CLAIM, tier="huge")  # type: ignore[arg-type]
    refused("comparison '=='", replace, CLAIM, target=Target("", "x", "==", 1.0))  # type: ignore[arg-type]


def test_claims_merge_by_id_and_tier_in_natural_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ldm.json"
    small = record(CLAIM, GOOD, seconds=1, peak_memory_bytes=1)
    write_claims(path, [record(replace(CLAIM, id="L10"), GOOD, seconds=1, peak_memory_bytes=1), small])
    write_claims(path, [record(replace(CLAIM, tier="smoke"), GOOD[:1], seconds=1, peak_memory_bytes=1)])
    write_claims(path, [{**small, "seconds": 99.0}])
    claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
    assert [(c["id"], c["tier"]) for c in claims] == [("L1", "smoke"), ("L1", "small"), ("L10", "small")]
    assert claims[1]["seconds"] == 99.0
    assert [p.name for p in path.parent.iterdir()] == ["ldm.json"]  # no temporary file stays


def test_a_changed_target_is_refused_before_and_after_the_run(tmp_path: Path) -> None:
    path = tmp_path / "ldm.json"
    write_claims(path, [record(CLAIM, GOOD, seconds=1, peak_memory_bytes=1)])
    before = path.read_bytes()
    easier = replace(CLAIM, target=replace(CLAIM.target, value=0.05))
    fewer = replace(CLAIM, target=replace(CLAIM.target, conditions=()))
    reworded = replace(CLAIM, target=replace(CLAIM.target, text="FD lower by 15 % or more"))
    for changed in (easier, fewer):
        refused(r"L1 .small. is on record with another target", check_targets, path, [changed])
        refused("another target", write_claims, path, [record(changed, GOOD, seconds=1, peak_memory_bytes=1)])
    assert path.read_bytes() == before
    check_targets(path, [CLAIM, reworded, replace(easier, id="L1b")])
    check_targets(tmp_path / "absent.json", [easier])


def test_a_broken_results_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ldm.json"
    for text in ("{", "[]", '{"claims": 3}'):
        path.write_text(text, encoding="utf-8")
        refused(r"ldm\.json", write_claims, path, [record(CLAIM, GOOD, seconds=1, peak_memory_bytes=1)])
        assert path.read_text(encoding="utf-8") == text


def test_bench_ratio_above_one_is_better_for_us_in_either_direction(tmp_path: Path) -> None:
    faster = bench_row("training", 13.0, 10.0, "images/s", target=1.3)
    lighter = bench_row("memory", 2.0, 4.0, "GiB", target=1.0, higher_is_better=False)
    assert list(faster) == ["name", "ours", "peer", "unit", "ratio", "target", "holds", "hardware", "commit"]
    assert (faster["ratio"], faster["holds"]) == (pytest.approx(1.3), True)
    assert (lighter["ratio"], lighter["holds"]) == (2.0, True)
    assert bench_row("training", 12.0, 10.0, "images/s", target=1.3)["holds"] is False
    assert bench_row("peak", 1.0, 2.0, "TFLOP/s")["holds"] is None
    refused("must be positive", bench_row, "training", 0.0, 10.0, "images/s")

    path = tmp_path / "bench_ldm.json"
    write_rows(path, [faster, lighter])
    write_rows(path, [{**faster, "ours": 14.0}, {**faster, "hardware": "another machine"}])
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["ours"]) for row in rows] == [("training", 14.0), ("memory", 2.0), ("training", 13.0)]


def test_commit_is_marked_dirty_by_code_but_not_by_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert ledger.commit() == "unknown"

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n", encoding="utf-8")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = ledger.commit()
    assert len(clean) == 12
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ldm.json").write_text("{}", encoding="utf-8")
    assert ledger.commit() == clean
    (tmp_path / "code.py").write_text("2\n", encoding="utf-8")
    assert ledger.commit() == f"{clean}-dirty"


def test_peak_memory_counts_bytes() -> None:
    assert 2**24 < peak_memory() < 2**44  # a process with torch loaded: more than 16 MiB


def test_hardware_names_the_machine_in_one_line() -> None:
    line = ledger.hardware()
    assert "core" in line and "\n" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_child_leaves_out_what_its_parent_held() -> None:
    held = torch.ones(1 << 30, dtype=torch.uint8)
    code = "from common.ledger import peak_resident; print(peak_resident())"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert peak_resident() > held.nbytes > int(run.stdout) > 10 << 20
