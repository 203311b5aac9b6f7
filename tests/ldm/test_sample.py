"""Drawing images: the exported pipeline is our model, `sample.py` and `train.py` as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import run_main
from common.teacher import open_pipeline
from ldm import evaluate, sample
from ldm.run import Run, export_pipeline
from ldm.samplers import sample as sample_latents
from ldm.samplers import seeded_noise
from tests.drills import start
from tests.ldm.tiny_run import arguments, train
from tests.refusals import refused

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text_run(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("text") / "run", trainer__max_steps=4, diffusion__prediction="v")


def test_exported_pipeline_draws_what_our_sampler_draws(text_run: Path, tmp_path: Path) -> None:
    run = Run.existing(text_run)
    ldm = run.load()
    with torch.no_grad():  # an untrained denoiser is zero: any sampler would agree
        for parameter in ldm.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    export_pipeline(ldm, run.task, run.config, tmp_path / "pipeline", dtype=torch.float32)
    pipeline = open_pipeline(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    captions = run.task.captions[:2]
    start = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    result = pipeline(captions, latents=start, num_inference_steps=5, guidance_scale=3.0, output_type="np").images
    theirs = torch.from_numpy(result).permute(0, 3, 1, 2)
    with torch.no_grad():
        cond = ldm.conditioning({"condition": run.task.caption_columns(captions)["tokens"][:, 0]})
        noise = seeded_noise(torch.Generator())
        z = sample_latents(
            ldm,
            (2, 2, 8, 8),
            lambda like: start if like.shape == start.shape else noise(like),
            cond,
            sampler="ddim",
            steps=5,
            eta=0.0,
            guidance=3.0,
        )
        ours = (ldm.decode(z) / 2 + 0.5).clamp(0, 1)
    assert ours.std() > 0.01
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_exported_half_precision_pipeline_opens_with_plain_diffusers(text_run: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(text_run / "pipeline", dtype=torch.float32)
    assert isinstance(pipeline, StableDiffusionPipeline)
    images = sample.pipeline_images(pipeline, ["a red star"] * 3, steps=2, guidance=2.0, seed=4, batch_size=2)
    alone = sample.pipeline_images(pipeline, ["a red star"], steps=2, guidance=2.0, seed=4)
    assert images.shape == (3, 3, 16, 16) and (images[0].int() - alone[0].int()).abs().max() <= 1


def test_sample_does_not_depend_on_the_batch_size(text_run: Path) -> None:
    run = Run.existing(text_run)
    ldm, columns = run.load(), run.task.reference.columns
    drawn = []
    for size in (2, 5):
        run.config.sampling.batch_size = size
        drawn.append(sample.draw(ldm, "text", columns, 5, (16, 16), run.config.sampling, seed=3).int())
    assert (drawn[0] - drawn[1]).abs().max() <= 1
    assert (
        drawn[0][0] - sample.draw(ldm, "text", columns, 1, (16, 16), run.config.sampling, seed=4)[0]
    ).abs().max() > 1


def test_program_draws_from_a_run_and_from_a_pipeline(text_run: Path, tmp_path: Path) -> None:
    before = (text_run / "config.yaml").read_bytes()
    for number, model in enumerate((text_run, text_run / "pipeline")):
        out = tmp_path / f"{number}.png"
        options = ["--model", str(model), "--out", str(out), "--count", "2", "--steps", "2", "--size", "16x24"]
        sample.main(["--prompt", "a red star", *options])
        assert Image.open(out).width > 2 * 24
    assert (text_run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "absent", "--prompt", "x"], "absent: neither a run folder .* nor a diffusers directory"),
        (["--count", "0"], "--count 0: expected a whole number of at least 1"),
        (["--size", "big"], "--size big: expected HEIGHTxWIDTH"),
    ],
)
def test_mistake_is_one_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], text_run: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: sample.main(options))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1
    refused(sentence, sample.main, options)


@pytest.mark.parametrize(
    ("options", "run_sentence", "pipeline_sentence"),
    [
        (["--size", "17x18"], "--size 17x18: expected both sides to be multiples of 4", "multiples of 8"),
        (["--size", "0x16"], "--size 0: expected a whole number from 8 to 8192", "--size 0: expected"),
        (["--steps", "0"], "--steps 0: expected a whole number of at least 1", "--steps 0: expected"),
        (["--steps", "1001"], "--steps 1001: expected a whole number from 1 to 1000", "--steps 1001: expected"),
        (["--steps", "1000"], "1000 sampling steps overflow", "--steps 1000: DDIMScheduler cannot make 1000 steps"),
    ],
)
def test_sizes_and_steps_that_the_model_lacks_are_refused_before_drawing(
    options: list[str], run_sentence: str, pipeline_sentence: str, text_run: Path, tmp_path: Path
) -> None:
    for model, sentence in ((text_run, run_sentence), (text_run / "pipeline", pipeline_sentence)):
        out = tmp_path / "out.png"
        refused(sentence, sample.main, ["--model", str(model), "--prompt", "a red star", "--out", str(out), *options])
        assert not out.exists()


def test_pipeline_without_a_prompt_is_one_sentence(text_run: Path) -> None:
    refused("--prompt is missing", sample.main, ["--model", str(text_run / "pipeline")])


def test_evaluation_wants_a_finished_run(tmp_path: Path) -> None:
    refused(r"no config.yaml there", evaluate.main, ["--run_dir", str(tmp_path)])
    refused(r"model.safetensors: no such file; train first", train, tmp_path / "run", stages="[evaluate]")


def test_damaged_model_is_refused(text_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(text_run, copy, ignore=shutil.ignore_patterns("diffusion", "first_stage", "latents", "pipeline"))
    (copy / "model.safetensors").write_bytes((text_run / "model.safetensors").read_bytes()[:500])
    refused(r"model.safetensors is truncated", Run.existing, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("model_channels: 16", "model_channels: 32"))
    (copy / "model.safetensors").write_bytes((text_run / "model.safetensors").read_bytes())
    refused(r"does not fit .*config.yaml: .* has the shape", Run.existing(copy).load)


@pytest.mark.parametrize(
    ("script", "options"),
    [("train", ("--trainer.max_steps", "--data.path")), ("train_classifier", ("--network.pool",))],
)
def test_help_needs_no_torch(script: str, options: tuple[str, ...]) -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path('ldm/{script}.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'pytorch_lightning', 'transformers', 'diffusers'} & sys.modules.keys()"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in options)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--trainer.max_stepz", "3"], "max_stepz"),
        (["--trainer.max_steps", "many"], "max_steps"),
        (["--task", "poetry"], "poetry"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
        (["--stages", "[]"], "--stages is empty"),
    ],
)
def test_wrong_option_ends_the_program_with_status_2(
    extra: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldm.train import main

    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main([*arguments(tmp_path / "run"), *extra]))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_program_reports_a_mistake_without_traceback(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    script = str(ROOT / "ldm" / "train.py")
    options = arguments(tmp_path / "run", data__name="folder", data__path=tmp_path / "empty")
    done = start(script, *options, REPRO_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'empty'}: no images in it") and done.stderr.count("\n") == 1
