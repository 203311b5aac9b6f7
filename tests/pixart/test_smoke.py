"""The whole recipe at toy size: three stages, samples and metrics, in well under a minute on one thread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixart.config import SMALL
from pixart.train import main
from tests.pixart.tiny_run import losses


@pytest.mark.smoke
def test_three_stages_learn_and_leave_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    options = ["--trainer.accelerator", "cpu", "--trainer.progress", "false"]
    metrics = main(["--config", str(SMALL.parent / "smoke.yaml"), "--run_dir", str(run), *options])
    assert list(metrics) == ["stage1", "stage2", "stage3"]
    for stage in ("stage1", "stage2"):
        curve = [loss for _, loss in sorted(losses(run / stage, "train/mse").items())]
        assert sum(curve[-3:]) < 0.9 * sum(curve[:3]), f"{stage} does not learn: {curve}"
        assert (run / stage / "samples.png").is_file()
    assert {p.name for p in (run / "stage3").glob("*.png")} == {
        "real.png",
        "samples.png",
        "samples-48x96.png",
        "samples-96x48.png",
    }
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["summary"]["kid_lite0"] > 0 and 0 <= summary["shapes_score"]["mean"] <= 1
    assert metrics["stage1"]["own_captions"]["color"] >= 0
    assert [point["guidance"] for point in metrics["stage2"]["curve"]] == [1.0, 3.0]
    assert 0 < summary["held_out"]["mse"] < 2
    assert set(summary["buckets"]) == {"48x96", "96x48"} and summary["seconds"]["total"] > 0
