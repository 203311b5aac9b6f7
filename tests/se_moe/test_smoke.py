"""The smoke reproduction: the stable claims at a budget of seconds, and the trainer's whole path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from se_moe import communication, experiments, reproduce, train
from se_moe.checkpoint import load_model
from se_moe.data import load_tokenizer
from tests.claims import smoke_records
from tests.se_moe import tiny_run
from tests.se_moe.ranks import run_ranks
from tests.se_moe.tiny_run import write_config


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return smoke_records(reproduce, tmp_path_factory.mktemp("se_moe-smoke"))


@pytest.mark.smoke
def test_fused_collectives_give_the_bits_of_one_a_tensor(measured: dict[str, Any]) -> None:
    values = measured["M1"]["measured"][0]
    assert values["equal"] == 1
    assert {"speedup", "speedup_gather", "speedup_reduce"} <= set(values)


def _collectives_of_an_arm(rank: int) -> dict[str, float]:
    """M1 with collectives counted where it takes the time."""
    calls = 0

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return collective(*arguments, **options)

        return counted

    def count(arms: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
        nonlocal calls
        found = {}
        for name, arm in arms.items():
            calls = 0
            arm()
            found[name] = (float(calls), 0.0)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "alternate", count)
        patch.setattr(communication, "all_gather_flat", counting(communication.all_gather_flat))
        patch.setattr(dist, "all_reduce", counting(dist.all_reduce))
        found = experiments.fused_against_per_tensor(1, seed=0)
    return {name: found[name] for name in ("equal", "speedup_gather", "speedup_reduce")}


def test_one_collective_does_the_work_of_120() -> None:
    for found in run_ranks(2, _collectives_of_an_arm):
        assert found == {"equal": 1, "speedup_gather": 120, "speedup_reduce": 120}


@pytest.mark.smoke
def test_decaying_hits_follow_a_shift_and_write_back_writes_less(measured: dict[str, Any]) -> None:
    values = measured["M3"]["measured"][0]
    assert values["gain_under_shift"] >= 0.05
    assert values["writes_per_request"] < 1


@pytest.mark.smoke
def test_equation_1_predicts_the_bytes_of_every_tier(measured: dict[str, Any]) -> None:
    values = measured["M4"]["measured"][0]
    assert values["largest_error"] <= 0.05
    assert values["losses_equal"] == 1
    assert values["device_share"] <= 0.5


@pytest.mark.smoke
def test_layouts_of_2_4_and_8_ranks_learn_the_same_parameters(measured: dict[str, Any]) -> None:
    values = measured["M5"]["measured"][0]
    assert values["parameter_difference"] <= 1e-5
    assert values["utilisation_one_each"] == 0.5
    assert values["utilisation_balanced"] == values["utilisation_merged"] == 1.0


@pytest.mark.smoke
def test_a_partitioned_table_takes_half_and_loses_nothing(measured: dict[str, Any]) -> None:
    values = measured["M7"]["measured"][0]
    assert values["memory_share"] <= 0.55
    assert values["loss_difference"] <= 1e-5


@pytest.mark.smoke
def test_a_ring_of_4_sections_serves_12_layers_with_equal_outputs(measured: dict[str, Any]) -> None:
    values = measured["M8"]["measured"][0]
    assert values["equal"] == 1
    assert values["device_share"] == pytest.approx(1 / 3)


@pytest.mark.smoke
def test_train_starts_two_ranks_fills_the_table_and_leaves_a_model_to_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    run = replace(tiny_run.config(tmp_path, {"partition": True}), arms=["ours", "naive"])
    printed = train.main(["--config", str(write_config(tmp_path / "run.yaml", run))])
    folder = Path(run.run_dir)
    assert printed == (folder / "table.md").read_text().strip() == capsys.readouterr().out.strip()
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:]] == [
        "ours, experts in tiers",
        "naive, every switch off",
    ]
    ours, naive = (json.loads((folder / arm / "metrics.json").read_text()) for arm in ("ours", "naive"))
    assert ours["losses"] == pytest.approx(naive["losses"], abs=1e-5)
    assert 0 < ours["device_peak_bytes"] <= ours["device_budget_bytes"]
    tokenizer = load_tokenizer(folder / "model")
    ids = torch.tensor([tokenizer.encode("the state").ids])
    assert load_model(folder / "model").generate(ids, 2, temperature=0).shape[1] == ids.shape[1] + 2
    for option, sentence in (("--seed", "another configuration"), ("--model.aux_weight", "another configuration")):
        with pytest.raises(UserError, match=sentence):
            train.main(["--config", str(tmp_path / "run.yaml"), option, "1"])
    with pytest.raises(UserError, match="is not empty"):
        train.main(["--config", str(tmp_path / "run.yaml"), "--resume", "never"])
