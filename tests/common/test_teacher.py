"""Teachers are read from any diffusers directory as stock diffusers reads them, and mistakes are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.paths import REPOSITORY
from common.teacher import Teacher, folder_checksum, read_schedule
from tests.common.tiny_teacher import SCHEDULER, save_teacher, tiny_teacher

PRETRAINED = REPOSITORY / "ldm" / "pretrained"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", "v_prediction")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_prompts_and_latents_are_treated_as_stock_diffusers_does(saved: Path) -> None:
    from diffusers import StableDiffusionPipeline

    teacher = Teacher.load(saved)
    stock = StableDiffusionPipeline.from_pretrained(saved)
    prompts = ["a red star", "two blue ring of the left star and ring"]
    states, null = stock.encode_prompt(prompts, "cpu", 1, True)
    assert torch.equal(teacher.encode(prompts), states)
    assert torch.equal(teacher.null(2), null)
    latents = torch.randn(2, 4, 8, 8)
    wanted = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    torch.testing.assert_close(teacher.decode_differentiable(latents), wanted)
    images = teacher.decode(latents)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images.float() / 127.5 - 1, wanted.clamp(-1, 1), atol=0.51 / 127.5, rtol=0)


@pytest.mark.skipif(not (PRETRAINED / "shapes32-v").is_dir(), reason="no committed teacher in this checkout")
def test_the_committed_teacher_loads_with_its_own_sizes_and_prediction_type() -> None:
    teacher = Teacher.load(PRETRAINED / "shapes32-v")
    assert teacher.latent_shape == (8, 8, 8)
    assert teacher.schedule.prediction_type == "v_prediction"
    assert teacher.encode(["a star"]).shape[1] == teacher.tokenizer.model_max_length
    assert not any(parameter.requires_grad for parameter in teacher.unet.parameters())


def test_gradients_pass_the_frozen_decoder() -> None:
    teacher = tiny_teacher()
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    teacher.decode_differentiable(latents).square().mean().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in teacher.vae.parameters())


def test_images_become_latents_scaled_as_the_network_sees_them() -> None:
    teacher = tiny_teacher()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    wanted = teacher.vae.encode(images).latent_dist.mean * teacher.vae.config.scaling_factor
    torch.testing.assert_close(teacher.encode_images(images), wanted)


def test_the_checksum_follows_weights_and_configs_but_not_the_readme(folder: Path) -> None:
    before = folder_checksum(folder)
    (folder / "README.md").write_text("words")
    assert folder_checksum(folder) == before == Teacher.load(folder).checksum()
    edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.02)
    after_config = folder_checksum(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert len({before, after_config, folder_checksum(folder)}) == 3


def test_missing_and_damaged_parts_are_named(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="unet: cannot be read"):
        Teacher.load(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="vae/ is missing"):
        Teacher.load(folder)
    with pytest.raises(UserError, match="not a diffusers directory"):
        Teacher.load(folder / "unet")


def test_weights_that_lack_a_tensor_are_refused_instead_of_left_random(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["conv_out.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack conv_out\.weight"):
        Teacher.load(folder)


def test_models_of_another_kind_are_refused(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UserError, match="is a flow already"):
        Teacher.load(folder)
    edit(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    with pytest.raises(UserError, match="second text encoder"):
        Teacher.load(folder)
    edit(folder / "model_index.json", text_encoder_2=[None, None], text_encoder=["my_module", "MyEncoder"])
    with pytest.raises(UserError, match="expected a transformers class"):
        Teacher.load(folder)


def test_noise_levels_come_from_the_config_and_missing_ones_are_named() -> None:
    linear = read_schedule({**SCHEDULER, "beta_schedule": "linear"})
    scaled = read_schedule(SCHEDULER)
    assert not torch.equal(linear.alphas_cumprod_T, scaled.alphas_cumprod_T)
    with pytest.raises(UserError, match="beta_end is missing"):
        read_schedule({key: value for key, value in SCHEDULER.items() if key != "beta_end"})
    with pytest.raises(UserError, match="not understood"):
        read_schedule({**SCHEDULER, "beta_schedule": "spiral"})
