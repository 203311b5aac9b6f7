"""The trainer on a tiny recipe: stages in a chain, exact resume, N processes as one, failures that cost nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.ema import Ema
from common.errors import UserError
from common.training import load_checkpoint
from common.weights import read_weights, save_weights
from pixart.config import SamplingConfig, read_recipe
from pixart.convert import load_dit, load_transformer, reparameterise
from pixart.diffusion import Diffusion
from pixart.model import PixArt
from pixart.trainer import rate_factor
from tests.drills import same_weights, succeed
from tests.pixart.tiny_run import arguments, losses, tiny_vae, train
from tests.refusals import refused

# Adam turns a rounding difference in a tiny gradient into a visible step.
CLOSE: dict[str, Any] = {"rel": 2e-5}


@pytest.fixture(scope="module")
def reference(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages, never interrupted, one process, features cached."""
    return train(tmp_path_factory.mktemp("reference") / "run")


WEIGHTS = Path("model", "model.safetensors")  # below a stage


def weights_of(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / WEIGHTS)


def test_each_stage_starts_from_the_one_before(reference: Path, tmp_path: Path) -> None:
    dit = load_dit(reference / "stage1" / "model")
    stage2 = load_transformer(reference / "stage2" / "model").config
    torch.manual_seed(0)
    expected = PixArt(stage2)
    reparameterise(dit, expected)
    folder = tmp_path / "run"
    start = reference / "stage1" / "model"
    train(folder, "stage2", init_from=start, trainer__max_steps=1, optimiser__lr=0.0, optimiser__weight_decay=0.0)
    started = weights_of(folder / "stage2")
    assert all(torch.equal(value, started[key]) for key, value in expected.state_dict().items())
    stage3 = load_transformer(reference / "stage3" / "model").config
    assert stage3.multi_scale and stage3.input_size == 2 * stage2.input_size and stage3.interpolation_scale == 2


def test_null_caption_is_saved_and_never_changed_by_training(reference: Path) -> None:
    key = "y_embedder.y_embedding"
    shape = load_transformer(reference / "stage2" / "model").config
    torch.manual_seed(0)
    drawn = PixArt(shape).state_dict()[key]
    for stage in ("stage2", "stage3"):
        assert torch.equal(weights_of(reference / stage)[key], drawn)
    changed = weights_of(reference / "stage2")["y_embedder.y_proj.fc1.weight"]
    assert not torch.equal(changed, weights_of(reference / "stage3")["y_embedder.y_proj.fc1.weight"])


def test_muon_trains_another_network_and_leaves_the_null_caption_alone(reference: Path, tmp_path: Path) -> None:
    options = {"init_from": reference / "stage1" / "model", "optimiser__name": "muon", "evaluate": "false"}
    first, second = (train(tmp_path / name, "stage2", **options) / "stage2" for name in ("first", "second"))
    found, other = losses(first), losses(reference / "stage2")
    assert found == losses(second) and found[min(found)] == other[min(other)] and found != other
    key = "y_embedder.y_embedding"
    assert torch.equal(weights_of(first)[key], weights_of(reference / "stage2")[key])


def test_run_leaves_logs_checkpoints_weights_and_pictures(reference: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        folder = reference / stage
        assert list(folder.glob("tensorboard/version_0/events*")) and list(folder.glob("logs/version_0/metrics.csv"))
        assert {"model.safetensors", "config.json", "pixart.json"} <= {p.name for p in (folder / "model").iterdir()}
        assert (folder / "samples.png").is_file() and (folder / "config.yaml").is_file()
    for column in ("train/mse", "train/vb", "train/lr"):
        assert len(losses(reference / "stage2", column)) == 6
    assert set(json.loads((reference / "metrics.json").read_text())["stages"]) == {"stage1", "stage2", "stage3"}


def test_finished_stages_are_not_trained_again(
    reference: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.training.fit", lambda *_: pytest.fail("trained again"))
    left = reference / ".metrics.json.killed.part"  # by a process that was killed while it wrote the summary
    left.mkdir()
    train(reference, trainer__log_every=7)  # how it is logged is no other run
    assert capfd.readouterr().err.count("trained already") == 3
    assert not left.exists()


def test_latents_and_captions_made_in_every_step_give_the_losses_of_cached_ones(
    reference: Path, tmp_path: Path
) -> None:
    folder = train(tmp_path / "run", "stage3", init_from=reference / "stage2", data__cache="false")
    assert losses(folder / "stage3") == pytest.approx(losses(reference / "stage3"), rel=1e-5)


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(reference: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", "stage2", init_from=reference / "stage1", trainer__accumulate=2)
    # Batches are cut from each epoch, so the two orders agree within the first epoch (48 pictures, 6 steps of 8).
    assert losses(folder / "stage2")[0] == pytest.approx(losses(reference / "stage2")[0], **CLOSE)
    assert len(losses(folder / "stage2")) == 6


def test_two_processes_give_the_losses_of_one(reference: Path, tmp_path: Path) -> None:
    two: dict[str, Any] = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    succeed("-m", "pixart.train", *arguments(tmp_path / "run", **two))
    for stage in ("stage1", "stage2", "stage3"):
        assert losses(tmp_path / "run" / stage) == pytest.approx(losses(reference / stage), **CLOSE)


def test_drawing_samples_and_checkpointing_blocks_do_not_change_training(reference: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trainer__sample_every": 3, "trainer__gradient_checkpointing": "true"}
    folder = train(tmp_path / "run", "stage2", init_from=reference / "stage1", **options)
    assert sorted(p.name for p in (folder / "stage2" / "samples").iterdir()) == ["step_000003.png", "step_000006.png"]
    assert losses(folder / "stage2") == pytest.approx(losses(reference / "stage2"), **CLOSE)


def test_nan_loss_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Diffusion.training_losses, {"n": 0}

    def broken(self: Diffusion, *args: Any) -> dict[str, torch.Tensor]:
        calls["n"] += 1
        found = original(self, *args)
        return {**found, "loss": found["loss"] * (float("nan") if calls["n"] == 4 else 1.0)}

    monkeypatch.setattr(Diffusion, "training_losses", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 4: stopped; the last good checkpoint is .*last"):
        train(tmp_path / "run", "stage2", init_from=reference / "stage1")
    kept = load_checkpoint(tmp_path / "run" / "stage2" / "checkpoints" / "last.ckpt")
    assert kept["global_step"] == 2
    assert all(v.isfinite().all() for v in kept["state_dict"].values() if v.is_floating_point())
    assert not (tmp_path / "run" / "stage2" / "model").exists()


def test_average_begins_as_the_network_and_follows_it_at_its_rate(reference: Path) -> None:
    network = load_transformer(reference / "stage2" / "model").requires_grad_(True)
    average = Ema(network, 0.75, warmup=False)
    before = {k: v.detach().clone() for k, v in network.named_parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    average.update(network)
    average.copy_to(network)
    torch.testing.assert_close(
        {k: v + 0.25 for k, v in before.items()}, {k: v.detach() for k, v in network.named_parameters()}
    )


@pytest.mark.parametrize(("rule", "expected"), [("none", 2e-5), ("sqrt", 2e-5 * (8 / 256) ** 0.5)])
def test_both_conventions_of_the_learning_rate(reference: Path, tmp_path: Path, rule: str, expected: float) -> None:
    options = {"optimiser__lr": 2e-5, "optimiser__auto_lr": rule, "optimiser__warmup": 0, "trainer__max_steps": 1}
    folder = train(tmp_path / "run", "stage2", init_from=reference / "stage1", **options)
    assert losses(folder / "stage2", "train/lr")[0] == pytest.approx(expected)


def test_stage_whose_start_is_not_finished_is_refused(cache: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="starts from stage stage1, which is not finished"):
        train(tmp_path / "run", "stage2")


def test_stage_begun_from_other_weights_is_refused(reference: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    model = load_transformer(reference / "stage2" / "model")
    from pixart.convert import save_transformer

    save_transformer(model, start)
    train(tmp_path / "run", "stage2", init_from=start, trainer__max_steps=1)
    with torch.no_grad():
        model.final_layer.linear.bias.add_(1.0)
    save_transformer(model, start)
    with pytest.raises(UserError, match="begun with other starting weights"):
        train(tmp_path / "run", "stage2", init_from=start, trainer__max_steps=1)


def test_start_from_weights_of_another_autoencoder_is_said(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = tiny_vae(tmp_path / "other")
    state, _ = read_weights(vae / "diffusion_pytorch_model.safetensors")
    save_weights(vae / "diffusion_pytorch_model.safetensors", {name: 1.01 * tensor for name, tensor in state.items()})
    train(tmp_path / "run", "stage2", init_from=reference / "stage1", vae=vae, trainer__max_steps=1)
    assert "stage1: these weights were trained with another autoencoder than this run has" in capsys.readouterr().err


def test_official_file_and_diffusers_folder_are_starting_points(reference: Path, tmp_path: Path) -> None:
    from pixart.convert import save_diffusers, save_official

    trained = load_transformer(reference / "stage2" / "model")
    save_official(trained, tmp_path / "official.pth")
    save_diffusers(trained, tmp_path / "diffusers")
    options = {"trainer__max_steps": 1, "optimiser__lr": 0.0, "optimiser__weight_decay": 0.0}
    for start in (tmp_path / "official.pth", tmp_path / "diffusers"):
        folder = train(tmp_path / start.stem, "stage2", init_from=start, **options)
        got, wanted = weights_of(folder / "stage2"), trained.state_dict()
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"trainer__batch_size": 7, "trainer__accumulate": 2}, "cannot be divided into --trainer.accumulate"),
        ({"optimiser__ema_decay": 1.5}, "ema_decay 1.5: expected a number from 0 to 1"),
        ({"network__heads": 5}, "network: width must be a multiple of heads"),
        ({"network__width": 28, "network__multi_scale": "true"}, "network: multi_scale"),
        ({"init_from": "nowhere"}, "init_from nowhere: no such stage, folder or file"),
        ({"vae": "nowhere"}, "vae nowhere: expected a diffusers AutoencoderKL directory"),
        ({"resume": "nowhere.ckpt"}, "--resume nowhere.ckpt: no such file"),
        ({"trainer__strategy": "fsdp"}, "fsdp shards the weights"),
        ({"optimiser__lr": "fast"}, "optimiser.lr"),
        ({"optimiser__speed": "1"}, "unknown option --optimiser.speed"),
        ({"trainer__max_step": "1"}, "unknown option --trainer.max_step; did you mean --trainer.max_steps"),
        ({"kind": "controlnet", "init_from": "null"}, "a controlnet stage steers a trained network"),
        ({"evaluate": "true", "data__eval_images": 5}, "fewer than 20 pictures are too few"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    options: dict[str, Any], sentence: str, reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence) as failure:
        train(tmp_path / "run", "stage2", **{"init_from": reference / "stage1", **options})
    assert "\n" not in str(failure.value)


def test_folder_of_another_run_is_refused_naming_what_differs(reference: Path) -> None:
    with pytest.raises(UserError, match=r"another configuration \(optimiser.lr was 0.0001, is 0.5\)"):
        train(reference, optimiser__lr=0.5)


def test_recipe_options_give_way_to_the_stage_and_both_to_the_command_line(cache: None, tmp_path: Path) -> None:
    steps = {c.name: c.trainer.max_steps for c, _ in read_recipe(arguments(tmp_path / "run"), "").stages}
    assert steps == {"stage1": 6, "stage2": 6, "stage3": 4}
    given = read_recipe(arguments(tmp_path / "run", trainer__max_steps=9), "").stages
    assert [c.trainer.max_steps for c, _ in given] == [9, 9, 9]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--stage", "stage9"], "--stage stage9: .* has no such stage; it has stage1"),
        (["--stage"], "--stage needs a value"),
    ],
)
def test_bad_recipes_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_recipe(words, "")


def test_controlnet_stage_trains_its_branch_alone_and_is_steered_by_edges(reference: Path, tmp_path: Path) -> None:
    from pixart.sample import open_painter

    start = reference / "stage2"
    options = {"kind": "controlnet", "optimiser__lr": 0.05, "trainer__sample_every": 6}
    folder = train(tmp_path / "run", "stage2", init_from=start, **options)
    assert same_weights(folder / "stage2" / WEIGHTS, start / WEIGHTS)
    assert (folder / "stage2" / "samples" / "step_000006.png").is_file()
    painter = open_painter(folder / "stage2")
    network: Any = painter.network
    assert all(part.after_proj.weight.abs().max() > 0 for part in network.branches())
    with torch.no_grad():  # after six steps the effect is below one grey level
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    sampling = SamplingConfig(steps=2, guidance=2.0)
    pictures = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pictures[1, :, 4:12, 4:12] = 255
    both = painter.captions(["a red circle"] * 2, 16, 16, sampling, control_n3HW=pictures)
    first = painter.captions(["a red circle"] * 2, 16, 16, sampling, control_n3HW=pictures[:1])
    assert torch.equal(both[0], first[0]) and not torch.equal(both[1], first[1])


def test_dreambooth_gives_every_picture_its_one_caption(reference: Path, tmp_path: Path) -> None:
    from PIL import Image

    from common.images import save_png

    for i in range(3):
        save_png(Image.new("RGB", (20, 16), (80 * i, 40, 90)), tmp_path / "dog" / f"{i}.png")
    options = {"data__name": "folder", "data__path": tmp_path / "dog", "data__prompt": "a photo of sks dog"}
    folder = train(tmp_path / "run", "stage2", init_from=reference / "stage2", trainer__batch_size=2, **options)
    assert len(losses(folder / "stage2")) == 6


def test_a_stage_draws_and_is_measured_without_its_pictures_and_codec(reference: Path, tmp_path: Path) -> None:
    from PIL import Image

    from common.images import save_png
    from pixart.evaluate import main as evaluate
    from pixart.sample import main as sample

    own = tmp_path / "own"
    for i in range(24):
        save_png(Image.new("RGB", (16, 16), (10 * i, 40, 90)), own / f"{i}.png")
    lines = (f'{{"file_name": "{i}.png", "text": "a red circle {i}"}}\n' for i in range(24))
    (own / "metadata.jsonl").write_text("".join(lines))
    options = {"data__name": "folder", "data__path": own, "evaluate": "false", "trainer__max_steps": 1}
    folder = train(tmp_path / "run", "stage2", init_from=reference / "stage2", **options)
    (tmp_path / "vae").rename(tmp_path / "moved_vae")
    own.rename(tmp_path / "moved")
    out = sample(["--weights", str(folder / "stage2"), "--prompt", "a red circle", "--out", str(tmp_path / "out.png")])
    assert out.is_file()
    metrics = evaluate(["--run_dir", str(folder), "--images", str(tmp_path / "moved")])
    assert metrics["judge"]["n_real"] == 24 and (folder / "stage2" / "on-moved" / "metrics.json").is_file()
    refused("no such folder", evaluate, ["--run_dir", str(folder)])


def test_rate_rises_stays_and_falls_to_zero_over_the_cooldown() -> None:
    rates = [rate_factor(4, 0.5, 20, step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[10] == 1.0
    assert rates[11:] == pytest.approx([0.1 * n for n in range(9, 0, -1)])
    assert [rate_factor(0, 0.0, 20, step) for step in (0, 19)] == [1.0, 1.0]
