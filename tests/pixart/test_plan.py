"""What the paper's recipe costs, and that the count is that of the networks themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cli import parse_config
from common.costs import GPUS, Cluster
from common.errors import run_main
from pixart.config import PixArtConfig, StageConfig
from pixart.model import DiT, PixArt
from pixart.plan import (
    CLUSTERS,
    PRICE,
    STAGES,
    STRATEGIES,
    V100_DAYS,
    activation_bytes,
    bill,
    forward_flop,
    load_stage,
    main,
    plan,
    stage_names,
    stage_network,
    state_bytes,
)
from tests.golden_case import golden_files

TINY = PixArtConfig(input_size=8, width=24, depth=2, heads=2, caption_channels=16, caption_tokens=6)


@pytest.mark.parametrize(
    "change",
    [{}, {"multi_scale": True}, {"adaln": "block"}, {"classes": 4}, {"patch_size": 4}, {"learn_sigma": False}],
    ids=str,
)
def test_the_count_is_what_a_real_forward_pass_multiplies(change: dict) -> None:
    """A forward pass with numbers in it, on a grid that is not square, under torch's counter."""
    config = replace(TINY, **change)
    x_BCHW, t_B = torch.randn(1, 4, 8, 16), torch.tensor([3.0])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        if config.classes:
            DiT(config)(x_BCHW, t_B, torch.tensor([1]))
        else:
            more = {"size_B2": torch.ones(1, 2), "ratio_B1": torch.ones(1, 1)} if config.multi_scale else {}
            PixArt(config)(x_BCHW, t_B, torch.randn(1, 5, 16), **more)
    p = config.patch_size
    assert forward_flop(config, 8 // p, 16 // p, 5) == counter.get_total_flops()


def test_a_step_costs_three_forward_passes() -> None:
    """Input gradients of the first layers and the modulation of one row are what is missing to exactly three."""
    config = replace(TINY, width=96, depth=4, heads=4)
    net = PixArt(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(torch.randn(1, 4, 16, 16), torch.tensor([3.0]), torch.randn(1, 6, 16)).square().mean().backward()
    assert counter.get_total_flops() == pytest.approx(3 * forward_flop(config, 8, 8, 6), rel=0.02)


def test_recorded_full_scale_counts_are_met() -> None:
    recorded = [json.loads(path.read_text()) for path in golden_files("pixart", None) if path.stem.startswith("full_")]
    assert recorded, "full_scale_counts.json is not in the goldens"
    for size in ("256", "512", "1024"):
        side = int(size) // 16
        assert forward_flop(PixArtConfig(), side, side, 120) == recorded[0]["forward_flop"][size]


def test_the_stages_are_table_4s() -> None:
    assert stage_names() == list(V100_DAYS) and sum(V100_DAYS.values()) == 1656
    plans = {name: plan(name) for name in stage_names()}
    assert {name: (p.pixels, p.steps, p.batch_size) for name, p in plans.items()} == {
        "stage1": (256, 300_000, 128 * 8),
        "stage2": (256, 150_000, 178 * 64),
        "stage3a": (256, 90_000, 178 * 64),
        "stage3b": (512, 100_000, 40 * 64),
        "stage3c": (1024, 16_000, 12 * 32),
    }
    assert plans["stage2"].parameters == 610_856_096 and plans["stage3c"].parameters == 611_349_152
    assert plans["stage1"].parameters == 675_129_632 - 294_912  # DiT-XL/2 without its fixed positions
    assert sum(p.paper_a100_days or 0 for p in plans.values()) == pytest.approx(753, rel=0.001)
    # A V100 peaks at 125 TFLOP/s: days that meant more would be wrong by their units.
    assert all(1 < (p.paper_implied_tflops or 0) < 125 for p in plans.values())


def test_plan_follows_its_formulas() -> None:
    p = plan("stage3b", Cluster("h200", 64, 0.5))
    assert p.train_step_flop == 3 * p.forward_flop * 40 * 64
    assert not p.needs_checkpointing
    assert p.gpu_days == pytest.approx(p.train_step_flop * 100_000 / (0.5 * GPUS["h200"].peak_tflops * 1e12) / 86400)
    assert p.state_bytes == 20 * p.parameters
    assert p.memory_gb_per_gpu == pytest.approx((p.state_bytes + 40 * p.activation_bytes_per_image) / 1e9)
    assert state_bytes(100, 4, "deepspeed") == 800 + 300 and state_bytes(100, 4, "fsdp") == 400
    assert bill(753, "a100", PRICE)[0] == pytest.approx(28_400)


def test_what_does_not_fit_is_recomputed_then_split() -> None:
    many, few = (plan("stage2", Cluster("v100", gpus, 0.4)) for gpus in (512, 8))
    assert few.needs_checkpointing and few.micro_batches > 1 and "--trainer.accumulate" in few.command
    assert few.memory_gb_per_gpu < GPUS["v100"].memory_gb
    assert many.micro_batches == 1
    config = stage_network(load_stage("stage2"))
    assert activation_bytes(config, 256, 120, True) < 0.2 * activation_bytes(config, 256, 120, False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cluster_files_change_how_a_stage_runs_and_nothing_else(strategy: str) -> None:
    files = ["--config", str(STAGES / "stage2.yaml"), "--config", str(CLUSTERS / f"{strategy}.yaml")]
    (alone, _), (both, _) = (parse_config(StageConfig, None, "", given) for given in (files[:2], files))
    assert strategy in both.trainer.strategy and both.trainer.devices * both.trainer.num_nodes == 64
    assert both.trainer.max_steps == alone.trainer.max_steps and both.trainer.batch_size == alone.trainer.batch_size
    assert both.network == alone.network and both.data == alone.data and both.optimiser.lr == alone.optimiser.lr


def test_table_and_json_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["stage2", "--gpu", "h100", "--gpus", "16"])
    text = capsys.readouterr().out
    main(["stage2", "--gpu", "h100", "--gpus", "16", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["parameters"] == 610_856_096 and "610.9" in text and "16 x h100" in text
    assert f"{row['gpu_days']:.1f}" in text and row["command"] in text and "$28,400" in text


def test_unknown_names_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["stage9"], "no stage 'stage9'"),
        (["--gpu", "tpu"], "unknown GPU 'tpu'"),
        (["--strategy", "magic"], "unknown strategy 'magic'"),
    ):
        with pytest.raises(SystemExit):
            run_main(partial(main, arguments))
        assert message in capsys.readouterr().err
