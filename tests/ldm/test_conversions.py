"""Every converted model draws the same pictures as its source, or the conversion is refused by naming what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.carried import schedule_of_betas
from ldm.convert import main as convert
from ldm.diffusion import NoiseSchedule, make_betas
from ldm.official import from_compvis_config
from tests.common.tiny_teacher import SCHEDULER, WORDS
from tests.refusals import refused
from tests.word_tokenizer import word_tokenizer

SPECIAL: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
UNET: dict[str, Any] = {
    "sample_size": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
PLAIN: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 8,
    "scaling_factor": 0.4,
}
VQ: dict[str, Any] = {**VAE, "latent_channels": 3, "num_vq_embeddings": 12, "vq_embed_dim": 3}


def shaken(module: nn.Module) -> nn.Module:
    """No weight at a value that another has."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def text_parts(kind: str) -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": len(WORDS.split()), "max_position_embeddings": 6}
    encoder = BertModel(BertConfig(**sizes)) if kind == "bert" else CLIPTextModel(CLIPTextConfig(**sizes))
    return encoder, word_tokenizer(WORDS, "[CLS] $A [SEP]", model_max_length=6, **SPECIAL)


def source(
    folder: Path, unet: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any], text: str = "bert"
) -> Path:
    """A pipeline as stock diffusers saves it."""
    import diffusers

    torch.manual_seed(5)
    options = {**SCHEDULER, **scheduler}
    steps = getattr(diffusers, options.pop("_class_name")).from_config(options)
    stage = shaken((diffusers.VQModel if "vq_embed_dim" in vae else diffusers.AutoencoderKL)(**vae))
    if text == "none":
        network = shaken(diffusers.UNet2DModel(**unet))
        diffusers.LDMPipeline(vqvae=stage, unet=network, scheduler=steps).save_pretrained(folder)
        return folder
    encoder, tokenizer = text_parts(text)
    parts = {"text_encoder": shaken(encoder), "tokenizer": tokenizer, "scheduler": steps, "vae": stage}
    network = shaken(diffusers.UNet2DConditionModel(**unet))
    diffusers.StableDiffusionPipeline(
        unet=network, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def drawn(folder: Path, steps: int = 3) -> Tensor:
    """Pictures [N, H, W, 3] in 0..1 of stock diffusers."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(1), "num_inference_steps": steps}
    if hasattr(pipeline, "text_encoder"):
        options |= {"prompt": ["a red ring", "two hearts"], "guidance_scale": 2.0}
    else:
        options |= {"batch_size": 2}
    return torch.from_numpy(pipeline(output_type="np", **options).images)


def edit(path: Path, **changes: Any) -> None:
    """Set (or with None as a default's sign, drop) entries of a JSON file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def weights_file(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def old_names(folder: Path, part: str) -> None:
    """Plain attention under the names before diffusers 0.18."""
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(weights_file(folder / part))
    for new, old in renames.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, weights_file(folder / part), {"format": "pt"})


def in_shards(folder: Path, *parts: str) -> None:
    """The weights of these parts in two files and an index each."""
    for part in parts:
        state = load_file(weights_file(folder / part))
        names = sorted(state)
        files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, mine in files.items():
            save_file({name: state[name] for name in mine}, folder / part / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, mine in files.items() for name in mine}}
        (folder / part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        weights_file(folder / part).unlink()


def lose_a_shard(folder: Path) -> None:
    in_shards(folder, "unet")
    (folder / "unet" / "b.safetensors").unlink()


Change = Callable[[Path], None]
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
# name: (changes of the U-Net, of the autoencoder, of the scheduler, text encoder, change of the files)
GRID: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, Change | None]] = {
    "groups": ({"norm_num_groups": 8}, {"norm_num_groups": 4}, {}, "bert", None),
    "linear betas": ({}, {}, LINEAR, "bert", None),
    "cosine betas, v": (
        {},
        {},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        "bert",
        None,
    ),
    "given betas, x0": (
        {},
        {},
        {
            "trained_betas": [1e-4 * 1.02**i for i in range(200)],
            "num_train_timesteps": 200,
            "prediction_type": "sample",
        },
        "bert",
        None,
    ),
    "zero terminal SNR": ({}, {}, ZERO, "bert", None),
    "clipped": ({}, {}, {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0}, "bert", None),
    "PNDM": ({}, {}, {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "clip", None),
    "Euler": ({}, {}, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "clip", None),
    "DPM": ({}, {}, {"_class_name": "DPMSolverMultistepScheduler"}, "clip", None),
    "no scaling factor": ({}, {}, {}, "bert", lambda f: edit(f / "vae" / "config.json", scaling_factor="absent")),
    "attention of the autoencoder, old names": ({}, ATTENTION, {}, "bert", lambda f: old_names(f, "vae")),
    "no middle attention": ({}, {"mid_block_add_attention": False}, {}, "bert", None),
    "shards": ({}, {}, {}, "bert", lambda f: in_shards(f, "unet", "vae")),
    "heads, linear projection": (
        {"attention_head_dim": (2, 4), "use_linear_projection": True, "resnet_time_scale_shift": "scale_shift"},
        {},
        {},
        "clip",
        None,
    ),
    "layers": ({"layers_per_block": 2, "transformer_layers_per_block": 2}, {"layers_per_block": 2}, {}, "bert", None),
    "unconditional": (PLAIN, VQ, {}, "none", None),
    "unconditional, one head, old names": (
        {**PLAIN, "attention_head_dim": None},
        VQ,
        {"beta_schedule": "linear"},
        "none",
        lambda f: old_names(f, "unet"),
    ),
}
# What a .ckpt of the authors cannot say of these, besides a text encoder that is not the paper's.
LOST = {
    "clipped": "set_alpha_to_one is True, which the authors' code cannot do",
    "zero terminal SNR": "timestep_spacing is 'trailing'",
    "Euler": "no sampler like the scheduler EulerDiscreteScheduler",
    "DPM": "no sampler like the scheduler DPMSolverMultistepScheduler",
}


@pytest.mark.parametrize("name", GRID)
def test_a_converted_pipeline_draws_the_same_pictures(name: str, tmp_path: Path) -> None:
    unet, vae, scheduler, text, change = GRID[name]
    networks = (unet, vae) if text == "none" else ({**UNET, **unet}, {**VAE, **vae})
    folder = source(tmp_path / "source", *networks, scheduler, text)
    if change is not None:
        change(folder)
    wanted = drawn(folder)
    assert wanted.std() > 0.01
    ours = tmp_path / "ours.safetensors"
    convert(["--from", "diffusers", "--to", "ours", str(folder), str(ours)])
    convert(["--from", "ours", "--to", "diffusers", str(ours), str(tmp_path / "back")])
    torch.testing.assert_close(drawn(tmp_path / "back"), wanted, atol=1e-5, rtol=0)

    compvis = ["--from", "diffusers", "--to", "compvis", str(folder), str(tmp_path / "model.ckpt")]
    if text != "none":
        refused("cannot carry this text encoder", convert, compvis)
        compvis += ["--parts", "unet", "first_stage"]
    refused(LOST.get(name, "GroupNorms have . groups, the authors' code has 32"), convert, compvis)
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "levels", [{}, LINEAR, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": "steep"}], ids=str
)
def test_a_checkpoint_of_the_authors_draws_the_same_pictures(
    levels: dict[str, Any], prediction: str, tmp_path: Path
) -> None:
    if "trained_betas" in levels:
        levels = {"trained_betas": [1e-4 * 1.05**i for i in range(100)], "num_train_timesteps": 100}
    wide: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 32}
    folder = source(
        tmp_path / "source", {**PLAIN, **wide}, {**VQ, **wide}, {**levels, "prediction_type": prediction}, "none"
    )
    convert(["--from", "diffusers", "--to", "compvis", str(folder), str(tmp_path / "model.ckpt")])
    convert(["--from", "compvis", "--to", "diffusers", str(tmp_path / "model.ckpt"), str(tmp_path / "back")])
    torch.testing.assert_close(drawn(tmp_path / "back"), drawn(folder), atol=1e-5, rtol=0)
    # What the authors' code would build of the YAML beside it takes all of the weights, and has the noise levels.
    content = yaml.safe_load((tmp_path / "model.yaml").read_text())
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    model = from_compvis_config(content)
    lacking, surplus = model.load_state_dict(state, strict=False)
    assert not lacking and set(surplus) <= {*NoiseSchedule().official_tables(), "scale_factor"}
    if "trained_betas" not in levels:
        torch.testing.assert_close(model.schedule.alphas_cumprod, state["alphas_cumprod"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "sqrt_linear", "cosine", "sqrt"])
def test_a_schedule_is_known_by_its_table(kind: str) -> None:
    betas = make_betas(kind, 500, 0.0008, 0.012)
    found = schedule_of_betas(torch.tensor(betas, dtype=torch.float32))
    assert found["kind"] == kind
    again = make_betas(kind, 500, found["linear_start"], found["linear_end"])
    assert abs(again - betas).max() < 1e-6
    assert schedule_of_betas(torch.tensor(betas) * torch.linspace(1, 1.01, 500))["kind"] == "betas"


def spoilt(folder: Path, part: str, spoil: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(weights_file(folder / part))
    spoil(state)
    save_file(state, weights_file(folder / part), {"format": "pt"})


KEY = "down_blocks.0.resnets.0.conv1"
ATTENDED = "mid_block.attentions.0"
FAULTS: dict[str, tuple[str, Change]] = {
    "a bias is missing": (
        r"input_blocks\.1\.0\.in_layers\.2\.bias is missing",
        lambda f: spoilt(f, "unet", lambda s: s.pop(f"{KEY}.bias")),
    ),
    "another shape": (
        "has the shape",
        lambda f: spoilt(f, "unet", lambda s: s.update({f"{KEY}.bias": torch.zeros(5)})),
    ),
    "NaN": ("not finite", lambda f: spoilt(f, "unet", lambda s: s[f"{KEY}.bias"].fill_(float("nan")))),
    "NaN in the autoencoder": (
        "first_stage: .* not finite",
        lambda f: spoilt(f, "vae", lambda s: s["encoder.conv_in.bias"].fill_(float("inf"))),
    ),
    "the autoencoder lacks a layer": (
        "is missing",
        lambda f: spoilt(f, "vae", lambda s: s.pop("encoder.down_blocks.0.resnets.0.conv1.weight")),
    ),
    "a shard is missing": (
        "shard b.safetensors is missing",
        lose_a_shard,
    ),
    "shifted latents": ("latents that are shifted", lambda f: edit(f / "vae" / "config.json", shift_factor=0.1)),
    "another activation": ("act_fn='relu'", lambda f: edit(f / "vae" / "config.json", act_fn="relu")),
    "another block": (
        "block types",
        lambda f: edit(f / "vae" / "config.json", down_block_types=["SkipDownBlock2D", "DownEncoderBlock2D"]),
    ),
    "groups that do not divide": ("norm_num_groups=3", lambda f: edit(f / "unet" / "config.json", norm_num_groups=3)),
    "an option of the U-Net": (
        "resnet_out_scale_factor=2",
        lambda f: edit(f / "unet" / "config.json", resnet_out_scale_factor=2.0),
    ),
    "a flow": (
        "is a flow",
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
    ),
    "an unknown prediction": (
        "prediction_type is 'flow'",
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
    ),
    "a second text encoder": (
        r"its text_encoder_2 \(CLIPTextModel\) cannot be carried",
        lambda f: edit(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_carried_is_named_and_nothing_is_written(fault: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", UNET, VAE, {})
    message, change = FAULTS[fault]
    change(folder)
    refused(message, convert, ["--from", "diffusers", "--to", "ours", str(folder), str(tmp_path / "a.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
