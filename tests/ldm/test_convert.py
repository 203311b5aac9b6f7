"""Conversion between the authors' checkpoints, ours and diffusers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from common.errors import UserError, run_main
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.conditioners import TransformerEmbedder
from ldm.convert import (
    Checkpoint,
    autoencoder_from_diffusers_dir,
    first_stage_from_diffusers,
    first_stage_to_diffusers,
    infer_first_stage_config,
    infer_unet_config,
    load_compvis,
    load_diffusers,
    load_ours,
    main,
    save_compvis,
    save_diffusers,
    save_ours,
    text_encoder_from_diffusers,
    text_encoder_to_diffusers,
    unet_from_diffusers,
    unet_from_diffusers_dir,
    unet_to_diffusers,
    write_pipeline,
)
from ldm.model import ConditionedUNet, UNet
from tests.word_tokenizer import word_tokenizer

PLAIN: dict[str, Any] = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [1, 2, 3],
    "num_head_channels": 32,
}
CROSS: dict[str, Any] = {
    **PLAIN,
    "attention_resolutions": [1, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 2,
    "context_dim": 24,
}
DDCONFIG: dict[str, Any] = {
    "double_z": True,
    "z_channels": 3,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
    "attn_type": "vanilla",
}


def randomised(module: nn.Module) -> Any:
    """No parameter zero, so that every path contributes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        value = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data = value + (1.0 if parameter.ndim == 1 else 0.0)
    return module.eval()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def latents() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)


@pytest.mark.parametrize(
    "options",
    [
        CROSS,
        {**CROSS, "num_head_channels": -1, "num_heads": 2, "num_classes": 7},
        {**CROSS, "num_res_blocks": 2, "use_scale_shift_norm": True},
    ],
    ids=["head width", "head count and classes", "scale-shift"],
)
@torch.no_grad()
def test_cross_attention_unet_equals_its_diffusers_twin(options: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    unet = randomised(UNet(**options))
    weights, config = unet_to_diffusers(unet.state_dict(), unet.config)
    twin = UNet2DConditionModel(**{k: v for k, v in config.items() if k != "_class_name"}).eval()
    twin.load_state_dict(weights)
    x, t, context = latents()
    y = torch.tensor([1, 6]) if "num_classes" in options else None
    expected = twin(x, t, context, class_labels=y).sample
    torch.testing.assert_close(unet(x, t, context, y), expected, rtol=1e-4, atol=1e-4)
    back, arguments = unet_from_diffusers(
        weights, json.loads(json.dumps(dict(twin.config) | {"_class_name": config["_class_name"]}))
    )
    assert_same(back, unet.state_dict())
    again = UNet(**arguments).eval()
    again.load_state_dict(back)
    torch.testing.assert_close(again(x, t, context, y), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_plain_attention_unet_equals_its_diffusers_twin() -> None:
    from diffusers import UNet2DModel

    unet = randomised(UNet(**PLAIN, image_size=8))
    weights, config = unet_to_diffusers(unet.state_dict(), unet.config)
    twin = UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}).eval()
    twin.load_state_dict(weights)
    x, t, _ = latents()
    torch.testing.assert_close(unet(x, t), twin(x, t).sample, rtol=1e-4, atol=1e-4)
    back, arguments = unet_from_diffusers(weights, dict(twin.config) | {"_class_name": "UNet2DModel"})
    assert_same(back, unet.state_dict())
    assert {**UNet(**arguments).config, "dropout": 0.0} == {**unet.config, "dropout": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resblock_updown": True}, "resblock_updown"),
        ({"num_head_channels": -1, "num_heads": 4}, "one head width"),
        ({"model_channels": 48, "num_head_channels": 48}, "multiples of 32"),
    ],
)
def test_unets_that_diffusers_lacks_are_named(change: dict[str, Any], message: str) -> None:
    unet = UNet(**{**PLAIN, **change})
    with pytest.raises(UserError, match=message):
        unet_to_diffusers(unet.state_dict(), unet.config)


def test_unet_without_known_heads_is_refused() -> None:
    with pytest.raises(UserError, match="attention heads"):
        unet_to_diffusers(UNet(**PLAIN).state_dict(), {})


@pytest.mark.parametrize(
    "options", [PLAIN, CROSS, {**PLAIN, "resblock_updown": True, "num_res_blocks": 2, "num_classes": 4}]
)
def test_unet_architecture_is_read_off_its_weights(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet(**options)
        inferred = infer_unet_config(unet.state_dict(), num_head_channels=options["num_head_channels"])
        assert {**unet.config, **inferred} == unet.config


@pytest.mark.parametrize("attention", ["levels and middle", "none"])
@pytest.mark.parametrize("kind", ["kl", "vq"])
@torch.no_grad()
def test_first_stage_equals_its_diffusers_twin(kind: str, attention: str) -> None:
    import diffusers

    ddconfig = {**DDCONFIG, "double_z": kind == "kl"}
    if attention == "none":
        ddconfig |= {"attn_type": "none", "attn_resolutions": []}
    ours = randomised(AutoencoderKL(ddconfig, 3) if kind == "kl" else VQModel(ddconfig, 3, 20))
    weights, config = first_stage_to_diffusers(ours.state_dict(), 0.5, 32)
    twin_class = getattr(diffusers, config.pop("_class_name"))
    twin = twin_class(**config).eval()
    twin.load_state_dict(weights)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    z = torch.randn(1, 3, 8, 8)
    if kind == "kl":
        torch.testing.assert_close(ours.encode(x).mode(), twin.encode(x).latent_dist.mode(), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(ours.encode_latent(x), twin.encode(x).latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.decode_latent(z), twin.decode(z).sample, rtol=1e-4, atol=1e-4)
    back, described = first_stage_from_diffusers(weights, dict(twin.config) | {"_class_name": twin_class.__name__})
    assert_same(back, ours.state_dict())
    assert described["ddconfig"] == ddconfig
    assert described["scale_factor"] == 0.5


def test_first_stage_names_before_diffusers_0_18_load_too() -> None:
    ours = AutoencoderKL(DDCONFIG, 3)
    weights, config = first_stage_to_diffusers(ours.state_dict(), 1.0, 32)
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in weights.items():
        for new_name, old_name in renames.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = value
    assert any("proj_attn" in key for key in old)
    assert_same(first_stage_from_diffusers(old, config)[0], dict(ours.state_dict()))


@torch.no_grad()
def test_text_encoder_equals_diffusers_ldm_bert() -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    tau = randomised(TransformerEmbedder(32, 2, vocab_size=50, max_seq_len=9, logits_head=True))
    weights, config = text_encoder_to_diffusers(tau.state_dict())
    twin = LDMBertModel(LDMBertConfig(**config)).eval()
    twin.load_state_dict(weights)
    tokens = torch.randint(0, 50, (2, 9))
    states = twin.model(tokens, return_dict=True).last_hidden_state if hasattr(twin, "model") else twin(tokens)[0]
    torch.testing.assert_close(tau(tokens), states, rtol=1e-4, atol=1e-4)
    back, arguments = text_encoder_from_diffusers(weights, config)
    headless = TransformerEmbedder(**{k: v for k, v in arguments.items() if k != "kind"})
    headless.load_state_dict(back)
    torch.testing.assert_close(headless.eval()(tokens), tau(tokens))


def whole_model() -> tuple[Checkpoint, ConditionedUNet]:
    wrapper = randomised(ConditionedUNet(UNet(**CROSS, image_size=8), "crossattn"))
    first_stage = randomised(AutoencoderKL(DDCONFIG, 3))
    tau = randomised(TransformerEmbedder(24, 1, vocab_size=40, max_seq_len=6))
    parts = {"unet": wrapper.diffusion_model, "first_stage": first_stage, "conditioner": tau}
    config = {
        "unet": wrapper.diffusion_model.config,
        "first_stage": infer_first_stage_config(first_stage.state_dict(), 32),
        "schedule": {"linear_start": 0.0015, "linear_end": 0.0195},
        "scale_factor": 0.25,
    }
    return Checkpoint({k: dict(v.state_dict()) for k, v in parts.items()}, config), wrapper


def test_every_home_gives_back_the_same_weights(tmp_path: Path) -> None:
    model, _ = whole_model()
    save_ours(model, tmp_path / "a.safetensors")
    save_compvis(load_ours(tmp_path / "a.safetensors"), tmp_path / "b.ckpt")
    compvis = load_compvis(tmp_path / "b.ckpt")
    compvis.config |= model.config  # a .ckpt does not tell the heads
    save_diffusers(compvis, tmp_path / "c")
    back = load_diffusers(tmp_path / "c")
    assert back.parts.keys() == model.parts.keys()
    for part, weights in model.parts.items():
        assert_same(back.parts[part], weights)
    assert back.config["scale_factor"] == 0.25
    assert back.config["schedule"]["linear_end"] == 0.0195
    assert_same(dict(unet_from_diffusers_dir(tmp_path / "c").state_dict()), model.parts["unet"])
    assert_same(dict(autoencoder_from_diffusers_dir(tmp_path / "c").state_dict()), model.parts["first_stage"])


def official(model: Checkpoint, wrapper: ConditionedUNet) -> dict[str, Tensor]:
    """A state dict as the authors' trainer leaves it: averaged weights under names without dots, tables, a loss."""
    state = {f"model.{k}": v for k, v in wrapper.state_dict().items()}
    state |= {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in wrapper.state_dict().items()}
    state |= {f"first_stage_model.{k}": v for k, v in model.parts["first_stage"].items()}
    state |= {"first_stage_model.loss.logvar": torch.zeros(()), "betas": torch.zeros(1000)}
    return state | {"model_ema.decay": torch.tensor(0.9999), "scale_factor": torch.tensor(0.18215)}


def test_averaged_weights_are_taken_unless_refused(tmp_path: Path) -> None:
    model, wrapper = whole_model()
    torch.save({"state_dict": official(model, wrapper)}, tmp_path / "model.ckpt")
    found = load_compvis(tmp_path / "model.ckpt")
    trained = load_compvis(tmp_path / "model.ckpt", ema=False)
    assert found.parts.keys() == {"unet", "first_stage"}
    assert_same(trained.parts["unet"], model.parts["unet"])
    assert_same(found.parts["unet"], {k: v + 1 for k, v in model.parts["unet"].items()})
    assert_same(found.parts["first_stage"], model.parts["first_stage"])
    assert found.config["scale_factor"] == pytest.approx(0.18215)


class ModelCheckpoint:
    """Looks like Lightning's callback in the file below."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
ModelCheckpoint.__qualname__ = "ModelCheckpoint"


class Foreign:
    """Any other object whose class the file names."""


def test_callbacks_of_the_trainer_are_skipped_without_running_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    model, wrapper = whole_model()
    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, ModelCheckpoint.__module__, module)
        content = {"state_dict": official(model, wrapper), "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}}}
        torch.save(content, tmp_path / "model.ckpt")
    monkeypatch.setattr(ModelCheckpoint, "__init__", lambda self: pytest.fail("code of the checkpoint ran"))
    assert_same(load_compvis(tmp_path / "model.ckpt", ema=False).parts["unet"], model.parts["unet"])


def test_other_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.diffusion_model.a": torch.zeros(1)}, "extra": Foreign()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="pickled Python objects"):
        load_compvis(tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_truncated_checkpoints_are_refused(tmp_path: Path, name: str) -> None:
    model, _ = whole_model()
    (save_compvis if name.endswith("ckpt") else save_ours)(model, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_compvis(tmp_path / name)


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"layer1.weight": torch.zeros(1)}}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"no latent diffusion model.*layer1\.weight"):
        load_compvis(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no such file"):
        load_compvis(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="no unet"):
        load_diffusers(tmp_path)


def test_command_line_converts_and_explains_a_wrong_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, wrapper = whole_model()
    torch.save({"state_dict": official(model, wrapper)}, tmp_path / "model.ckpt")
    params: dict[str, Any] = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "unet_config": {"params": dict(CROSS)},
        "first_stage_config": {"params": {"embed_dim": 3, "ddconfig": DDCONFIG}},
    }
    config, source, out = tmp_path / "theirs.yaml", tmp_path / "model.ckpt", tmp_path / "out"
    command = ["--from", "compvis", "--to", "diffusers", "--config", str(config), str(source), str(out)]
    config.write_text(yaml.safe_dump({"model": {"params": params}}))
    run_main(lambda: main(command))
    assert_same(load_diffusers(out).parts["unet"], {k: v + 1 for k, v in model.parts["unet"].items()})
    params["unet_config"]["params"]["num_res_blocks"] = 2
    config.write_text(yaml.safe_dump({"model": {"params": params}}))
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main(command))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: the checkpoint does not fit {config}: it ")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_stock_pipeline_draws_what_our_networks_draw(tmp_path: Path, prediction: str) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=6,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=64,
            max_position_embeddings=6,
        ),
        add_pooling_layer=False,
    ).eval()
    unet = randomised(UNet(**{**CROSS, "channel_mult": [1, 2], "attention_resolutions": [2], "context_dim": 32}))
    first_stage = randomised(AutoencoderKL({**DDCONFIG, "ch_mult": [1, 1]}, 3))
    tokenizer = word_tokenizer(
        "[PAD] [UNK] a red blue circle", pad_token="[PAD]", unk_token="[UNK]", model_max_length=6
    )
    folder = write_pipeline(
        tmp_path / "pipeline",
        unet,
        first_stage,
        bert,
        tokenizer,
        beta_start=0.0015,
        beta_end=0.0195,
        sample_size=8,
        scaling_factor=0.5,
        prediction=prediction,
    )
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusionPipeline
    noise = torch.randn(1, 3, 8, 8)
    image = pipeline("a red circle", num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="pt").images

    for module in (unet, first_stage, bert):  # the files hold half precision
        module.half().float()
    tokens = tokenizer(["", "a red circle"], padding="max_length", return_tensors="pt").input_ids
    context = bert(tokens).last_hidden_state
    abar = (1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()
    z = noise
    for t in (751, 501, 251, 1):
        null, conditional = unet(z.expand(2, -1, -1, -1), torch.full((2,), t), context).chunk(2)
        output = null + 2.0 * (conditional - null)
        a, previous = abar[t], abar[t - 250] if t > 250 else abar[0]
        if prediction == "epsilon":
            x0, eps = (z - (1 - a).sqrt() * output) / a.sqrt(), output
        else:
            x0, eps = a.sqrt() * z - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * z
        z = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
    expected = (first_stage.decode(z / 0.5) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.05
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)
    assert (image != pipeline("a blue circle", num_inference_steps=4, latents=noise, output_type="pt").images).any()


def test_rewriting_a_pipeline_keeps_the_folders_other_files(tmp_path: Path) -> None:
    model, _ = whole_model()
    save_diffusers(model, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("card")
    save_diffusers(model, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
