"""The room's programs, from training to plan."""

import json

import torch

from common.weights import read_weights
from newpaper import plan, reproduce, train

TINY = ("--trainer.max_steps=6", "--trainer.progress=false", "--trainer.precision=32-true")


def test_micro_batches_change_nothing_and_targets_do(tmp_path) -> None:
    found = []
    for name, option in (("whole", "--seed=0"), ("parts", "--trainer.accumulate=2"), ("clean", "--targets=clean")):
        train.main([f"--run_dir={tmp_path / name}", option, *TINY])
        found.append(read_weights(tmp_path / name / "model.safetensors")[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(found[2][name], weight, rtol=1e-4, atol=1e-5) for name, weight in found[0].items())


def test_noisy_targets_do_as_well_as_clean_ones(tmp_path) -> None:
    (record,) = reproduce.main(["--tier=smoke", f"--folder={tmp_path}", f"--output={tmp_path / 'ledger.json'}"])
    assert record["holds"]


def test_plan_counts_the_network(capsys) -> None:
    plan.main(["--json"])
    assert json.loads(capsys.readouterr().out)[0]["parameters"] == 10 * 32 + 3 * (9 * 32 + 1) * 32 + 9 * 32 + 1
