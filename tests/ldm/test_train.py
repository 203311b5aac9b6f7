"""Training conventions on a tiny run: exact resume, N processes as one, refused folders, failures that cost nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.training import load_checkpoint
from common.weights import read_weights, save_weights
from ldm.diffusion import LatentDiffusion
from ldm.train import main
from tests.drills import succeed
from tests.ldm.tiny_run import (
    arguments,
    first_stage_losses,
    first_stage_of,
    losses,
    same_model,
    train,
)
from tests.refusals import refused

# Adam turns a rounding difference in a tiny gradient into a visible step; 1e-5 holds at the small lr of the tiny run.
CLOSE = {"rel": 2e-5}


@pytest.fixture(scope="module")
def reference(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, never interrupted, one process, latents cached."""
    return train(tmp_path_factory.mktemp("reference") / "run")


def test_resume_in_the_middle_of_accumulated_steps_is_exact(reference: Path, tmp_path: Path) -> None:
    options = {"trainer__accumulate": 2, "first_stage__weights": first_stage_of(reference), "unet__dropout": 0.2}
    whole = train(tmp_path / "whole", **options)
    calls = {"n": 0}
    loss = LatentDiffusion.loss

    def interrupted(self: LatentDiffusion, *args: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 10:  # second half of step 4: the last checkpoint is that of step 3
            raise InterruptedError
        return loss(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentDiffusion, "loss", interrupted)
        with pytest.raises(InterruptedError):
            train(tmp_path / "parts", **options)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train(tmp_path / "parts", **options)
    assert losses(tmp_path / "parts") == losses(whole)
    assert same_model(tmp_path / "parts", whole)


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(reference: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", trainer__accumulate=2, first_stage__weights=first_stage_of(reference))
    assert losses(folder) == pytest.approx(losses(reference), **CLOSE)


def test_two_processes_give_the_losses_of_one(reference: Path, tmp_path: Path) -> None:
    ddp = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    done = succeed("-m", "ldm.train", *arguments(tmp_path / "two", **ddp))
    for column in ("total_loss", "g_loss", "d_weight", "disc_loss"):
        stages = [first_stage_losses(folder, column) for folder in (tmp_path / "two", reference)]
        assert stages[0] == pytest.approx(stages[1], **CLOSE) and len(stages[0]) == (5 if column == "disc_loss" else 8)
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), **CLOSE)
    said = [line for line in done.stderr.splitlines() if "captions are cut to 12 tokens" not in line]
    assert "Tip" not in done.stderr + done.stdout and not [line for line in said if "Warning" in line]


@pytest.mark.parametrize("how", [{"data__cache_latents": "false"}, {"data__max_memory_gb": 0, "data__workers": 1}])
def test_latents_made_on_the_fly_give_the_losses_of_cached_ones(
    how: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    folder = train(tmp_path / "run", first_stage__weights=first_stage_of(reference), **how)
    assert not (folder / "latents").exists() and (reference / "latents").exists()
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-6)


def test_run_leaves_logs_checkpoints_and_grids(reference: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", trainer__sample_every=4, first_stage__weights=first_stage_of(reference))
    samples = sorted(p.name for p in (folder / "diffusion" / "samples").iterdir())
    assert samples == ["step_000004.png", "step_000008.png"]
    for stage in (reference / "first_stage", reference / "diffusion"):
        assert list(stage.glob("tensorboard/version_0/events*")) and list(stage.glob("logs/version_0/metrics.csv"))
        assert [p.name for p in (stage / "checkpoints").iterdir()] == ["last.ckpt"]
    assert len(list((reference / "first_stage" / "samples").glob("*.png"))) == 4
    assert losses(folder) == losses(reference), "drawing samples must not change training"


def test_checkpoint_holds_the_average_of_the_step_it_was_written_at(reference: Path) -> None:
    checkpoint = load_checkpoint(reference / "diffusion" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == int(checkpoint["state_dict"]["ema.num_updates"]) == 8


def test_finished_run_is_not_trained_again(
    reference: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.fit", lambda *_: pytest.fail("trained again"))
    before = (reference / "model.safetensors").stat().st_mtime_ns
    train(reference, trainer__log_every=7)  # how it is logged is no other run
    assert (reference / "model.safetensors").stat().st_mtime_ns == before
    assert "trained already" in capfd.readouterr().err


def test_a_run_killed_while_it_exports_exports_when_started_again(reference: Path) -> None:
    files = sorted(p.relative_to(reference) for p in (reference / "pipeline").rglob("*"))
    shutil.rmtree(reference / "pipeline")
    train(reference)
    assert sorted(p.relative_to(reference) for p in (reference / "pipeline").rglob("*")) == files


def test_folder_of_another_run_is_refused_naming_what_differs(reference: Path) -> None:
    refused(r"another configuration \(optimiser.lr was 0.0001, is 0.5\)", train, reference, optimiser__lr=0.5)
    refused("not empty", train, reference, resume="never")


def test_unwritable_run_folder_is_one_sentence(cache: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = ["--run_dir", str(tmp_path / "file" / "run")]
    refused(r"cannot write .*file/run/config.yaml", main, [*arguments(tmp_path / "run"), *options])


def test_nan_loss_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = LatentDiffusion.loss, {"n": 0}

    def broken(self: LatentDiffusion, *args: Any) -> Any:
        calls["n"] += 1
        value, logs = loss(self, *args)
        return value * (float("nan") if calls["n"] == 6 else 1.0), logs

    monkeypatch.setattr(LatentDiffusion, "loss", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 6: stopped; the last good checkpoint is .*last"):
        train(tmp_path / "run", first_stage__weights=first_stage_of(reference))
    kept = load_checkpoint(tmp_path / "run" / "diffusion" / "checkpoints" / "last.ckpt")
    assert kept["global_step"] == 3
    assert all(v.isfinite().all() for v in kept["state_dict"].values() if v.is_floating_point())


def test_first_stage_that_diverges_stops_at_its_own_step(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.trainer.decayed", lambda *_: 1e33)  # no option asks for such a rate
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d+: stopped"):
        train(tmp_path / "run", first_stage__disc_weight=0)
    assert not first_stage_of(tmp_path / "run").exists()


def test_first_stage_weights_that_do_not_fit_are_refused(reference: Path, tmp_path: Path) -> None:
    good = first_stage_of(reference)
    with pytest.raises(UserError, match=r"holds a first stage of kind kl: give --first_stage.kind kl, not vq"):
        train(tmp_path / "run", first_stage__weights=good, first_stage__kind="vq", resume=good)
    state, notes = read_weights(good)
    plain, other = tmp_path / "plain.safetensors", tmp_path / "other.safetensors"
    save_weights(plain, state)  # says nothing of itself: built as the options say
    with pytest.raises(UserError, match=r"does not fit the first_stage options: .* has the shape \[.*\], expected"):
        train(tmp_path / "run", first_stage__weights=plain, first_stage__ch=16)
    save_weights(other, {name: tensor for name, tensor in state.items() if "quant_conv" not in name}, notes)
    with pytest.raises(UserError, match=r"does not fit what the file says of itself: .* is missing; .* and \d+ more"):
        train(tmp_path / "run", first_stage__weights=other)
    short = tmp_path / "short.safetensors"
    short.write_bytes(good.read_bytes()[:1000])
    refused("truncated or not a safetensors file", train, tmp_path / "other", first_stage__weights=short)
    refused("no such file", train, tmp_path / "another", first_stage__weights=tmp_path / "absent.safetensors")


def test_evaluation_of_a_finished_run_writes_metrics_and_pictures(reference: Path) -> None:
    metrics = main([*arguments(reference), "--stages", "[evaluate]"])
    assert metrics["summary"]["fid_lite0"] > 0 and metrics["judge"]
    assert {"metrics.json", "samples.png", "real.png", "reconstruction.png"} <= {p.name for p in reference.iterdir()}


def test_weights_bring_their_tokenizer_and_the_scale_of_their_latents(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"first_stage__weights": first_stage_of(reference), "trainer__max_steps": 1, "optimiser__lr": 0.0}
    own = {"data__tasks": "[count]", **options}  # other captions, other pictures
    plain, started = (
        train(tmp_path / name, **own, **more)
        for name, more in (("plain", {}), ("run", {"init_from": reference / "model.safetensors"}))
    )
    folders = (reference, started, plain)
    words, _, others = ((folder / "tokenizer" / "tokenizer.json").read_text() for folder in folders)
    assert (started / "tokenizer" / "tokenizer.json").read_text() == words != others
    scale, ours, another = (float(read_weights(f / "model.safetensors")[0]["scale_factor"]) for f in folders)
    assert ours == scale != another
    assert "another first stage" not in capsys.readouterr().err
    train(tmp_path / "other", init_from=reference / "model.safetensors", data__tasks="[count]", trainer__max_steps=1)
    assert "its latents are those of another first stage" in capsys.readouterr().err
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes((reference / "model.safetensors").read_bytes())
    refused("tokenizer is missing, and without it nobody knows", train, tmp_path / "lone", init_from=lonely)


def test_denoiser_goes_on_with_its_first_stage_and_no_other(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    (folder / "model.safetensors").unlink()
    state, notes = read_weights(first_stage_of(folder))
    save_weights(first_stage_of(folder), {name: tensor + 0.5 for name, tensor in state.items()}, notes)
    shutil.rmtree(folder / "latents")
    refused("diffusion was begun with another first stage than there is now", train, folder)
