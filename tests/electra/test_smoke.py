"""The command line end to end, and the ready-made configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.cli import parse_config
from common.costs import parameter_count
from common.errors import UserError
from common.paths import REPOSITORY
from electra.config import ElectraRun
from electra.masking import SpecialIds
from electra.objectives import ElectraPretrainer
from electra.train import CONFIGS, main


def read(name: str) -> ElectraRun:
    return parse_config(ElectraRun, None, "", ["--config", str(CONFIGS / f"{name}.yaml")])[0]


def test_smoke_config_pretrains_both_arms_and_prints_their_scores_beside_the_untrained_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = str(CONFIGS / "smoke.yaml")
    found = main(["--config", smoke, "--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "20"])
    header, line = capsys.readouterr().out.strip().splitlines()[-2:]
    assert header.split() == ["task", "metric", "majority", "from", "scratch", "electra", "mlm"]
    assert line.startswith("acceptability")
    assert [record["encoder"] for record in found["downstream"]] == ["from scratch", "electra", "mlm"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["downstream"] == found["downstream"]
    held_out = found["arms"]["electra"]["held_out"]
    assert held_out["mlm_loss"] < 7 and 0 <= held_out["rtd_auc"] <= 1
    assert (tmp_path / "run" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("name", "parameters", "steps", "batch", "length"),
    [
        ("paper_small", 14_196_219, 1_000_000, 128, 128),
        ("paper_base", 119_386_427, 766_000, 256, 512),
        ("paper_large", 354_655_291, 400_000, 2048, 512),
    ],
)
def test_paper_configs_are_the_papers(name: str, parameters: int, steps: int, batch: int, length: int) -> None:
    config = read(name)
    with torch.device("meta"):
        network = ElectraPretrainer(config.model.with_vocabulary(30522), SpecialIds())
    assert parameter_count(network) == parameters
    assert (config.trainer.max_steps, config.trainer.batch_size, config.data.length) == (steps, batch, length)
    assert config.data.vocabulary_size == 30522 and config.optimiser.warmup == 10_000
    assert config.objective.mask_probability == (0.25 if name == "paper_large" else 0.15)
    assert not config.model.relative_positions and config.model.dropout == 0.1


def test_default_config_compares_equal_flops_with_three_seeds() -> None:
    config = read("small")
    assert config.arms == ["electra", "mlm"] and len(config.downstream.seeds) == 3
    assert config.data.length <= config.model.max_position and config.data.corpus == "sotu"


def test_help_answers_without_torch() -> None:
    call = "try: electra.train.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    code = f"import sys, electra.train\n{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip().endswith("False"), done.stderr
    assert "--trainer.max_steps" in done.stdout


def test_unknown_task_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    arguments = ["--config", str(CONFIGS / "smoke.yaml"), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="task 'sarcasm'"):
        main([*arguments, "--downstream.tasks", "[sarcasm]"])
    assert not (tmp_path / "run" / "electra").exists()
