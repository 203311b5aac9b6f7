"""The exported pipeline draws what the trainer's sampler draws, and a run folder needs nothing outside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.cli import parse_config
from common.data.shapes import Shapes
from common.errors import UserError
from common.teacher import Teacher, open_pipeline
from ldm import evaluate, sample
from ldm.config import LdmConfig
from ldm.convert import main as convert
from ldm.first_stage import build_first_stage, describe, freeze, given_options, load_first_stage
from ldm.run import Run, build_latent_diffusion, export_pipeline, not_exportable
from ldm.samplers import recorded_noise
from ldm.samplers import sample as sample_latents
from ldm.tasks import Task, build_task, tokenize, train_tokenizer
from tests.drills import words
from tests.ldm.test_tasks import picture
from tests.ldm.tiny_run import config_file, first_stage_of, train
from tests.refusals import refused

CAPTIONS = ["a red star", "two blue rings left of a star"]
# Every option that changes what is drawn from the same weights, each at another value than the tiny run's.
OPTIONS: dict[str, dict[str, Any]] = {
    "cosine, heads": {
        **{"diffusion__schedule": "cosine", "diffusion__prediction": "v", "unet__channel_mult": "[1, 2]"},
        **{"unet__num_head_channels": -1, "unet__num_heads": 2},
    },
    "linear betas, scale and shift": {
        **{"diffusion__schedule": "sqrt_linear", "diffusion__prediction": "x0", "unet__use_scale_shift_norm": "true"},
        **{"unet__num_res_blocks": 2, "unet__transformer_depth": 2},
    },
    "roots of betas": {
        **{"diffusion__schedule": "sqrt", "diffusion__linear_start": 1e-6, "diffusion__linear_end": 1e-4},
        "diffusion__prediction": "v",
    },
    "other ends, epsilon": {"diffusion__linear_start": 0.001, "diffusion__linear_end": 0.03},
    "few levels, attention at one": {
        **{"diffusion__timesteps": 60, "diffusion__schedule": "cosine", "diffusion__prediction": "x0"},
        "unet__attention_resolutions": "[2]",
    },
    "groups and attention of a deep first stage": {
        **{"first_stage__norm_groups": 2, "first_stage__attention": "true", "first_stage__attn_resolutions": "[16]"},
        **{"first_stage__ch_mult": "[1, 2, 2]", "first_stage__num_res_blocks": 2},
        **{"unet__norm_groups": 8, "diffusion__prediction": "v"},
    },
}


def tiny_config(folder: Path, **options: Any) -> LdmConfig:
    return parse_config(LdmConfig, None, "", ["--config", str(config_file(folder)), *words(**options)])[0]


def tiny_task(config: LdmConfig) -> Task:
    data = Shapes("test", 2, size=config.data.size)
    return build_task(config, data, data, train_tokenizer(CAPTIONS, 64, config.conditioner.tokens))


@torch.no_grad()
def shaken(module: nn.Module, seed: int = 1) -> None:
    """Untrained denoisers give zero, and any two samplers would agree."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def drawn(ldm: Any, tokenizer: Any, noise: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Pictures [N, 3, H, W] in 0..1 of the trainer's own sampler."""
    cond = ldm.conditioning({"condition": tokenize(tokenizer, CAPTIONS)})
    still = recorded_noise([torch.zeros(()).expand_as(noise)] * (steps + 1))
    z = sample_latents(ldm, noise.shape, still, cond, steps=steps, guidance=guidance, zT_BCHW=noise)
    return (ldm.decode(z) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_exported_pipeline_draws_what_the_trainer_draws(name: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **OPTIONS[name])
    task = tiny_task(config)
    ldm = build_latent_diffusion(config, task, freeze(build_first_stage(config.first_stage, config.data.size)))
    ldm.scale_factor.fill_(0.7)
    shaken(ldm)
    ldm.eval()
    assert not_exportable(ldm, task) is None
    export_pipeline(ldm, task, config, tmp_path / "pipeline", dtype=torch.float32)
    pipeline = open_pipeline(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    stage: Any = ldm.first_stage_model
    side = config.data.size // stage.downsampling
    assert pipeline.unet.config.sample_size == side
    noise = torch.randn(2, stage.embed_dim, side, side, generator=torch.Generator().manual_seed(0))
    for steps, guidance in ((5, 1.0), (4, 3.0)):
        ours = drawn(ldm, task.tokenizer, noise, steps, guidance)
        theirs = pipeline(
            CAPTIONS, latents=noise.clone(), num_inference_steps=steps, guidance_scale=guidance, output_type="pt"
        ).images
        assert ours.std() > 0.01
        torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=0)
    # Our own reader of such folders, from which the accelerating papers start, has the run's noise levels too.
    levels = Teacher.load(tmp_path / "pipeline").schedule.alphas_cumprod_T
    torch.testing.assert_close(levels, torch.tensor(ldm.schedule.abar, dtype=torch.float64), atol=1e-5, rtol=1e-3)


def test_what_stock_pipelines_cannot_carry_is_said_and_not_written(
    first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"unet__resblock_updown": "true", "first_stage__weights": first_stage_of(first), "trainer__max_steps": 1}
    folder = train(tmp_path / "run", **options)
    assert not (folder / "pipeline").exists() and (folder / "model.safetensors").is_file()
    assert (
        "pipeline will not be written: diffusers' U-Nets have no counterpart of resblock_updown"
        in capfd.readouterr()[1]
    )


@pytest.fixture(scope="module")
def first(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage with other groups than the options' default."""
    folder = tmp_path_factory.mktemp("first") / "run"
    return train(folder, task="unconditional", stages="[first_stage]", first_stage__norm_groups=2)


def test_a_first_stage_is_built_as_its_file_says(
    first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = first_stage_of(first)
    config = tiny_config(tmp_path, first_stage__ch=16, first_stage__weights=file)
    found = given_options(config.first_stage, 16)
    assert (found.norm_groups, found.ch, found.attention) == (2, 8, False)
    assert (
        "decides how the first stage is built: ch 8 instead of 16, norm_groups 2 instead of 4" in capfd.readouterr()[1]
    )
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    wanted = load_first_stage(file, tiny_config(tmp_path, first_stage__norm_groups=2).first_stage, 16).moments(images)
    folder = train(tmp_path / "run", first_stage__weights=file, first_stage__ch=16, trainer__max_steps=1)
    run = Run.existing(folder)
    torch.testing.assert_close(run.load().first_stage_model.moments(images), wanted)  # type: ignore[operator]
    assert run.config.first_stage.norm_groups == 2
    again = load_first_stage(folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors", found, 16)
    assert describe(again, 16)["norm_groups"] == 2
    torch.testing.assert_close(again.moments(images), wanted, atol=0.01, rtol=0.01)  # the pipeline holds half precision
    whole = load_first_stage(folder / "model.safetensors", found, 16)
    torch.testing.assert_close(whole.moments(images), wanted)


RUNS: dict[str, dict[str, Any]] = {
    "text": {"task": "text"},
    "class": {"task": "class"},
    "superres": {"task": "superres", "conditioner__scale": 2},
}


@pytest.fixture(params=RUNS)
def lonely(request: pytest.FixtureRequest, first: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A finished run whose pictures and first stage are gone."""
    own = tmp_path / "own"
    lines = []
    for i in range(40):
        picture(own / f"{i}.png", (6 * i, 10, 200 - i))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"red {i}", "label": i % 3}))
    (own / "metadata.jsonl").write_text("\n".join(lines))
    weights = Path(shutil.copy(first_stage_of(first), tmp_path / "stage.safetensors"))
    data = {"data__name": "folder", "data__path": own, "first_stage__weights": weights, "trainer__max_steps": 1}
    folder = train(tmp_path / "run", **data, **RUNS[request.param])
    weights.unlink()
    own.rename(tmp_path / "elsewhere")
    yield request.param, folder


def test_a_run_folder_draws_converts_and_is_measured_without_its_data(lonely: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = lonely
    text = RUNS[name]["task"] == "text"
    options = ["--model", str(folder), "--count", "2", "--steps", "2", "--out", str(tmp_path / "out.png")]
    sample.main([*options, *(["--prompt", "red 3"] if text else [])])
    assert (tmp_path / "out.png").is_file()
    with pytest.raises(UserError, match=r"GroupNorms have . groups|cannot carry this text encoder"):
        convert(["--from", "ours", "--to", "compvis", str(folder), str(tmp_path / "model.ckpt")])
    convert(["--from", "ours", "--to", "ours", str(folder), str(tmp_path / "model.safetensors")])
    converted = load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        converted["first_stage_model.quant_conv.weight"],
        Run.existing(folder, data=False).load().first_stage_model.quant_conv.weight,  # type: ignore[union-attr]
    )
    if name == "text":
        # By way of the one file, which holds the tokenizer too.
        convert(
            ["--from", "ours", "--to", "diffusers", str(tmp_path / "model.safetensors"), str(tmp_path / "pipeline")]
        )
        prompts = ["red 3", "red 20"]
        ours, exported = (
            sample.pipeline_images(open_pipeline(place / "pipeline"), prompts, 3, 2.0, 5)
            for place in (tmp_path, folder)
        )
        assert (ours.int() - exported.int()).abs().max() <= 8 and ours.float().std() > 1  # one holds half precision
    refused("no such folder", evaluate.main, ["--run_dir", str(folder)])
    evaluate.main(["--run_dir", str(folder), "--images", str(tmp_path / "elsewhere")])
    metrics = json.loads((folder / "on-elsewhere" / "metrics.json").read_text())
    assert metrics["judge"]["n_real"] == 24 and not (folder / "metrics.json").exists()
