"""ELECTRA's speed benchmark compares like with like, and reports what it compared. No test looks at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import electra as bench
from benchmarks.arms import in_both_precisions
from benchmarks.electra import Arm
from tests.benchmarks.pretended import PACE, check_rows, timings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the peer's networks."""
    path = tmp_path_factory.mktemp("bench")
    bench.prepare("tiny", path)
    return path


@pytest.mark.parametrize("rows", ["full", "mixed"])
def test_both_sides_have_the_same_losses_on_the_same_step(folder: Path, rows: str) -> None:
    ours, peer = bench.losses_of_both("tiny", rows, folder, step=3)
    assert ours == pytest.approx(peer, rel=bench.LOSS_TOLERANCE)
    assert ours["disc"] > 0.1 and ours["mlm"] > 1


def test_masked_positions_are_distinct_ordinary_tokens() -> None:
    batches = bench.our_batches("tiny", "mixed", 4)
    for step in range(20):
        positions = batches[step].draws.positions_M
        assert len(positions.unique()) == len(positions)
        assert not torch.isin(batches[step].batch.ids_N[positions], torch.tensor([101, 102])).any()


def test_losses_that_differ_stop_the_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "losses_of_both", lambda *_: ({"mlm": 5.001}, {"mlm": 5.0}))
    with pytest.raises(RuntimeError, match=r"mlm is 5\.001 with us"):
        bench.check_same("tiny", "full", folder)


def test_peer_shares_embeddings_and_trains_as_many_parameters(folder: Path) -> None:
    peer, ours = bench.Assembled(folder / "network"), bench.build("tiny")
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())


def test_peers_own_samples_replace_masked_tokens_only(folder: Path) -> None:
    given = bench.PeerBatches("tiny", "mixed", 4)[0]
    seen: list[torch.Tensor] = []
    peer = bench.Assembled(folder / "network")
    peer.discriminator.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    assert peer(**given)["loss"].requires_grad
    chosen = given["labels"] != -100
    assert torch.equal(seen[0][~chosen], given["original_ids"][~chosen])
    assert not torch.equal(seen[0][chosen], given["original_ids"][chosen])


@pytest.mark.parametrize("size", ["tiny", "small", "paper_small"])
def test_rows_are_what_their_names_say(size: str) -> None:
    longest = bench.SIZES[size].length
    full, mixed = bench.Rows(size, "full"), bench.Rows(size, "mixed")
    assert (full.lengths == longest).mean() > 0.9 and (mixed.lengths == longest).mean() < 0.2
    ids, first = mixed[7]
    assert len(ids) == mixed.lengths[7] and ids[0] == 101 and ids[first - 1] == ids[-1] == 102
    assert not np.isin(np.delete(ids, [0, first - 1, len(ids) - 1]), [101, 102, 103]).any()


def test_flop_of_a_step_are_three_forward_passes_over_real_tokens() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    arm = Arm("ours", "tiny", "full", "cpu")
    batch = bench.our_batches("tiny", "full", arm.rows_of_a_step)[0]
    network = bench.build("tiny")
    masked = network.mask(batch.batch, draws=batch.draws)
    # Fused attention on CPUs has no entry in the counter; as matrix products it has.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network.discriminate(batch.batch, batch.batch.ids_N)
        network.generator_predictions(network.generator_hidden(batch.batch, masked.ids_N)[masked.positions_M])
    config, tokens = network.config, len(batch.batch.ids_N)
    vocabulary = 2 * len(masked.positions_M) * config.embedding_size * config.vocab_size
    logit = 2 * tokens * config.hidden_size  # the last layer of the discriminator, which the formula leaves out
    counted = 3 * (counter.get_total_flops() + vocabulary - logit)
    assert bench.step_flop(arm, steps=1) == pytest.approx(counted, rel=0.02)


def test_rows_of_the_comparison_have_ratios_and_targets() -> None:
    arms = in_both_precisions(Arm("ours", "tiny", "full", "cpu"), compiled=(), peak=True)
    rows = list(bench.comparison(arms["ours bf16"], timings(arms), PACE))
    check_rows(rows)
    default = next(row for row in rows if "default against default" in row["name"])
    assert default["ratio"] == pytest.approx(2.0) and default["target"] == 1.5 and default["holds"]
    assert {row["unit"] for row in rows} == {"tokens/s", "MiB", "GFLOP/s"}
