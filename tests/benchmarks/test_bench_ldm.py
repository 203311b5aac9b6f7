"""The speed benchmark compares like with like, and reports what it compared. No test looks at a time."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ldm as bench
from benchmarks.arms import Process, Turns
from benchmarks.ldm import Arm
from common.cpu import tune_allocator
from tests.benchmarks.pretended import PACE, check_precisions, check_rows, pretend


@pytest.fixture(scope="module")
def config():
    return bench.configuration("tiny")


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the peer's pipeline."""
    path = tmp_path_factory.mktemp("bench")
    info = bench.prepare(config, path)
    assert info["flops"] > 1e6 and info["parameters"] > 1e4
    return path


def test_both_sides_train_the_same_network_from_the_same_weights(config, folder):
    """The U-Net-only arms make the same three optimiser steps, so their difference is speed alone."""
    ours = bench.our_core(config, "cpu", bf16=False)
    peer = bench.peer_core(config, "cpu", False, folder / "pipeline")
    for step in range(3):
        torch.testing.assert_close(ours(step), peer(step), rtol=2e-4, atol=0)


def test_both_sides_draw_the_same_images_from_the_same_captions(config, folder):
    ours = bench.our_sampling(config, Arm("our sampling", "tiny", "cpu", batch=3), folder, steps=4)(0)
    peer = bench.peer_sampling(config, Arm("peer sampling", "tiny", "cpu", batch=3), folder, steps=4)(0)
    assert ours.shape == (3, 3, config.data.size, config.data.size) and ours.std() > 0.05
    assert (ours - peer).abs().max() < bench.IMAGE_TOLERANCE


def test_images_that_differ_stop_the_benchmark(monkeypatch, tmp_path):
    for side, level in (("our", 0.2), ("peer", 0.3)):
        arm = Arm(f"{side} sampling", "tiny", "cpu", batch=1)
        torch.save(torch.full((1, 3, 4, 4), level), tmp_path / arm.images)
    pretend(bench, monkeypatch)
    with pytest.raises(RuntimeError, match="images differ"):
        list(bench.sampling_rows("tiny", "cpu", tmp_path, PACE, 4))


def test_the_diffusers_loop_trains_only_the_unet(config, folder):
    losses = [float(loss) for loss in map(bench.peer_whole(config, "cpu", False, folder / "pipeline"), range(2))]
    assert all(0 < loss < 100 for loss in losses)


def test_bfloat16_training_follows_float32(config):
    """The quality row at a size where it takes no time: the same 30 steps, losses within 2 %."""
    tails = []
    for bf16 in (False, True):
        step = bench.our_core(config, "cpu", bf16)
        losses = [float(step(i)) for i in range(bench.LOSS_STEPS)]
        assert losses[-1] < losses[0]
        tails.append(sum(losses[-bench.LOSS_TAIL :]))
    assert abs(tails[1] / tails[0] - 1) < 0.02


def test_rows_say_what_was_compared(monkeypatch, tmp_path):
    """Every arm of the plan appears, ratios point the right way and the bars are those of the issue."""
    seen = pretend(bench, monkeypatch)
    rows = list(bench.training_rows("tiny", "cpu", tmp_path, PACE, {"flops": 1e9, "parameters": 1e6}))
    check_rows(rows)
    # The compiled peer, both compiled, then the faster of each, in bf16 and in float32.
    at_its_best = [None, None, 1.5, None, None, 1.15]
    assert [row["target"] for row in rows if row["unit"] == "images/s"] == [1.3, 1.3, None, None, *at_its_best]
    assert all(row["ratio"] == 1.0 and row["holds"] for row in rows if row["unit"] == "MSE")
    assert [row["unit"] for row in rows][-2:] == ["GFLOP/s", "GFLOP/s"]
    assert (seen["ours"].bf16, seen["peer"].bf16) == (True, False), "the peer's default is float32"
    check_precisions(seen, "ours core", "peer core")


def test_a_turn_is_exactly_the_steps_that_were_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n3\n"))
    made: list[int] = []

    def step(index: int) -> torch.Tensor:
        made.append(index)
        return torch.tensor(float(index))

    Turns("cpu").serve(step)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert made == [0, 1, 2, 3, 4]
    assert [a["losses"] for a in answers] == [[0, 1], [2, 3, 4]]
    assert all(a["wall"] >= 0 and a["memory"] > 0 for a in answers)


def test_an_arm_that_fails_is_reported_with_its_last_words(tmp_path):
    process = Process("benchmarks.ldm", Arm("no such kind", "tiny", "cpu"), tmp_path, 1)
    with pytest.raises(RuntimeError, match="no such kind"):
        process.turn(1)
    process.end()


def test_the_allocator_is_left_alone_where_the_user_or_the_system_decides(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not tune_allocator()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not tune_allocator()
