"""PixArt's speed benchmark compares like with like, and reports what it compared. No test looks at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import pixart as bench
from benchmarks.pixart import Arm
from tests.benchmarks.pretended import PACE, check_precisions, check_rows, pretend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the peer's pipeline."""
    path = tmp_path_factory.mktemp("bench")
    bench.prepare("tiny", path)
    return path


def test_both_sides_train_the_same_network_from_the_same_weights(folder: Path) -> None:
    ours, peer = (bench.make_step(Arm(side, "training", "tiny", "cpu"), folder) for side in ("ours", "peer"))
    for step in range(3):
        torch.testing.assert_close(ours(step), peer(step), rtol=2e-4, atol=0)


@pytest.mark.parametrize(("kind", "batch"), [("forward", 0), ("sampling", 2)])
def test_both_sides_compute_the_same(folder: Path, kind: str, batch: int) -> None:
    arms = [Arm(side, kind, "tiny", "cpu", batch=batch) for side in ("ours", "peer")]
    for arm in arms:
        bench.make_step(arm, folder)(0)
    assert torch.load(folder / arms[0].result, weights_only=True).std() > 1e-3
    bench.check_same(kind, "tiny", folder, *arms)


def test_results_that_differ_stop_the_benchmark(tmp_path: Path) -> None:
    arms = [Arm(side, "forward", "tiny", "cpu") for side in ("ours", "peer")]
    for arm, level in zip(arms, (1.0, 1.01)):
        torch.save(torch.full((1, 3), level), tmp_path / arm.result)
    with pytest.raises(RuntimeError, match="the two sides differ"):
        bench.check_same("forward", "tiny", tmp_path, *arms)


def test_bfloat16_training_follows_float32(folder: Path) -> None:
    tails = []
    for bf16 in (False, True):
        step = bench.make_step(Arm("ours", "training", "tiny", "cpu", bf16), folder)
        losses = [float(step(i)) for i in range(bench.LOSS_STEPS)]  # type: ignore[arg-type]
        tails.append(sum(losses[-bench.LOSS_TAIL :]))
    assert abs(tails[1] / tails[0] - 1) < 0.02


@pytest.mark.parametrize("size", bench.SIZES)
def test_sizes_are_what_the_rows_say(size: str) -> None:
    config, spec = bench.configuration(size), bench.SIZES[size]
    given = bench.make_batch(size, 0)
    lengths = given.mask_BL.sum(1)
    assert given.x_BCHW.shape == (spec.batch, 4, spec.side, spec.side)
    assert spec.shortest <= int(lengths.min()) <= int(lengths.max()) <= spec.longest <= config.caption_tokens
    assert f"{(spec.side // 2) ** 2} tokens" in bench.describe(size)
    if size.startswith("xl"):
        assert config.width == 1152 and config.heads == 16 and config.caption_channels == 4096


@pytest.mark.parametrize("kind", ["training", "forward", "sampling"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_point_the_right_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, device: str) -> None:
    """Ratios and bars: the default's 1.3 on CPUs, 1.5 on a GPU; the better peer's on CPUs; memory no higher."""
    seen = pretend(bench, monkeypatch)
    monkeypatch.setattr(bench, "check_same", lambda *_: None)
    rows = list(bench.rows_of(kind, "tiny", device, tmp_path, PACE, batch=2 if kind == "sampling" else 0))
    check_rows(rows)
    speed = [row for row in rows if row["unit"] == "images/s"]
    assert speed[0]["target"] == (1.3 if device == "cpu" else 1.5)
    better = {"bf16": 1.5, "fp32": 1.15} if kind == "training" else {"bf16": 1.2, "fp32": 1.2}
    found = {row["name"].split("both ")[1][:4]: row["target"] for row in speed if "the better peer" in row["name"]}
    assert found == (better if device == "cpu" else dict.fromkeys(better))
    assert not any(row["target"] for row in speed[1:] if "the better peer" not in row["name"])
    assert ("default against default: ours fp32, peer fp32" in speed[0]["name"]) == (device == "cpu")
    check_precisions(seen)
    if kind == "training":
        assert [row["unit"] for row in rows][-2:] == ["GFLOP/s", "GFLOP/s"]
