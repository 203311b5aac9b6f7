"""Equation (1), its inverse, and the program that prints them."""

from __future__ import annotations

import json

import pytest

from common.errors import UserError
from se_moe import plan
from se_moe.planner import (
    FLOAT32,
    GptMoE,
    Machine,
    largest_model,
    paper_models,
    ring_bytes,
    storage_plan,
)


@pytest.mark.parametrize("tier", ["device", "host", "file"])
def test_the_largest_model_just_fits_and_its_tier_binds(tier: str) -> None:
    sizes = {"device": 1e12, "host": 1e12, "file": 1e12} | {tier: 2e9}
    machine = Machine(sizes["device"], sizes["host"], sizes["file"], devices=4)
    found = largest_model(1e8, 12, 0.3, machine)
    assert found.binding == tier
    assert storage_plan(1e8, found.sparse * 0.999, 12, 0.3, machine).fits
    assert not storage_plan(1e8, found.sparse * 1.001, 12, 0.3, machine).fits


def test_float32_doubles_the_device_term_only() -> None:
    machine = Machine(1e12, 1e12, 1e12)
    mixed = storage_plan(0, 1e9, 10, 0.5, machine)
    single = storage_plan(0, 1e9, 10, 0.5, machine, FLOAT32)
    assert single.device_bytes == 2 * mixed.device_bytes
    assert (single.host_bytes, single.file_bytes) == (mixed.host_bytes, mixed.file_bytes)


def test_the_papers_models_have_the_papers_sizes() -> None:
    for model, _, billions in paper_models():
        assert (model.sparse + model.dense) / 1e9 == pytest.approx(billions, rel=0.005), model.name


def test_counts_match_a_hand_count() -> None:
    model = GptMoE("tiny", layers=2, hidden=4, vocabulary=10, experts=3, positions=5, expert_hidden=6)
    assert model.sparse == 2 * 3 * (4 * 6 + 6 + 6 * 4 + 4)
    assert model.dense == 2 * (4 * 16 + 16 + 16 + 12) + 15 * 4 + 8


def test_ring_serving_needs_k_of_l_layers() -> None:
    assert ring_bytes(1e6, 12e6, 12, 3) == 2 * (1e6 + 3e6)
    assert ring_bytes(1e6, 12e6, 12, 99) == 2 * 13e6


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(UserError, match="dense parameters alone"):
        largest_model(1e9, 12, 0.1, Machine(1e9, 1e12, 1e12))
    with pytest.raises(UserError, match="alpha"):
        storage_plan(1, 1, 1, 0.0, Machine(1, 1, 1))
    with pytest.raises(UserError, match="at least one device"):
        Machine(1, 1, 1, devices=0)


def test_the_program_prints_the_paper_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--gpu", "a100", "--alpha", "0.1"])
    text = capsys.readouterr().out
    assert "104.1B" in text and "binds" in text
    plan.main(["--gpu", "h200", "--gpus", "1", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["largest"]["binding"] in {"device", "host", "file"}
    assert len(content["models"]) == len(paper_models())
    with pytest.raises(UserError, match="unknown GPU"):
        plan.main(["--gpu", "abacus"])
