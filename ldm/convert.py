"""Checkpoints of latent diffusion models between three homes, both ways, exactly.

    python ldm/convert.py --from compvis   --to ours      model.ckpt model.safetensors
    python ldm/convert.py --from compvis   --to diffusers model.ckpt folder/           --config the-authors.yaml
    python ldm/convert.py --from diffusers --to ours      folder/    model.safetensors
    python ldm/convert.py --from ours      --to compvis   model.safetensors model.ckpt

compvis    the authors' `.ckpt`: model.diffusion_model.*, first_stage_model.*, cond_stage_model.*, model_ema.*
ours       one .safetensors with the same names, averaged weights in place, and the architecture as JSON in its header
diffusers  a folder with unet/, vae/ or vqvae/, bert/ (the paper's tau as LDMBertModel) and scheduler/

`--config` (a file of ldm/configs/paper or one of the authors' YAMLs) is needed to go from a `.ckpt` to diffusers: the
number of attention heads is not in the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError, run_main
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.model import UNet
from ldm.norm import group_count
from ldm.official import autoencoder_of, unet_of

StateDict = dict[str, Tensor]
Names = list[tuple[str, str]]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "conditioner": "cond_stage_model.",
}


# Layout version that exported configs declare (the pinned diffusers).
_DIFFUSERS_VERSION = "0.42.1"


@dataclass
class Checkpoint:
    """Weights in the authors' names by part (unet, first_stage, conditioner), and what is known of the architecture."""

    parts: dict[str, StateDict] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def _rename(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]], what: str) -> StateDict:
    """Replace the longest known module prefix of every key; unknown keys are an error."""
    table = dict(names)
    renamed: StateDict = {}
    for key, value in state.items():
        prefix = key
        while prefix not in table and "." in prefix:
            prefix = prefix.rpartition(".")[0]
        if prefix not in table:
            raise UserError(f'{what}: no counterpart for the weight "{key}"')
        renamed[table[prefix] + key[len(prefix) :]] = value
    return renamed


def _swap(names: Names) -> Names:
    return [(theirs, ours) for ours, theirs in names]


def _nested(ours: str, theirs: str, names: Names) -> Names:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in names]


def _single_group_count(widths: Iterable[int], what: str, most: int = 32) -> int:
    groups = {group_count(width, most) for width in widths}
    if len(groups) != 1:
        raise UserError(
            f"{what}: its GroupNorms use {sorted(groups)} groups, diffusers has one number for all; "
            "use widths that are multiples of 32"
        )
    return groups.pop()


_RES_NAMES: Names = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
# The plain AttentionBlock; its fused `qkv` is split and merged separately.
_ATTENTION_NAMES: Names = [
    ("norm", "group_norm"),
    ("to_q", "to_q"),
    ("to_k", "to_k"),
    ("to_v", "to_v"),
    ("proj_out", "to_out.0"),
]


def infer_unet_config(state: Mapping[str, Tensor], num_heads: int = -1, num_head_channels: int = -1) -> dict[str, Any]:
    """Arguments of `UNet` that fit a state dict in the authors' names; the heads are not in the weights.

    Raises:
        UserError: the state dict is not that of a U-Net.
    """
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight", "output_blocks.0.0.in_layers.0.weight")
    for key in needed:
        if key not in state:
            raise UserError(f'not a latent diffusion U-Net: "{key}" is missing')
    model_channels = state["time_embed.0.weight"].shape[1]
    # The up path tells the levels apart: an up-sampling layer ends each but the finest.
    mults: list[int] = []
    attends: list[bool] = []
    blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"output_blocks\.(\d+)\.", key)))
    per_level = updown = 0
    new_level = True
    for i in range(blocks):
        width = state[f"output_blocks.{i}.0.out_layers.3.weight"].shape[0]
        if new_level:
            mults.append(width // model_channels)
            attends.append(f"output_blocks.{i}.1.norm.weight" in state)
        new_level = False
        for j in (1, 2):
            resnet = f"output_blocks.{i}.{j}.in_layers.0.weight" in state
            if resnet or f"output_blocks.{i}.{j}.conv.weight" in state:
                new_level, updown = True, updown or int(resnet)
                per_level = per_level or i + 1
    per_level = per_level or blocks
    mults.reverse()
    attends.reverse()
    spatial = "middle_block.1.proj_in.weight" in state
    context_dims = {v.shape[1] for k, v in state.items() if k.endswith("attn2.to_k.weight")}
    depth = len({k.split(".")[3] for k in state if k.startswith("middle_block.1.transformer_blocks.")})
    first = "output_blocks.0.0."
    emb_rows = state[f"{first}emb_layers.1.weight"].shape[0]
    labels = state.get("label_emb.weight")
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "model_channels": model_channels,
        "out_channels": state["out.2.weight"].shape[0],
        "num_res_blocks": per_level - 1,
        "attention_resolutions": [2**i for i, attend in enumerate(attends) if attend],
        "channel_mult": mults,
        "num_heads": num_heads,
        "num_head_channels": num_head_channels,
        "use_scale_shift_norm": emb_rows == 2 * state[f"{first}in_layers.2.weight"].shape[0],
        "resblock_updown": bool(updown),
        "use_spatial_transformer": spatial,
        "transformer_depth": depth if spatial else 1,
        # Widths that differ between levels are self-attention's own: there is no context.
        "context_dim": context_dims.pop() if len(context_dims) == 1 else None,
        "num_classes": None if labels is None else labels.shape[0],
    }


def _unet_names(config: Mapping[str, Any]) -> tuple[Names, Names]:
    """(authors' module, diffusers' module) for everything but plain attention, and for the plain attention blocks."""
    names: Names = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb", "class_embedding"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
        *_nested("middle_block.0", "mid_block.resnets.0", _RES_NAMES),
        *_nested("middle_block.2", "mid_block.resnets.1", _RES_NAMES),
    ]
    attentions: Names = [("middle_block.1", "mid_block.attentions.0")]
    levels, depth = len(config["channel_mult"]), config["num_res_blocks"]
    n = 1
    for i in range(levels):
        for j in range(depth):
            names += _nested(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", _RES_NAMES)
            if 2**i in config["attention_resolutions"]:
                attentions.append((f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}"))
            n += 1
        if i < levels - 1:
            names.append((f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
            n += 1
    n = 0
    for i in range(levels):
        attends = 2 ** (levels - 1 - i) in config["attention_resolutions"]
        for j in range(depth + 1):
            names += _nested(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", _RES_NAMES)
            if attends:
                attentions.append((f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}"))
            if j == depth and i < levels - 1:
                names.append((f"output_blocks.{n}.{2 if attends else 1}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
            n += 1
    if config["use_spatial_transformer"]:
        return names + attentions, []
    return names, attentions


def _heads_at(config: Mapping[str, Any], width: int) -> int:
    if config.get("num_head_channels", -1) != -1:
        return width // config["num_head_channels"]
    return config["num_heads"]


def _attention_widths(config: Mapping[str, Any]) -> list[int]:
    """Widths of the levels that attend, and of the middle."""
    widths = [m * config["model_channels"] for m in config["channel_mult"]]
    return [w for i, w in enumerate(widths) if 2**i in config["attention_resolutions"]] + [widths[-1]]


def unet_to_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[StateDict, dict[str, Any]]:
    """Weights and config.json of the diffusers network that computes the same function.

    Cross-attention networks become UNet2DConditionModel, the others UNet2DModel.

    Args:
        config: arguments of `UNet` (or unet_config.params of the authors' YAML).

    Raises:
        UserError: diffusers has no such network (named in the message).
    """
    if config.get("num_heads", -1) == -1 and config.get("num_head_channels", -1) == -1:
        raise UserError(
            "the number of attention heads is not in the weights: give the model's configuration (--config)"
        )
    config = {**infer_unet_config(state), **config}
    if config.get("resblock_updown"):
        raise UserError("diffusers' U-Nets have no counterpart of resblock_updown with these weights; keep --to ours")
    norm_keys = (".in_layers.0.weight", ".out_layers.0.weight", "out.0.weight", ".1.norm.weight")
    norm_widths = (len(v) for k, v in state.items() if k.endswith(norm_keys))
    groups = _single_group_count(norm_widths, "U-Net", config.get("norm_groups", 32))
    widths = [m * config["model_channels"] for m in config["channel_mult"]]
    if widths[0] != config["model_channels"]:
        raise UserError(f"diffusers needs channel_mult to begin with 1, got {config['channel_mult']}")
    attends = [2**i in config["attention_resolutions"] for i in range(len(widths))]
    spatial = config["use_spatial_transformer"]
    names, plain = _unet_names(config)
    theirs: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if spatial else "UNet2DModel",
        "sample_size": config.get("image_size"),
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": config["num_res_blocks"],
        "dropout": config.get("dropout", 0.0),
        "norm_num_groups": groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "act_fn": "silu",
        "num_class_embeds": config["num_classes"],
        "resnet_time_scale_shift": "scale_shift" if config["use_scale_shift_norm"] else "default",
    }
    if spatial:
        if config["context_dim"] is None:
            raise UserError("UNet2DConditionModel needs cross-attention; this U-Net's transformers have no context")
        heads = [_heads_at(config, width) if attend else 1 for width, attend in zip(widths, attends)]
        heads[-1] = _heads_at(config, widths[-1])
        for width, n in zip(widths, heads):
            if width % n:
                raise UserError(f"diffusers needs heads that divide the width, got {n} heads at width {width}")
        cross = "CrossAttn{}Block2D"
        theirs |= {
            "down_block_types": [cross.format("Down") if a else "DownBlock2D" for a in attends],
            "up_block_types": [cross.format("Up") if a else "UpBlock2D" for a in reversed(attends)],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "cross_attention_dim": config["context_dim"],
            "transformer_layers_per_block": config["transformer_depth"],
            # For UNet2DConditionModel "attention_head_dim" is the NUMBER of heads (a historical misnomer).
            "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
            "use_linear_projection": False,
        }
        return _rename(state, names, "U-Net"), theirs
    head_widths = {width // _heads_at(config, width) for width in _attention_widths(config)}
    if len(head_widths) != 1:
        raise UserError(
            f"UNet2DModel has one head width for all levels, this U-Net has {sorted(head_widths)}; keep --to ours"
        )
    theirs |= {
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": head_widths.pop(),
        "time_embedding_type": "positional",
        "center_input_sample": False,
    }
    split: StateDict = dict(state)
    for ours, _ in plain:
        heads_here = _heads_at(config, split[f"{ours}.norm.weight"].shape[0])
        for kind in ("weight", "bias"):
            # Rows go head by head, (q, k, v) inside each head.
            qkv = split.pop(f"{ours}.qkv.{kind}")
            qkv = qkv.flatten(1) if kind == "weight" else qkv
            for name, part in zip(("to_q", "to_k", "to_v"), qkv.unflatten(0, (heads_here, 3, -1)).unbind(1)):
                split[f"{ours}.{name}.{kind}"] = part.flatten(0, 1).contiguous()
        split[f"{ours}.proj_out.weight"] = split[f"{ours}.proj_out.weight"].flatten(1)
    for ours, other in plain:
        names += _nested(ours, other, _ATTENTION_NAMES)
    return _rename(split, names, "U-Net"), theirs


_UNET_MUST_BE: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "downsample_type": ("conv",),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "norm_eps": (1e-5,),
    "only_cross_attention": (False,),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upsample_type": ("conv",),
    "add_attention": (True,),
}


def unet_from_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[StateDict, dict[str, Any]]:
    """Weights in the authors' names and the arguments of `UNet`, from a diffusers U-Net's weights and config.json."""
    kind = config.get("_class_name", "UNet2DConditionModel")
    spatial = kind == "UNet2DConditionModel"
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise UserError(f"unet/config.json: class {kind}; expected UNet2DConditionModel or UNet2DModel")
    for key, allowed in _UNET_MUST_BE.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"unet/config.json: {key}={config[key]!r} is not a latent diffusion U-Net (needs {allowed[0]!r})"
            )
    widths = list(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    depths = config.get("transformer_layers_per_block", 1)
    layers, depths = (set(value) if isinstance(value, (list, tuple)) else {value} for value in (layers, depths))
    if len(layers) != 1 or len(depths) != 1 or any(width % widths[0] for width in widths):
        raise UserError(
            "unet/config.json: needs the same depth at every level and widths that are multiples of the first"
        )
    types = config["down_block_types"]
    attends = ["Attn" in name for name in types]
    if any(name not in ("DownBlock2D", "CrossAttnDownBlock2D" if spatial else "AttnDownBlock2D") for name in types):
        raise UserError(f"unet/config.json: block types {types} are not those of a latent diffusion U-Net")
    if ["Attn" in name for name in config["up_block_types"]] != attends[::-1]:
        raise UserError("unet/config.json: up_block_types must mirror down_block_types")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    ours: dict[str, Any] = {
        "in_channels": config["in_channels"],
        "model_channels": widths[0],
        "out_channels": config["out_channels"],
        "num_res_blocks": layers.pop(),
        "attention_resolutions": [2**i for i, attend in enumerate(attends) if attend],
        "channel_mult": [width // widths[0] for width in widths],
        "num_heads": -1,
        "num_head_channels": -1,
        "use_scale_shift_norm": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "use_spatial_transformer": spatial,
        "transformer_depth": depths.pop(),
        "context_dim": config.get("cross_attention_dim") if spatial else None,
        "num_classes": config.get("num_class_embeds"),
        "image_size": config.get("sample_size"),
        "dropout": config.get("dropout", 0.0),
    }
    if not spatial:
        ours["num_head_channels"] = heads if heads is not None else widths[-1]
    elif isinstance(heads, (list, tuple)):
        here = [(w, n) for w, n, a in zip(widths, heads, attends) if a] + [(widths[-1], heads[-1])]
        if len({n for _, n in here}) == 1:
            ours["num_heads"] = here[0][1]
        elif len({w / n for w, n in here}) == 1:
            ours["num_head_channels"] = here[0][0] // here[0][1]
        else:
            raise UserError(f"unet/config.json: heads {list(heads)} have neither one number nor one width")
    else:
        ours["num_heads"] = heads
    groups = ours["norm_groups"] = config.get("norm_num_groups", 32)
    names, plain = _unet_names(ours)
    for a, b in plain:
        names += _nested(a, b, _ATTENTION_NAMES)
    renamed = _rename(state, _swap(names), "U-Net")
    norm_keys = (".in_layers.0.weight", ".out_layers.0.weight", "out.0.weight", ".1.norm.weight")
    for key, value in renamed.items():
        if key.endswith(norm_keys) and len(value) % groups:
            raise UserError(f"unet/config.json: norm_num_groups={groups} does not divide the width {len(value)}")
        if key.endswith((".proj_in.weight", ".proj_out.weight")) and spatial and value.ndim == 2:
            renamed[key] = value[:, :, None, None]  # use_linear_projection
    for a, _ in plain:
        n = _heads_at(ours, renamed[f"{a}.norm.weight"].shape[0])
        for suffix in ("weight", "bias"):
            rows = [renamed.pop(f"{a}.{part}.{suffix}").unflatten(0, (n, -1)) for part in ("to_q", "to_k", "to_v")]
            qkv = torch.stack(rows, dim=1).flatten(0, 2)
            renamed[f"{a}.qkv.{suffix}"] = qkv[..., None] if suffix == "weight" else qkv
        renamed[f"{a}.proj_out.weight"] = renamed[f"{a}.proj_out.weight"][..., None]
    return renamed, ours


_FIRST_RES_NAMES: Names = [(n, n) for n in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")]
_FIRST_ATTENTION_NAMES: Names = [
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
]
# Names that diffusers used before 0.18; checkpoints on the hub still have them.
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def infer_first_stage_config(state: Mapping[str, Tensor], resolution: int = 256) -> dict[str, Any]:
    """{kind, ddconfig, embed_dim, n_embed} that fit a first stage's state dict in the authors' names.

    Args:
        resolution: nominal image side; only decides by which number attn_resolutions names a level.
    """
    for key in ("encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight"):
        if key not in state:
            raise UserError(f'not a first stage: "{key}" is missing')
    levels = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.down\.(\d+)\.", key)))
    blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))
    ch = state["encoder.conv_in.weight"].shape[0]
    codebook = state.get("quantize.embedding.weight")
    kind = "kl" if codebook is None else "vq"
    ddconfig: dict[str, Any] = {
        "double_z": kind == "kl",
        "z_channels": state["decoder.conv_in.weight"].shape[1],
        "resolution": resolution,
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_ch": state["decoder.conv_out.weight"].shape[0],
        "ch": ch,
        "ch_mult": [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)],
        "num_res_blocks": blocks,
        "attn_resolutions": [
            resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state
        ],
        "dropout": 0.0,
        "attn_type": "vanilla" if "encoder.mid.attn_1.norm.weight" in state else "none",
    }
    n_embed = None if codebook is None else codebook.shape[0]
    return {
        "kind": kind,
        "ddconfig": ddconfig,
        "embed_dim": state["post_quant_conv.weight"].shape[1],
        "n_embed": n_embed,
    }


def _first_stage_names(levels: int, blocks: int, attends: list[bool]) -> Names:
    names: Names = [(n, n) for n in ("quant_conv", "post_quant_conv", "quantize.embedding")]
    for half in ("encoder", "decoder"):
        names += [(f"{half}.conv_in",) * 2, (f"{half}.conv_out",) * 2, (f"{half}.norm_out", f"{half}.conv_norm_out")]
        middle = f"{half}.mid_block"
        names += _nested(f"{half}.mid.block_1", f"{middle}.resnets.0", _FIRST_RES_NAMES)
        names += _nested(f"{half}.mid.block_2", f"{middle}.resnets.1", _FIRST_RES_NAMES)
        names += _nested(f"{half}.mid.attn_1", f"{middle}.attentions.0", _FIRST_ATTENTION_NAMES)
        for i in range(levels):
            # The authors number the decoder's levels by resolution, diffusers in the order of execution.
            ours = f"encoder.down.{i}" if half == "encoder" else f"decoder.up.{i}"
            theirs = f"encoder.down_blocks.{i}" if half == "encoder" else f"decoder.up_blocks.{levels - 1 - i}"
            for j in range(blocks if half == "encoder" else blocks + 1):
                names += _nested(f"{ours}.block.{j}", f"{theirs}.resnets.{j}", _FIRST_RES_NAMES)
                if attends[i]:
                    names += _nested(f"{ours}.attn.{j}", f"{theirs}.attentions.{j}", _FIRST_ATTENTION_NAMES)
            names.append((f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv"))
            names.append((f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv"))
    return names


_FIRST_ATTENTION_WEIGHT = re.compile(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$")


def first_stage_to_diffusers(
    state: Mapping[str, Tensor], scale_factor: float = 1.0, resolution: int = 256, norm_groups: int = 32
) -> tuple[StateDict, dict[str, Any]]:
    """Weights and config.json of diffusers' AutoencoderKL or VQModel with the same function.

    Args:
        scale_factor: what the latents are multiplied by for diffusion (0.18215 for Stable Diffusion's).
    """
    config = infer_first_stage_config(state, resolution)
    ddconfig = config["ddconfig"]
    mults = ddconfig["ch_mult"]
    if mults[0] != 1:
        raise UserError(f"diffusers needs ch_mult to begin with 1, got {mults}")
    if config["kind"] == "kl" and config["embed_dim"] != ddconfig["z_channels"]:
        raise UserError("diffusers' AutoencoderKL needs embed_dim equal to z_channels")
    attends = [resolution // 2**i in ddconfig["attn_resolutions"] for i in range(len(mults))]
    widths = (len(v) for k, v in state.items() if re.search(r"norm\w*\.weight$", k))
    groups = _single_group_count(widths, "first stage", norm_groups)
    names = _first_stage_names(len(mults), ddconfig["num_res_blocks"], attends)
    flat = {k: v.flatten(1) if _FIRST_ATTENTION_WEIGHT.search(k) else v for k, v in state.items()}
    theirs: dict[str, Any] = {
        "_class_name": "AutoencoderKL" if config["kind"] == "kl" else "VQModel",
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": [m * ddconfig["ch"] for m in mults],
        "layers_per_block": ddconfig["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": ddconfig["z_channels"],
        "norm_num_groups": groups,
        "sample_size": resolution,
        "scaling_factor": scale_factor,
        "mid_block_add_attention": ddconfig["attn_type"] != "none",
    }
    if config["kind"] == "vq":
        theirs |= {"num_vq_embeddings": config["n_embed"], "vq_embed_dim": config["embed_dim"]}
    return _rename(flat, names, "first stage"), theirs


def first_stage_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[StateDict, dict[str, Any]]:
    """AutoencoderKL or VQModel as weights in the authors' names and {kind, ddconfig, embed_dim, n_embed, ...}."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise UserError(f"vae/config.json: class {kind}; expected AutoencoderKL or VQModel")
    for key in ("use_quant_conv", "use_post_quant_conv"):
        if config.get(key, True) is not True:
            raise UserError(f"vae/config.json: {key} is off, which the paper's first stage is not")
    if config.get("shift_factor") or config.get("latents_mean"):
        raise UserError("vae/config.json: latents that are shifted are not the paper's (expected only scaling_factor)")
    renamed_old = {}
    for key, value in state.items():
        head, _, tail = key.rpartition(".")
        module, _, leaf = head.rpartition(".")
        old = "attentions." in key and leaf in _OLD_ATTENTION_NAMES
        renamed_old[f"{module}.{_OLD_ATTENTION_NAMES[leaf]}.{tail}" if old else key] = value
    attends = ["Attn" in name for name in config["down_block_types"]]
    names = _first_stage_names(len(attends), config.get("layers_per_block", 1), attends)
    ours = _rename(renamed_old, _swap(names), "first stage")
    ours = {k: v[:, :, None, None] if v.ndim == 2 and _FIRST_ATTENTION_WEIGHT.search(k) else v for k, v in ours.items()}
    groups = config.get("norm_num_groups", 32)
    if any(len(v) % groups for k, v in ours.items() if re.search(r"norm\w*\.weight$", k)):
        raise UserError(f"vae/config.json: norm_num_groups={groups} does not divide every width")
    found = infer_first_stage_config(ours, config.get("sample_size") or 256)
    return ours, {**found, "norm_groups": groups, "scale_factor": config.get("scaling_factor", 1.0)}


def _tau_names(layers: int) -> Names:
    names: Names = [
        ("transformer.token_emb", "model.embed_tokens"),
        ("transformer.pos_emb.emb", "model.embed_positions"),
        ("transformer.norm", "model.layer_norm"),
        ("transformer.to_logits", "to_logits"),
    ]
    for i in range(layers):
        attention, mlp = f"transformer.attn_layers.layers.{2 * i}", f"transformer.attn_layers.layers.{2 * i + 1}"
        theirs = f"model.layers.{i}"
        names += [(f"{attention}.0", f"{theirs}.self_attn_layer_norm"), (f"{mlp}.0", f"{theirs}.final_layer_norm")]
        names += [(f"{attention}.1.to_{x}", f"{theirs}.self_attn.{x}_proj") for x in "qkv"]
        names += [(f"{attention}.1.to_out", f"{theirs}.self_attn.out_proj")]
        names += [(f"{mlp}.1.net.0.0", f"{theirs}.fc1"), (f"{mlp}.1.net.2", f"{theirs}.fc2")]
    return names


def text_encoder_to_diffusers(state: Mapping[str, Tensor], dim_head: int = 64) -> tuple[StateDict, dict[str, Any]]:
    """Weights and config.json of diffusers' LDMBertModel. It has a logits head; without one zeros are written."""
    vocabulary, width = state["transformer.token_emb.weight"].shape
    layers = len({k.split(".")[3] for k in state if k.startswith("transformer.attn_layers.")}) // 2
    config = {
        "model_type": "ldmbert",
        "architectures": ["LDMBertModel"],
        "vocab_size": vocabulary,
        "max_position_embeddings": state["transformer.pos_emb.emb.weight"].shape[0],
        "encoder_layers": layers,
        "encoder_ffn_dim": state["transformer.attn_layers.layers.1.1.net.0.0.weight"].shape[0],
        "encoder_attention_heads": state["transformer.attn_layers.layers.0.1.to_q.weight"].shape[0] // dim_head,
        "head_dim": dim_head,
        "d_model": width,
        "activation_function": "gelu",
    }
    state = dict(state)
    state.setdefault("transformer.to_logits.weight", torch.zeros(vocabulary, width))
    state.setdefault("transformer.to_logits.bias", torch.zeros(vocabulary))
    return _rename(state, _tau_names(layers), "text encoder"), config


def text_encoder_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[StateDict, dict[str, Any]]:
    """Weights of `TransformerEmbedder` and its arguments from diffusers' LDMBertModel (its logits head is dropped)."""
    if config.get("model_type") != "ldmbert":
        raise UserError(f"text encoder: model_type {config.get('model_type')!r}, expected ldmbert (the paper's tau)")
    state = {k: v for k, v in state.items() if not k.startswith("to_logits.") and k != "model.embed_positions_ids"}
    arguments = {
        "n_embed": config["d_model"],
        "n_layer": config["encoder_layers"],
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["max_position_embeddings"],
        "heads": config["encoder_attention_heads"],
        "dim_head": config["head_dim"],
    }
    return _rename(state, _swap(_tau_names(config["encoder_layers"])), "text encoder"), {"kind": "tau", **arguments}


class _Inert:
    """Stands in for trainer objects inside an old checkpoint: swallows any construction and state, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# Bystanders in checkpoints of Lightning (callbacks, hyper-parameters): read as `_Inert`, their code never runs.
_HARMLESS_ORIGINS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "typing.")


def _stand_ins(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []  # not a zip archive: load_checkpoint says what is wrong
    return [(_Inert, name) for name in foreign if name.startswith(_HARMLESS_ORIGINS)]


def read_state_dict(path: Path) -> StateDict:
    """Tensors of a `.ckpt`, `.bin`, `.pt` or `.safetensors`; no code in the file is run.

    Raises:
        UserError: no such file, truncated, pickled objects other than a trainer's, or no tensors in it.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {path} is truncated or not a safetensors file: {error}") from None
    from common.training import load_checkpoint  # imports Lightning, which --help need not wait for

    stand_ins = _stand_ins(path)
    with torch.serialization.safe_globals(stand_ins) if stand_ins else nullcontext():
        content = load_checkpoint(path)
    state = content.get("state_dict", content)
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not state:
        raise UserError(f"checkpoint {path} has no weights: expected tensors, or a state_dict of tensors")
    return state


def split_compvis(state: Mapping[str, Tensor], ema: bool = True, what: str = "checkpoint") -> Checkpoint:
    """Parts of a state dict in the authors' names: whole models, or a first stage or U-Net alone.

    Args:
        ema: put the averaged weights (`model_ema.*`, names without dots) where the trained ones are; the authors sample
            with them. Ignored where a checkpoint has none (cin256-v2 and txt2img-large).
    """
    found = Checkpoint()
    for part, prefix in PREFIXES.items():
        weights = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        weights = {k: v for k, v in weights.items() if not k.startswith("loss.")}
        if weights:
            found.parts[part] = weights
    if not found.parts:
        if "encoder.conv_in.weight" in state:
            keep = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
            found.parts["first_stage"] = {k: v for k, v in state.items() if k.startswith(keep)}
        elif any(k.endswith("input_blocks.0.0.weight") for k in state):
            prefix = next(k for k in state if k.endswith("input_blocks.0.0.weight"))[: -len("input_blocks.0.0.weight")]
            found.parts["unet"] = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        else:
            raise UserError(
                f"{what} is no latent diffusion model: expected names like model.diffusion_model.* or "
                f'encoder.*, found "{next(iter(state), "nothing")}"'
            )
    if "conditioner" in found.parts and "encoder.conv_in.weight" in found.parts["conditioner"]:
        del found.parts["conditioner"]  # inpainting conditions on the first stage itself, stored twice
    if ema and "unet" in found.parts:
        averaged = {
            name: state["model_ema." + f"diffusion_model.{name}".replace(".", "")]
            for name in found.parts["unet"]
            if "model_ema." + f"diffusion_model.{name}".replace(".", "") in state
        }
        if averaged and len(averaged) != len(found.parts["unet"]):
            raise UserError(
                f"{what}: averaged weights (model_ema) exist for only {len(averaged)} of the U-Net's tensors"
            )
        found.parts["unet"] = averaged or found.parts["unet"]
    if "scale_factor" in state:
        found.config["scale_factor"] = float(state["scale_factor"])
    return found


def load_compvis(path: Path, ema: bool = True) -> Checkpoint:
    """Read one of the authors' checkpoints (weights only); see `split_compvis`."""
    return split_compvis(read_state_dict(path), ema, f"checkpoint {path}")


def read_config(path: Path) -> dict[str, Any]:
    """{unet, first_stage, conditioner, schedule, scale_factor} from configs/paper/*.yaml or the authors' YAML."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"config {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"config {path}: expected a mapping")
    if "model" not in content:
        if "unet" not in content:
            raise UserError(f'config {path}: expected "unet" (ldm/configs/paper) or "model" (the authors\' files)')
        if isinstance(content.get("first_stage"), str):
            zoo = yaml.safe_load((path.parent / "first_stages.yaml").read_text())
            content["first_stage"] = zoo[content["first_stage"]]
        return content
    params = content["model"].get("params", {})
    unet = dict(params.get("unet_config", {}).get("params", {}))
    unet.pop("use_checkpoint", None)
    schedule = {
        "linear_start": params.get("linear_start", 1e-4),
        "linear_end": params.get("linear_end", 2e-2),
        "timesteps": params.get("timesteps", 1000),
    }
    result: dict[str, Any] = {"unet": unet, "schedule": schedule}
    first_stage = params.get("first_stage_config", {}).get("params", {})
    if "ddconfig" in first_stage:
        result["first_stage"] = {k: first_stage.get(k) for k in ("ddconfig", "embed_dim", "n_embed")}
    if "scale_factor" in params:
        result["scale_factor"] = params["scale_factor"]
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def read_component(folder: Path) -> tuple[StateDict, dict[str, Any]]:
    """Weights (float32) and config.json of one component of a diffusers folder."""
    config = _json(folder / "config.json")
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for name in (f"{stem}{v}.{ext}" for ext in ("safetensors", "bin") for stem in stems for v in ("", ".fp16")):
        if (folder / name).is_file():
            return {
                k: v.float() if v.is_floating_point() else v for k, v in read_state_dict(folder / name).items()
            }, config
    raise UserError(f"{folder}: no weights (expected diffusion_pytorch_model.safetensors or model.safetensors)")


def autoencoder_from_diffusers_dir(path: Path) -> AutoencoderKL | VQModel:
    """Our first stage from a diffusers `vae/` (or `vqvae/`) folder, or from a pipeline folder that has one."""
    path = next((path / name for name in ("vae", "vqvae") if (path / name / "config.json").is_file()), path)
    state, config = first_stage_from_diffusers(*read_component(path))
    model = autoencoder_of(
        config["ddconfig"], config["embed_dim"], config["n_embed"], norm_groups=config["norm_groups"]
    )
    model.load_state_dict(state)
    return model


def unet_from_diffusers_dir(path: Path) -> UNet:
    """Our U-Net from a diffusers `unet/` folder, or from a pipeline folder that has one."""
    path = path / "unet" if (path / "unet" / "config.json").is_file() else path
    state, config = unet_from_diffusers(*read_component(path))
    unet = unet_of(config)
    unet.load_state_dict(state)
    return unet


def load_diffusers(path: Path) -> Checkpoint:
    """Every component of a diffusers folder that a latent diffusion model has."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder (a diffusers pipeline or component)")
    found = Checkpoint()
    folders = {"unet": ["unet"], "first_stage": ["vae", "vqvae"], "conditioner": ["bert", "text_encoder"]}
    places = {
        part: folder
        for part, names in folders.items()
        for folder in (path / name for name in names)
        if (folder / "config.json").is_file()
    }
    if not places and (path / "config.json").is_file():
        kind = str(_json(path / "config.json").get("_class_name", ""))
        places["unet" if kind.startswith("UNet") else "first_stage"] = path
    if not places:
        raise UserError(f"{path}: no unet/, vae/ or vqvae/ with a config.json in it")
    for part, folder in places.items():
        state, config = read_component(folder)
        if part == "unet":
            found.parts[part], found.config[part] = unet_from_diffusers(state, config)
        elif part == "first_stage":
            found.parts[part], found.config[part] = first_stage_from_diffusers(state, config)
            found.config["scale_factor"] = found.config[part].pop("scale_factor")
        elif config.get("model_type") == "ldmbert":
            found.parts[part], found.config[part] = text_encoder_from_diffusers(state, config)
        else:
            print(f"{folder}: {config.get('model_type')} text encoder is not the paper's; left out")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        values = _json(scheduler)
        found.config["schedule"] = {
            "linear_start": values.get("beta_start"),
            "linear_end": values.get("beta_end"),
            "timesteps": values.get("num_train_timesteps", 1000),
            "prediction": values.get("prediction_type", "epsilon"),
        }
    return found


def load_ours(path: Path) -> Checkpoint:
    """A .safetensors with the authors' names and the architecture in its header (or a `.ckpt` of a training run)."""
    found = load_compvis(path)
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            found.config |= json.loads((file.metadata() or {}).get("config", "{}"))
    return found


def to_compvis_names(checkpoint: Checkpoint) -> StateDict:
    """One state dict with the authors' prefixes; a first stage alone keeps bare names, as theirs do."""
    if set(checkpoint.parts) == {"first_stage"}:
        return dict(checkpoint.parts["first_stage"])
    state = {PREFIXES[part] + k: v for part, weights in checkpoint.parts.items() for k, v in weights.items()}
    if checkpoint.config.get("scale_factor") is not None:
        state["scale_factor"] = torch.tensor(float(checkpoint.config["scale_factor"]))
    return state


def save_compvis(checkpoint: Checkpoint, path: Path) -> None:
    """A `.ckpt` that the authors' code loads (no averaged copies: the weights already are the ones to sample with)."""
    from common.training import write_atomically

    state = to_compvis_names(checkpoint)
    write_atomically(path, lambda temporary: torch.save({"state_dict": state}, temporary))


def save_ours(checkpoint: Checkpoint, path: Path) -> None:
    """The authors' names in one .safetensors, with the architecture as JSON in the header."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: our format is one .safetensors file; give a name that ends so")
    from common.training import write_atomically

    # Tensors may share storage (for instance slices of one another), which safetensors refuses.
    state = {k: v.contiguous().clone() for k, v in to_compvis_names(checkpoint).items()}
    write_atomically(path, lambda t: save_file(state, str(t), metadata={"config": json.dumps(checkpoint.config)}))


def scheduler_config(
    beta_start: float, beta_end: float, timesteps: int = 1000, prediction: str = "epsilon"
) -> dict[str, Any]:
    """Settings with which diffusers' DDIMScheduler equals the authors' DDIM sampler (golden diffusers_ddim_equal)."""
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"prediction {prediction!r}: expected epsilon, v_prediction or sample")
    return {
        "num_train_timesteps": timesteps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def _replace_folder(path: Path, fill: Any) -> None:
    """`fill(temporary)` writes the folder, which then takes its name; an existing one of ours is replaced."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    temporary = path.with_name(f"{path.name}.part{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        if path.is_dir():
            # Other files of the folder (model card, sample grids) stay.
            for item in temporary.iterdir():
                target = path / item.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(item, target)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_component(
    folder: Path, state: StateDict, config: dict[str, Any], name: str = "diffusion_pytorch_model"
) -> None:
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    tensors = {k: v.contiguous().clone() for k, v in state.items()}
    save_file(tensors, str(folder / f"{name}.safetensors"), metadata={"format": "pt"})


def save_diffusers(checkpoint: Checkpoint, path: Path) -> None:
    """Component folders unet/, vae/ or vqvae/, bert/, scheduler/; load each with its class's `from_pretrained`."""
    components: dict[str, tuple[StateDict, dict[str, Any]]] = {}
    config = checkpoint.config
    if "unet" in checkpoint.parts:
        components["unet"] = unet_to_diffusers(checkpoint.parts["unet"], config.get("unet") or {})
    if "first_stage" in checkpoint.parts:
        ddconfig = (config.get("first_stage") or {}).get("ddconfig") or {}
        converted = first_stage_to_diffusers(
            checkpoint.parts["first_stage"], config.get("scale_factor") or 1.0, ddconfig.get("resolution", 256)
        )
        components["vae" if converted[1]["_class_name"] == "AutoencoderKL" else "vqvae"] = converted
    tau = checkpoint.parts.get("conditioner", {})
    if "transformer.token_emb.weight" in tau:
        components["bert"] = text_encoder_to_diffusers(tau)
    elif tau:
        print("the conditioner has no counterpart in diffusers and is left out (class embeddings, map rescalers)")

    def fill(folder: Path) -> None:
        for name, (state, values) in components.items():
            stem = "model" if name == "bert" else "diffusion_pytorch_model"
            _write_component(folder / name, state, values, stem)
        schedule = config.get("schedule")
        if schedule:
            values = scheduler_config(
                schedule["linear_start"],
                schedule["linear_end"],
                schedule.get("timesteps", 1000),
                schedule.get("prediction", "epsilon"),
            )
            (folder / "scheduler").mkdir()
            _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **values})

    _replace_folder(path, fill)


def write_pipeline(
    path: Path,
    unet: UNet,
    vae: AutoencoderKL,
    text_encoder: Any,
    tokenizer: Any,
    *,
    beta_start: float,
    beta_end: float,
    sample_size: int,
    scaling_factor: float = 1.0,
    prediction: str = "epsilon",
    timesteps: int = 1000,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """A folder that plain `DiffusionPipeline.from_pretrained` opens as a stock StableDiffusionPipeline.

    Args:
        unet: cross-attention U-Net whose context is the text encoder's last hidden state.
        text_encoder: transformers BertModel; the pipeline calls it without attention mask (all tokens are seen).
        tokenizer: fast transformers tokenizer whose `model_max_length` is the text encoder's context length.
        beta_start, beta_end: of the "linear" (in sqrt(beta)) schedule.
        sample_size: side of the latents that the U-Net was trained on.
        scaling_factor: what the latents are multiplied by after encoding.
        prediction: epsilon, v_prediction or sample.
        dtype: of the stored weights.
    """
    scheduler = scheduler_config(beta_start, beta_end, timesteps, prediction)
    unet_weights, unet_config = unet_to_diffusers(unet.state_dict(), {**unet.config, "image_size": sample_size})
    vae_weights, vae_config = first_stage_to_diffusers(
        vae.state_dict(), scaling_factor, sample_size * vae.downsampling, vae.norm_groups
    )
    vae_config["force_upcast"] = False
    text_weights = {k: v.detach().cpu() for k, v in text_encoder.state_dict().items()}
    if "pooler.dense.weight" not in text_weights:
        # BertModel always has a pooler; nothing reads it here, but a missing one is drawn at random on loading.
        width = text_encoder.config.hidden_size
        text_weights |= {"pooler.dense.weight": torch.zeros(width, width), "pooler.dense.bias": torch.zeros(width)}
    # dtype float32: diffusers reads its own networks in float32 unless told otherwise, and transformers must follow.
    text_config = {**text_encoder.config.to_dict(), "architectures": ["BertModel"], "dtype": "float32"}
    parts = {
        "unet": (unet_weights, {**unet_config, "_diffusers_version": _DIFFUSERS_VERSION}),
        "vae": (vae_weights, {**vae_config, "_diffusers_version": _DIFFUSERS_VERSION}),
        "text_encoder": (text_weights, text_config),
    }
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }

    def fill(folder: Path) -> None:
        for name, (weights, config) in parts.items():
            stored = {k: v.to("cpu", dtype) if v.is_floating_point() else v for k, v in weights.items()}
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            _write_component(folder / name, stored, config, stem)
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **scheduler})
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        tokenizer_config = folder / "tokenizer" / "tokenizer_config.json"
        # Newer transformers call the class by a name that older ones do not know.
        _write_json(tokenizer_config, {**_json(tokenizer_config), "tokenizer_class": "PreTrainedTokenizerFast"})
        _write_json(folder / "model_index.json", index)

    _replace_folder(path, fill)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    homes = ("compvis", "ours", "diffusers")
    parser.add_argument("--from", dest="source", required=True, choices=homes)
    parser.add_argument("--to", dest="target", required=True, choices=homes)
    parser.add_argument("--config", type=Path, help="architecture: ldm/configs/paper/*.yaml or the authors' YAML")
    parser.add_argument("--no-ema", action="store_true", help="take the trained weights instead of their average")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    if options.source == "compvis":
        checkpoint = load_compvis(options.input, ema=not options.no_ema)
    elif options.source == "ours":
        checkpoint = load_ours(options.input)
    else:
        checkpoint = load_diffusers(options.input)
    if options.config is not None:
        given = read_config(options.config)
        checkpoint.config = {**given, **checkpoint.config}
        if "unet" in checkpoint.parts and "unet" in given:
            check_fits(checkpoint.parts["unet"], given["unet"], options.config)
            checkpoint.config["unet"] = given["unet"]
    {"compvis": save_compvis, "ours": save_ours, "diffusers": save_diffusers}[options.target](
        checkpoint, options.output
    )
    for part, weights in checkpoint.parts.items():
        print(f"{part}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()) / 1e6:.1f}M parameters")
    print(f"wrote {options.output}")


def check_fits(state: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> None:
    """The U-Net described by `config` has exactly these weights, else one sentence that says where they part."""
    with torch.device("meta"):
        expected = unet_of(config).state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        has = "lacks" if name in expected else "has an extra"
        raise UserError(f"the checkpoint does not fit {source}: it {has} {name}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            shapes = f"{list(value.shape)}, expected {list(expected[name].shape)}"
            raise UserError(f"the checkpoint does not fit {source}: {name} is {shapes}")


if __name__ == "__main__":
    run_main(main)
