"""The DeepSpeed arm: the same losses as ours. Needs the optional package; about a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from common.errors import UserError
from common.paths import REPOSITORY
from se_moe import deepspeed_arm
from se_moe.run import table
from tests.se_moe import tiny_run
from tests.se_moe.tiny_run import write_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.skipif(not deepspeed_arm.available(), reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_and_ours_have_the_same_loss_curve(tmp_path: Path, stage: Literal[0, 2]) -> None:
    run = replace(tiny_run.config(tmp_path), steps=12, arms=["ours", "deepspeed"])
    run = replace(run, parallel=replace(run.parallel, zero_stage=stage))
    command = [sys.executable, str(REPOSITORY / "se_moe" / "train.py")]
    command += ["--config", str(write_config(tmp_path / "run.yaml", run))]
    subprocess.run(command, check=True)
    curves = [json.loads((Path(run.run_dir) / arm / "metrics.json").read_text())["losses"] for arm in run.arms]
    assert len(curves[0]) == 12
    assert max(abs(a - b) for a, b in zip(*curves)) <= 1e-3


def test_the_table_says_how_to_get_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_arm, "available", lambda: False)
    lines = table(replace(tiny_run.config(tmp_path), arms=["deepspeed"])).splitlines()
    assert lines[2].startswith("| DeepSpeed, ZeRO-2 | DeepSpeed is not installed; ")
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        deepspeed_arm._import_deepspeed(deepspeed_arm.torch.device("cpu"))


def test_engine_options_compile_nothing_and_follow_the_run(tmp_path: Path) -> None:
    run = tiny_run.config(tmp_path)
    options = deepspeed_arm.engine_config(run, 2)
    assert options["optimizer"]["params"]["torch_adam"] is True
    assert options["train_micro_batch_size_per_gpu"] * 2 == options["train_batch_size"] == run.batch
    assert options["zero_optimization"]["reduce_bucket_size"] * 4 == run.parallel.bucket_mb * 2**20
