"""Checks of the recorded cases that concern the second stage's networks, conditioners and the diffusers layout."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.conditioners import LayoutTokenizer, SpatialRescaler, TransformerEmbedder, layout_tokens, retrieve
from ldm.layouts import (
    first_stage_from_diffusers,
    first_stage_to_diffusers,
    infer_unet_config,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ldm.model import BasicTransformerBlock, ConditionedUNet, CrossAttention, SpatialTransformer
from ldm.official import TRANSFORMER_ONLY, autoencoder_of, classifier_of, unet_of, without_only
from tests.golden_case import Case, Check, assert_close, assert_timed_close, kind, load


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


@torch.no_grad()
def check_unet(case: Case) -> None:
    net = unet_of(_without(case.config, "params"))
    load(net, case).eval()
    given, expected = case.group("in"), case.group("out")
    for name in (name for name in given if name.startswith("x")):
        eps = f"eps{name.removeprefix('x')}"
        compute = partial(net, given[name], given["t"], given.get("context"), given.get("y"))
        assert_timed_close(compute, expected[eps], eps)


TRANSFORMER_PARTS = (SpatialTransformer, BasicTransformerBlock, CrossAttention)
# The authors' names for the options of BasicTransformerBlock.
BLOCK_NAMES = {"n_heads": "heads", "d_head": "dim_head"}


@torch.no_grad()
def check_spatial_transformer(case: Case) -> None:
    options = without_only(_without(case.config, "params", "class"), TRANSFORMER_ONLY, case.stem)
    block = next(cls for cls in TRANSFORMER_PARTS if case.source.endswith(cls.__name__))
    if block is not SpatialTransformer:
        options = {BLOCK_NAMES.get(name, name): value for name, value in options.items()}
    if block is CrossAttention:
        options = {"context_dim": None, "heads": 8, "dim_head": 64, **options}
    elif block is BasicTransformerBlock:
        options = {"context_dim": None, **options}
    net = block(**options)
    load(net, case).eval()
    given, expected = case.group("in"), case.group("out")
    recorded = expected["y"] if "y" in expected else expected["x"]
    assert_close(net(given["x"], given.get("context")), recorded, "y")


def check_classifier(case: Case) -> None:
    net = classifier_of(_without(case.config, "params"))
    load(net, case).eval()
    given, expected = case.group("in"), case.group("out")
    x_BCHW = given["x"].requires_grad_()
    logits = net(x_BCHW, given["t"])
    assert_close(logits, expected["logits"], "logits")
    log_p = logits.log_softmax(dim=1).gather(1, given["y"][:, None]).sum()
    (gradient,) = torch.autograd.grad(log_p, x_BCHW)
    assert_close(gradient, expected["grad_x_logp_y"], "grad_x_logp_y", 1e-5)


def _numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """`name` or `name_0`, `name_1`, ... in order."""
    found = [key for key in tensors if key == name or key.startswith(f"{name}_")]
    return [tensors[key] for key in sorted(found, key=lambda key: int(key.removeprefix(name).strip("_") or 0))]


@torch.no_grad()
def check_wrapper(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")["eps"]
    weights = {k.removeprefix("diffusion_model."): v for k, v in case.group("param").items()}
    recorded = case.config.get("unet_config", {})
    recorded = recorded.get("params", recorded)
    # The case does not record the head count, which is not in the weights: one of the usual layouts must reproduce it.
    layouts = [(2, -1), (1, -1), (4, -1), (8, -1), (-1, 8), (-1, 16), (-1, 32)]
    errors = []
    for heads, width in layouts if not recorded else [(-1, -1)]:
        try:
            net = unet_of(recorded or infer_unet_config(weights, heads, width))
        except (ValueError, ZeroDivisionError):
            continue
        wrapper = ConditionedUNet(net, case.config["conditioning_key"]).eval()
        wrapper.load_state_dict(case.group("param"))
        tokens = _numbered(given, "c_crossattn") or _numbered(given, "y")
        result = wrapper(given["x"], given["t"], c_concat=_numbered(given, "c_concat"), c_crossattn=tokens)
        errors.append((float((result - expected).abs().max()), result))
    assert_close(min(errors, key=lambda pair: pair[0])[1], expected, "eps")


@torch.no_grad()
def check_text_encoder(case: Case) -> None:
    net = TransformerEmbedder(**_without(case.config, "params"))
    load(net, case).eval()
    assert_close(net(case.group("in")["tokens"]), case.group("out")["context"], "context")


@torch.no_grad()
def check_spatial_rescaler(case: Case) -> None:
    net = SpatialRescaler(**_without(case.config, "params"))
    load(net, case).eval()
    assert_close(net(case.group("in")["x"]), case.group("out")["y"], "y")


def check_layout_tokens(case: Case) -> None:
    options = case.config["config"]
    tokenizer = LayoutTokenizer(
        n_categories=options["no_object_classes"],
        max_objects=options["no_max_objects"],
        no_tokens=options["no_tokens"],
        encode_crop=options["encode_crop"],
        use_group_parameter=options["use_group_parameter"],
        use_additional_parameters=options["use_additional_parameters"],
    )
    for i, item in enumerate(case.config["cases"]):
        crop = item["crop"] and tuple(item["crop"])
        assert layout_tokens(item["annotations"], tokenizer, crop, item["flip"]) == item["tokens"], f"layout {i}"


def check_retrieval(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    for chunk in (len(given["database"]), 7):
        found = retrieve(given["query"], given["database"], case.config["k"], chunk)
        assert_close(found.neighbours, expected["neighbours"], "neighbours")
        assert_close(found.embeddings, expected["nn_embeddings"], "nn_embeddings")
        assert_close(found.context, expected["context"], "context")
        assert_close(found.uncond_context, expected["uncond_context"], "uncond_context")


def _assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def _levels(weights: dict[str, Tensor], path: str) -> list[str]:
    return sorted({key.split(".")[1] for key in weights if key.startswith(path)}, key=int)


def _recorded_unet_config(case: Case) -> dict[str, Any]:
    """A diffusers config.json from what the case records (widths, heads, context) and its parameter names."""
    weights, config = case.group("param"), case.config
    down = [f"down_blocks.{i}." for i in _levels(weights, "down_blocks.")]
    attends = [any(key.startswith(level + "attentions.") for key in weights) for level in down]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": weights["conv_in.weight"].shape[1],
        "out_channels": weights["conv_out.weight"].shape[0],
        "block_out_channels": [m * config["model_channels"] for m in config["channel_mult"]],
        "layers_per_block": len({k.split(".")[3] for k in weights if k.startswith("down_blocks.0.resnets.")}),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": config["num_heads"],
        "cross_attention_dim": config["context_dim"],
        "transformer_layers_per_block": len(
            {k.split(".")[4] for k in weights if k.startswith("mid_block.attentions.0.transformer_blocks.")}
        ),
    }


@torch.no_grad()
def check_diffusers_unet(case: Case) -> None:
    weights, given, expected = case.group("param"), case.group("in"), case.group("out")
    state, config = unet_from_diffusers(weights, _recorded_unet_config(case))
    net = unet_of(config).eval()
    net.load_state_dict(state)
    result = net(given["sample"], given["timestep"], given["encoder_hidden_states"])
    assert_close(result, expected["sample"], "sample")
    assert_close(result, expected["official"], "official")
    back, their_config = unet_to_diffusers(net.state_dict(), net.config)
    _assert_same_state(back, weights)
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(**_without(their_config, "_class_name")).eval()
    theirs.load_state_dict(back)
    sample = theirs(given["sample"], given["timestep"], given["encoder_hidden_states"]).sample
    assert_close(sample, expected["sample"], "sample of the exported network")


@torch.no_grad()
def check_diffusers_autoencoder_kl(case: Case) -> None:
    weights, expected = case.group("param"), case.group("out")
    state, config = first_stage_from_diffusers(weights, case.config)
    net = autoencoder_of(config["ddconfig"], config["embed_dim"]).eval()
    assert isinstance(net, AutoencoderKL)
    net.load_state_dict(state)
    latent = net.encode(case.group("in")["x"]).mode()
    for name in ("latent", "official_latent"):
        assert_close(latent, expected[name], name)
    for name in ("rec", "official_rec"):
        assert_close(net.decode(expected[name.replace("rec", "latent")]), expected[name], name)
    back, their_config = first_stage_to_diffusers(net.state_dict(), config["scale_factor"], case.config["sample_size"])
    _assert_same_state(back, weights)
    for key, value in their_config.items():
        assert key == "_class_name" or case.config[key] == value, key


@torch.no_grad()
def check_diffusers_vq(case: Case) -> None:
    """diffusers' VQModel as a first stage: latents before the quantiser, codes, and what is decoded from them."""
    weights, given, expected = case.group("param"), case.group("in"), dict(case.group("out"))
    state, config = first_stage_from_diffusers(weights, {"_class_name": "VQModel", **case.config})
    net = autoencoder_of(
        config["ddconfig"], config["embed_dim"], config["n_embed"], norm_groups=config["norm_groups"]
    ).eval()
    assert isinstance(net, VQModel)
    net.load_state_dict(state)
    x_BCHW = given.get("x", given.get("sample"))
    assert x_BCHW is not None, "the case has no picture in/x"
    latent = net.moments(x_BCHW)
    quantized = net.quantize(latent)
    found = {
        **dict.fromkeys(("latent", "latents", "prequant"), latent),
        **dict.fromkeys(("quant", "quantized"), quantized.z),
        "indices": quantized.indices.flatten(),
        **dict.fromkeys(("commit_loss", "codebook_loss"), quantized.loss),
        **dict.fromkeys(("rec", "sample"), net.decode_latent(latent)),
        **dict.fromkeys(("rec_not_quantized", "decode_not_quantized"), net.decode(latent)),
    }
    for name, value in expected.items():
        what = name.removeprefix("official_")
        assert what in found, f"output {name} is not known; known are {', '.join(found)}"
        assert_close(found[what].reshape(value.shape), value, name)
    back, their_config = first_stage_to_diffusers(
        net.state_dict(), config["scale_factor"], case.config.get("sample_size", 256), config["norm_groups"]
    )
    _assert_same_state(back, weights)
    for key, value in their_config.items():
        assert key == "_class_name" or case.config.get(key, value) in (value, None), key


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@lru_cache(maxsize=64)
def _counts(config_json: str, tokens: int) -> tuple[int, int]:
    config = json.loads(config_json)
    with torch.device("meta"), torch.no_grad():
        net = unet_of(config).eval()
        x_BCHW = torch.empty(1, config["in_channels"], config["image_size"], config["image_size"])
        context = torch.empty(1, tokens, config["context_dim"]) if config.get("context_dim") else None
        with FlopCounterMode(display=False) as counter:
            net(x_BCHW, torch.zeros(1), context)
    return _parameters(net), counter.get_total_flops()


def forward_flop(config: dict[str, Any], tokens: int = 77) -> tuple[int, int]:
    """(parameters, forward FLOP of one image) of a U-Net on the meta device; 2 FLOP per multiply-add."""
    return _counts(json.dumps(config, sort_keys=True), tokens)


# Size of tau in the published configurations (their cond_stage_config), by the part of the file name that tells them.
TAU = {
    "txt2img-1p4B": {"n_embed": 1280, "n_layer": 32, "vocab_size": 30522, "max_seq_len": 77},
    "text2img256": {"n_embed": 640, "n_layer": 32, "vocab_size": 30522, "max_seq_len": 77},
    "layout2img-openimages256": {"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92},
}


def check_full_scale_counts(case: Case) -> None:
    from tests.ldm.golden_first_stage import check_first_stage_counts

    for entry in case.config["unet"]:
        parameters, flop = forward_flop(entry["unet_config"])
        assert parameters == entry["unet_params"], entry["config"]
        assert flop == entry["unet_forward_flop"], entry["config"]
        if "tau_params_without_to_logits" in entry:
            options = next(options for name, options in TAU.items() if name in entry["config"])
            with torch.device("meta"):
                assert _parameters(TransformerEmbedder(**options)) == entry["tau_params_without_to_logits"]
                full = TransformerEmbedder(**options, logits_head=True)
            assert _parameters(full) == entry["tau_params_incl_unused_to_logits"], entry["config"]
    check_first_stage_counts(case)


CHECKS: list[Check] = [
    Check("unet", kind("unet", "openaimodel.py:UNetModel"), check_unet),
    Check(
        "spatial_transformer",
        lambda case: (
            case.source.rpartition("attention.py:")[2] in {part.__name__ for part in TRANSFORMER_PARTS}
            and "latent-diffusion" in case.source
        ),
        check_spatial_transformer,
    ),
    Check("classifier", kind("classifier", "openaimodel.py:EncoderUNetModel"), check_classifier),
    Check("wrapper", kind("wrapper", "ddpm.py:DiffusionWrapper"), check_wrapper),
    Check("text_encoder", kind("text_encoder", "BERTEmbedder"), check_text_encoder),
    Check("spatial_rescaler", kind("spatial_rescaler", "modules.py:SpatialRescaler"), check_spatial_rescaler),
    Check("layout_tokens", kind("layout_tokens", "objects_bbox.py"), check_layout_tokens),
    Check("retrieval", kind("retrieval", "knn2img.py:Searcher"), check_retrieval),
    Check("diffusers_unet", kind("diffusers_unet", "UNet2DConditionModel"), check_diffusers_unet),
    Check(
        "diffusers_autoencoder_kl", kind("diffusers_autoencoder_kl", "AutoencoderKL"), check_diffusers_autoencoder_kl
    ),
    Check(
        "diffusers_vq",
        lambda case: case.stem.startswith("diffusers_") and " VQModel" in case.source,
        check_diffusers_vq,
    ),
    Check("full_scale_counts", lambda case: case.stem.startswith("full_scale_counts"), check_full_scale_counts),
]
