"""The classifier of noisy latents: trained, resumed, judged by noise level, and used by the sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common.errors import UserError
from ldm import sample
from ldm.classifier import BANDS, accuracy_by_noise, class_run, load_classifier
from ldm.run import Run
from ldm.train_classifier import main
from tests.drills import kill, same_weights, words
from tests.ldm.tiny_run import logged, train
from tests.refusals import refused

CONFIG = """
lr: 0.003
warmup: 5
network: {model_channels: 16, channel_mult: [1, 2], norm_groups: 4, attention_resolutions: [2], num_head_channels: 8}
trainer:
  {max_steps: 60, batch_size: 32, precision: 32-true, accelerator: cpu, checkpoint_every: 4, log_every: 1,
   progress: false}
"""


@pytest.fixture(scope="module")
def model(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional run on three colours of picture, whose denoiser has hardly been trained."""
    folder = tmp_path_factory.mktemp("class")
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("blue", "green", "red")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(80):
            pixels = torch.randint(0, 60, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels[..., 2 - channel] += 190
            Image.fromarray(pixels.numpy()).save(folder / "images" / name / f"{number}.png")
    return train(
        folder / "run",
        task="class",
        data__name="folder",
        data__path=folder / "images",
        data__train_images="null",
        first_stage__steps=60,
        first_stage__disc_weight=0,
        trainer__max_steps=2,
    )


def arguments(model: Path, folder: Path, **options: Any) -> list[str]:
    config = folder.parent / "classifier.yaml"
    config.write_text(CONFIG)
    return ["--config", str(config), "--model", str(model), "--run_dir", str(folder), *words(**options)]


@pytest.fixture(scope="module")
def classifier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    main(arguments(model, folder))
    return folder


def test_training_beats_the_largest_class_and_falls_with_the_noise(classifier: Path) -> None:
    metrics = json.loads((classifier / "metrics.json").read_text())
    assert metrics["classes"] == 3 and metrics["images"] == 24 and len(metrics["bands"]) == BANDS
    assert (metrics["bands"][0]["t_from"], metrics["bands"][-1]["t_to"]) == (0, 999)
    assert metrics["bands"][0]["accuracy"] > metrics["chance"] + 0.3
    assert metrics["bands"][-1]["accuracy"] < metrics["bands"][0]["accuracy"] - 0.2
    losses = logged(classifier, "train/loss")
    assert len(losses) == 60 and sum(losses[i] for i in range(50, 60)) < sum(losses[i] for i in range(10))


def test_classifier_killed_in_mid_training_continues_with_the_same_losses_and_weights(
    model: Path, tmp_path: Path
) -> None:
    short = {"trainer__max_steps": 10}
    main(arguments(model, tmp_path / "whole", **short))
    kill("ldm.train_classifier", 7, arguments(model, tmp_path / "parts", **short))
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    main(arguments(model, tmp_path / "parts", **short))
    assert logged(tmp_path / "parts", "train/loss") == logged(tmp_path / "whole", "train/loss")
    assert same_weights(*(tmp_path / name / "model.safetensors" for name in ("parts", "whole")))


def test_micro_batches_give_the_losses_of_the_whole_batch(model: Path, tmp_path: Path) -> None:
    runs = []
    for parts in (1, 2):
        folder = tmp_path / f"run{parts}"
        main(arguments(model, folder, trainer__max_steps=4, trainer__accumulate=parts, lr=1e-4))
        runs.append(logged(folder, "train/loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5) and len(runs[0]) == 4


def test_guided_samples_are_likelier_to_be_of_their_class(model: Path, classifier: Path) -> None:
    run, ldm, _ = class_run(model)
    network = load_classifier(classifier, run, ldm)
    columns = sample.condition_columns(run.task, run.config, 24)
    run.config.sampling.steps, run.config.sampling.guidance = 10, 1.0
    share = []
    for scale in (0.0, 30.0):
        images = sample.draw(
            ldm, "class", columns, 24, (16, 16), run.config.sampling, classifier=network, classifier_scale=scale
        )
        table = type(run.task.reference)({"image": images, "label": columns["label"]})
        share.append(accuracy_by_noise(network, ldm, table)["bands"][0]["accuracy"])
    assert share[1] > share[0] + 0.2


def test_program_draws_with_a_classifier(model: Path, classifier: Path, tmp_path: Path) -> None:
    pictures = []
    for number, scale in enumerate(("0", "0", "8")):
        out = tmp_path / f"{number}.png"
        options = ["--model", str(model), "--out", str(out), "--count", "2", "--steps", "4"]
        sample.main([*options, "--classifier", str(classifier), "--classifier_scale", scale])
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_trained_classifier_is_not_trained_again(
    model: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.training.fit", lambda *_: pytest.fail("trained again"))
    assert main(arguments(model, classifier)) == json.loads((classifier / "metrics.json").read_text())
    assert "trained already" in capsys.readouterr().err
    refused(r"another configuration \(lr was 0.003, is 0.5\)", main, arguments(model, classifier, lr=0.5))


def test_classifier_of_another_latent_space_is_refused(model: Path, classifier: Path, tmp_path: Path) -> None:
    run = Run.existing(model)
    ldm = run.load()
    ldm.scale_factor.mul_(1.5)
    with pytest.raises(UserError, match=r"trained on latents of another model: .* train_classifier.py --model"):
        load_classifier(classifier, run, ldm)
    refused(r"--classifier .*: no config.yaml there", load_classifier, tmp_path, run, ldm)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.yaml").write_text((classifier / "config.yaml").read_text().replace("channels: 16", "channels: 32"))
    save_file(load_file(classifier / "model.safetensors"), copy / "model.safetensors")
    refused(r"does not fit .*config.yaml: .* has the shape", load_classifier, copy, run, ldm)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "absent"}, "absent: no config.yaml there"),
        ({"network__num_head_channels": 64}, "attention of width 32 has no head of 64 channels"),
        ({"network__channel_mult": "[1,1,1,1,1]"}, "latents of 8 x 8 cannot be halved 4 times"),
        ({"trainer__accumulate": 5}, "cannot be divided into --trainer.accumulate 5"),
        ({"resume": "absent.ckpt"}, "--resume absent.ckpt: no such file"),
    ],
)
def test_mistake_is_named(options: dict[str, Any], sentence: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        main([*arguments(model, tmp_path / "run"), *(f"--{k.replace('__', '.')}={v}" for k, v in options.items())])


def test_only_class_conditional_runs_have_a_classifier(model: Path, classifier: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", task="unconditional", trainer__max_steps=1, first_stage__steps=1)
    refused("trained for task unconditional, which has no classes", main, arguments(plain, tmp_path / "run"))
    with pytest.raises(UserError, match="trained for task unconditional, which has no classes"):
        sample.main(["--model", str(plain), "--classifier", str(classifier), "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="leave --size out"):
        sample.main(["--model", str(model), "--classifier", str(classifier), "--size", "16x32"])
