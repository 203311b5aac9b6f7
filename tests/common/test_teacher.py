"""Teachers are read from any diffusers directory as stock diffusers reads them, and mistakes are named."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.paths import REPOSITORY
from common.teacher import Teacher, folder_checksum, open_pipeline, read_schedule
from tests.common.tiny_teacher import SCHEDULER, save_teacher, tiny_teacher
from tests.refusals import refused

WEIGHTS = "diffusion_pytorch_model.safetensors"
PRETRAINED = REPOSITORY / "ldm" / "pretrained"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny", "v_prediction")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


def spoil(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a weights file."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


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


def test_prompts_that_are_cut_are_counted_and_said_once(saved: Path) -> None:
    teacher = Teacher.load(saved)
    prompts = ["a red star", "two blue ring of the left star and ring"]
    with pytest.warns(UserWarning, match="1 of 2 prompts are cut to 6 tokens, the first is 'two blue"):
        teacher.encode(prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.encode(prompts)


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


def test_pictures_go_back_through_the_decoder_in_the_layout_of_fast_norms() -> None:
    teacher = tiny_teacher()
    stock = copy.deepcopy(teacher)
    stock.vae.set_attn_processor(AttnProcessor2_0())
    latents = torch.randn(2, 4, 8, 8)
    for bf16, layout in ((False, torch.channels_last), (True, torch.contiguous_format)):
        found = []
        for decoder in (teacher, stock):
            norm, seen = decoder.vae.decoder.conv_norm_out, []
            handle = norm.register_forward_hook(lambda module, given, output, seen=seen: seen.append(given[0]))
            z = latents.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                images = decoder.decode_differentiable(z)
            images.square().mean().backward()
            handle.remove()
            found.append((images.detach(), z.grad, seen[0]))
        (images, gradient, inside), (wanted, wanted_gradient, _) = found
        assert inside.is_contiguous(memory_format=layout)
        tolerance = {"rtol": 0.05, "atol": 0.02} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(images, wanted, **tolerance)
        scale = float(wanted_gradient.abs().max())
        torch.testing.assert_close(gradient / scale, wanted_gradient / scale, **tolerance)


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
    weights = folder / "unet" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert len({before, after_config, folder_checksum(folder)}) == 3


def test_missing_and_damaged_parts_are_named(folder: Path) -> None:
    weights = folder / "unet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("unet: cannot be read", Teacher.load, folder)
    shutil.rmtree(folder / "vae")
    refused("vae/ is missing", Teacher.load, folder)
    refused("not a diffusers directory", Teacher.load, folder / "unet")


def test_weights_that_lack_a_tensor_are_refused_instead_of_left_random(folder: Path) -> None:
    spoil(folder / "unet" / WEIGHTS, lambda state: state.pop("conv_out.weight"))
    refused(r"lack conv_out\.weight", Teacher.load, folder)


def test_models_of_another_kind_are_refused(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    refused("is a flow already", Teacher.load, folder)
    edit(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    refused("second text encoder", Teacher.load, folder)
    edit(folder / "model_index.json", text_encoder_2=[None, None], text_encoder=["my_module", "MyEncoder"])
    refused("expected a transformers class", Teacher.load, folder)


PURE_NOISE = {"rescale_betas_zero_snr": True}
FAULTS = {
    "tokenizer without a length": ("tokenizer", {"model_max_length": 10**30}, "is missing"),
    "prompts longer than the encoder's table": ("tokenizer", {"model_max_length": 77}, "at most 6"),
    "no sample size": ("unet", {"sample_size": None}, "sample_size is null"),
    "latent consistency model": ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim|weights lack"),
    "class labels": ("unet", {"num_class_embeds": 10}, "num_class_embeds|weights lack"),
    "epsilon of pure noise": ("scheduler", PURE_NOISE | {"prediction_type": "epsilon"}, "expected v_prediction or sam"),
    "levels that are not said": ("scheduler", {"beta_schedule": None}, "beta_schedule is missing"),
    "unknown prediction": ("scheduler", {"prediction_type": "flow"}, "'flow': expected one of"),
    "code beside the tokenizer": ("tokenizer", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
    "code beside the encoder": ("text_encoder", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "code beside the network": ("unet", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
}
CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_folder_leaves_out_or_cannot_be_is_one_sentence(fault: str, folder: Path) -> None:
    part, changes, sentence = FAULTS[fault]
    edit(folder / part / CONFIGS.get(part, "config.json"), **changes)
    assert str(folder) in refused(sentence, Teacher.load, folder)


def test_networks_of_a_latent_consistency_model_or_with_a_learned_variance_are_refused() -> None:
    from diffusers import UNet2DConditionModel

    teacher = tiny_teacher()
    own = {key: value for key, value in teacher.unet.config.items() if not key.startswith("_")}
    rest = (teacher.vae, teacher.text_encoder, teacher.tokenizer, teacher.scheduler_config)
    for change, sentence in (
        ({"time_cond_proj_dim": 8}, "latent consistency model .time_cond_proj_dim 8."),
        ({"out_channels": 8}, "out_channels is 8, the latents have 4"),
        ({"in_channels": 9}, "in_channels is 9, the autoencoder makes 4"),
        ({"cross_attention_dim": 8}, "cross_attention_dim is 8, the text encoder's states have 16"),
        ({"class_embed_type": "timestep"}, "class_embed_type: its U-Net wants more than text"),
    ):
        unet = UNet2DConditionModel.from_config({**own, **change})
        refused(sentence, Teacher, unet, *rest)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_schedule_that_ends_in_pure_noise_is_read_for_networks_that_know_the_image_there(kind: str) -> None:
    schedule = read_schedule({**SCHEDULER, **PURE_NOISE, "prediction_type": kind})
    alpha, sigma = schedule.levels(torch.tensor([999]))
    assert (float(alpha), float(sigma)) == (0.0, 1.0) and float(schedule.alphas_cumprod_T[-1]) == 1e-8
    output, x = torch.randn(2, 1, 4, 8, 8)
    x1, eps = schedule.read(output, x, alpha, sigma)
    assert torch.equal(x1, -output if kind == "v_prediction" else output) and torch.equal(eps, x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_is_read_as_image_and_noise(kind: str) -> None:
    schedule = read_schedule({**SCHEDULER, "prediction_type": kind})
    x1, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    alpha, sigma = schedule.levels(torch.tensor([300, 800]))
    output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x1, "sample": x1}[kind]
    found = schedule.read(output, alpha * x1 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(found[0], x1, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], eps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused_by_name(part: str, folder: Path) -> None:
    weights = next((folder / part).glob("*.safetensors"))
    name = next(key for key in sorted(load_file(weights)) if key.endswith("weight") and "pooler" not in key)
    spoil(weights, lambda state: state[name].flatten()[:1].fill_(float("nan")))
    refused(f"{part}: {name} holds numbers that are not finite", Teacher.load, folder)
    refused("not finite", open_pipeline, folder)


def test_pictures_that_are_not_finite_are_an_error_instead_of_black() -> None:
    latents = torch.randn(3, 4, 8, 8)
    latents[1, 0, 0, 0] = float("nan")
    refused("1 of 3 pictures hold numbers that are not finite", tiny_teacher().decode, latents)


def test_a_folder_is_read_without_remarks_of_the_libraries(saved: Path) -> None:
    code = f"from pathlib import Path; from common.teacher import *; Teacher.load(Path({str(saved)!r})); " + (
        f"open_pipeline(Path({str(saved)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stock_pipelines_with_missing_or_damaged_parts_are_one_sentence(folder: Path) -> None:
    index = folder / "model_index.json"
    edit(index, _class_name=["pipeline", "MyPipeline"])
    refused("expected a pipeline of diffusers by name", open_pipeline, folder)
    edit(index, _class_name="StableDiffusionPipeline")
    weights = folder / "vae" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("vae: cannot be read", open_pipeline, folder)


def test_pictures_are_drawn_in_batches_from_their_own_noises() -> None:
    teacher, noise = tiny_teacher(), torch.randn(5, 4, 8, 8)
    prompts = ["a red star", "a blue ring", "two", "left", "and"]
    drawn = teacher.draw(lambda z, states: z + states.mean((1, 2)).view(-1, 1, 1, 1), prompts, noise, batch_size=2)
    states = teacher.encode(prompts)
    wanted = teacher.decode(noise + states.mean((1, 2)).view(-1, 1, 1, 1))
    assert drawn.shape == (5, 3, *teacher.image_size) and (drawn.int() - wanted.int()).abs().max() <= 1


def test_noise_levels_come_from_the_config_and_missing_ones_are_named() -> None:
    linear = read_schedule({**SCHEDULER, "beta_schedule": "linear"})
    scaled = read_schedule(SCHEDULER)
    assert not torch.equal(linear.alphas_cumprod_T, scaled.alphas_cumprod_T)
    refused("beta_end is missing", read_schedule, {key: value for key, value in SCHEDULER.items() if key != "beta_end"})
    refused("not understood", read_schedule, {**SCHEDULER, "beta_schedule": "spiral"})
