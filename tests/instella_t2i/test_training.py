"""The tokenizer's trainer: exact resume across stages and over the discriminator's start, processes, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from common.images import open_rgb
from common.weights import read_weights
from instella_t2i.tokenizer import WEIGHTS, load_tokenizer
from instella_t2i.trainer import TokenizerTraining
from tests.drills import kill, same_weights, succeed
from tests.instella_t2i.tiny_run import arguments, losses, train
from tests.refusals import refused


@pytest.fixture(scope="module")
def reference(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run")


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_killed_before_or_after_the_discriminators_start_goes_on_with_the_same_losses(
    step: int, reference: Path, tmp_path: Path
) -> None:
    kill("instella_t2i.train", step, arguments(tmp_path / "run", stages="tokenizer"))
    assert not (tmp_path / "run" / "tokenizer" / WEIGHTS).exists()
    train(tmp_path / "run", stages="tokenizer")
    assert losses(tmp_path / "run") == losses(reference) and len(losses(reference)) == 6
    assert same_weights(tmp_path / "run" / "tokenizer" / WEIGHTS, reference / "tokenizer" / WEIGHTS)


def test_the_second_stage_goes_on_too_and_leaves_the_encoder_as_it_is(reference: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", stages="tokenizer")
    kill("instella_t2i.train", 3, arguments(tmp_path / "run"))
    train(tmp_path / "run")
    assert (
        losses(tmp_path / "run", "decoder") == losses(reference, "decoder") and len(losses(reference, "decoder")) == 4
    )
    assert same_weights(tmp_path / "run" / "decoder" / WEIGHTS, reference / "decoder" / WEIGHTS)
    first, second = (read_weights(reference / stage / WEIGHTS)[0] for stage in ("tokenizer", "decoder"))
    for name in first:
        frozen = name.startswith(("encoder.", "quantizer."))
        assert torch.equal(first[name], second[name]) == frozen, name


def test_the_discriminator_starts_where_it_is_told_and_rises_and_nothing_becomes_nan(reference: Path) -> None:
    weights = losses(reference, name="train/gan_weight")
    assert [round(value, 6) for value in weights.values()] == [0, 0, 0, 0.05, 0.1, 0.1]
    assert list(losses(reference, name="train/disc_loss")) == [3, 4, 5]  # steps from 0
    for name in ("train/loss", "train/disc_loss", "train/gan_loss", "codes/live_bits", "codes/joint_entropy"):
        found = losses(reference, name=name)
        assert found and all(math.isfinite(value) for value in found.values()), name
    temperatures = [*losses(reference, name="train/tau").values()]
    assert (
        temperatures[0] == 1 and temperatures[-1] == pytest.approx(0.1) and temperatures == sorted(temperatures)[::-1]
    )


def test_a_run_is_measured_after_each_stage_on_the_same_pictures(reference: Path) -> None:
    metrics = json.loads((reference / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["tokenizer", "decoder"] and metrics["images"] == 12
    for found in metrics["arms"].values():
        assert found["bits"] == 4 * 8 and 0 < found["psnr"] < 40 and 0 <= found["live_bits"] <= 1
    assert metrics["arms"]["tokenizer"]["joint_entropy"] == metrics["arms"]["decoder"]["joint_entropy"]
    assert (reference / "table.md").read_text().count("\n") == 4
    assert open_rgb(reference / "reconstructions.png").shape[0] > 300


def test_finished_stages_are_not_trained_again(reference: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(TokenizerTraining, "training_step", lambda *_: pytest.fail("trained again"))
    before = (reference / "decoder" / WEIGHTS).stat().st_mtime_ns
    train(reference)
    assert before == (reference / "decoder" / WEIGHTS).stat().st_mtime_ns


def test_micro_batches_and_two_processes_give_the_losses_of_one(reference: Path, tmp_path: Path) -> None:
    parts = train(tmp_path / "parts", trainer__accumulate=2, stages="tokenizer")
    assert losses(parts) == pytest.approx(losses(reference), rel=1e-4)
    options = {"trainer__devices": 2, "trainer__strategy": "ddp", "stages": "tokenizer"}
    succeed("-m", "instella_t2i.train", *arguments(tmp_path / "two", **options))
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"network__quantizer": "vq", "tokenizer__code": 1},
        {"network__quantizer": "lfq"},
        {"network__quantizer": "bsq", "network__layout": "grid", "tokenizer__aimed": "false"},
        {
            "tokenizer__optimiser": "adamw",
            "tokenizer__noise": "false",
            "tokenizer__gan": 0,
            "tokenizer__perceptual": 0,
            "data__flip": "false",
        },
    ],
)
def test_baselines_train_by_the_same_steps(options: dict[str, Any], cache: None, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", stages="tokenizer", tokenizer__steps=2, **options)
    assert len(losses(folder)) == 2
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.config.quantizer == options.get("network__quantizer", "binary")


def test_dying_codes_are_said_once(cache: None, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("instella_t2i.trainer.code_usage", lambda _: {"live_bits": 0.25, "joint_share": 0.9})
    train(tmp_path / "run", stages="tokenizer", tokenizer__batch_size=16, tokenizer__gan=0)
    assert capsys.readouterr().err.count("codes are dying: 25% of the bits vary") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data__size": 20}, "--data.size 20: expected a multiple of 8"),
        ({"data__size": 8}, "--data.size 8: expected a multiple of 8 .*, at least 16"),
        ({"decoder__sizes": "[16,20]"}, "--decoder.sizes 20: expected a multiple of 8"),
        ({"decoder__sizes": "[]"}, "--decoder.sizes ..: expected at least one"),
        ({"network__axes": "[4,4,4]"}, "--network.axes .4, 4, 4.: expected three even numbers"),
        ({"data__name": "folder"}, "--data.name folder needs --data.path"),
        ({"data__images": 0}, "--data.images 0: expected a number of at least 1"),
        ({"stages": "[]"}, "--stages ..: expected at least one stage"),
        ({"stages": "decoder"}, "has no finished tokenizer: add tokenizer to --stages"),
        ({"stages": "vae"}, "stages"),
        ({"tokenizer__tau_share": 0}, "--tokenizer.tau_share 0.0: expected a number above 0"),
        ({"tokenizer__batch_size": 10**6}, "--tokenizer.batch_size 1000000: expected at most"),
        ({"trainer__precision": "16-mixed"}, "--trainer.precision 16-mixed: the tokenizer trains in bf16-mixed"),
        ({"tokenizer_from": "nowhere"}, "--tokenizer_from is a finished tokenizer: leave"),
        (
            {"tokenizer__aimed": "true", "network__layout": "grid"},
            "--network.layout grid has no latent tokens",
        ),
        ({"tokenizer__perceptual_trunk": "none.pth"}, "none.pth"),
        ({"evaluation__features": "vgg"}, "unknown feature extractor"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, cache: None, tmp_path: Path
) -> None:
    refused(sentence, train, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(cache: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("instella_t2i.trainer.pixel_loss", lambda x, y, beta: y.sum() * float("nan"))
    refused("the loss became nan at step 1", train, tmp_path / "nan", stages="tokenizer")
    assert not (tmp_path / "nan" / "tokenizer" / WEIGHTS).exists()
