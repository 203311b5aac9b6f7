"""The networks of a latent diffusion model in two layouts: the authors' (and ours), and diffusers'.

For each network: weights and configuration one way and the other, computing the same function, exactly. The
configurations in the authors' layout are the arguments of `official.unet_of`, `official.autoencoder_of` and
`conditioners.TransformerEmbedder`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from ldm.norm import group_count

StateDict = dict[str, Tensor]
Names = list[tuple[str, str]]


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


def _single_group_count(norm_widths: Iterable[int], what: str, most: int = 32) -> int:
    groups = {group_count(width, most) for width in norm_widths}
    if len(groups) != 1:
        raise UserError(
            f"{what}: its GroupNorms use {sorted(groups)} groups, diffusers has one number for all; "
            "use widths that are multiples of 32"
        )
    return groups.pop()


def _refuse_groups(groups: int, norm_widths: Iterable[int], component: str) -> None:
    for width in norm_widths:
        if width % groups:
            raise UserError(f"{component}/config.json: norm_num_groups={groups} does not divide the width {width}")


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
        UserError: the state dict is not that of a whole U-Net.
    """
    try:
        return _infer_unet(state, num_heads, num_head_channels)
    except KeyError as error:
        raise UserError(f"not a whole latent diffusion U-Net: {error} is missing") from None


def _infer_unet(state: Mapping[str, Tensor], num_heads: int, num_head_channels: int) -> dict[str, Any]:
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


# Options that both have, by the authors' name and diffusers'.
_UNET_OPTIONS: Names = [
    ("in_channels", "in_channels"),
    ("out_channels", "out_channels"),
    ("num_res_blocks", "layers_per_block"),
    ("dropout", "dropout"),
    ("num_classes", "num_class_embeds"),
    ("image_size", "sample_size"),
]
# What diffusers' options must be, where they are given, for a latent diffusion U-Net; the first value is the usual one.
_UNET_MUST_BE: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "norm_eps": (1e-5,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor"), (1,)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("downsample_type", "upsample_type"), ("conv",)),
    **dict.fromkeys(("flip_sin_to_cos", "add_attention"), (True,)),
    **dict.fromkeys(("center_input_sample", "dual_cross_attention", "only_cross_attention"), (False,)),
    **dict.fromkeys(("addition_embed_type", "class_embed_type", "time_cond_proj_dim", "timestep_post_act"), (None,)),
    **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type"), (None,)),
    **dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat"), (False,)),
    **dict.fromkeys(("cross_attention_norm", "reverse_transformer_layers_per_block"), (None,)),
    **dict.fromkeys(("time_embedding_dim", "time_embedding_act_fn", "attn_norm_num_groups"), (None,)),
    "mid_block_only_cross_attention": (None, False),
    "attention_type": ("default",),
    "resnet_out_scale_factor": (1.0,),
}
_UNET_FIXED = ("norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding", "act_fn")


def _norm_widths(state: Mapping[str, Tensor]) -> list[int]:
    """Widths of a U-Net's GroupNorms, in the authors' names."""
    ends = (".in_layers.0.weight", ".out_layers.0.weight", "out.0.weight", ".1.norm.weight")
    return [len(v) for k, v in state.items() if k.endswith(ends)]


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
    config = {"dropout": 0.0, "image_size": None, **infer_unet_config(state), **config}
    for option in ("use_new_attention_order", "n_embed"):
        if config.get(option):
            raise UserError(f"diffusers' U-Nets have no counterpart of {option}; keep --to ours")
    if not config.get("conv_resample", True) or config.get("num_heads_upsample", -1) != -1:
        option = "num_heads_upsample" if config.get("conv_resample", True) else "conv_resample"
        raise UserError(f"diffusers' U-Nets have no counterpart of {option}={config[option]}; keep --to ours")
    if config.get("resblock_updown"):
        raise UserError("diffusers' U-Nets have no counterpart of resblock_updown with these weights; keep --to ours")
    widths = [m * config["model_channels"] for m in config["channel_mult"]]
    if widths[0] != config["model_channels"]:
        raise UserError(f"diffusers needs channel_mult to begin with 1, got {config['channel_mult']}")
    attends = [2**i in config["attention_resolutions"] for i in range(len(widths))]
    spatial = config["use_spatial_transformer"]
    names, plain = _unet_names(config)
    theirs: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if spatial else "UNet2DModel",
        **{their_option: config[option] for option, their_option in _UNET_OPTIONS},
        **{option: _UNET_MUST_BE[option][0] for option in _UNET_FIXED},
        "block_out_channels": widths,
        "norm_num_groups": _single_group_count(_norm_widths(state), "U-Net", config.get("norm_groups", 32)),
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
    counts = {_heads_at(config, width) for width in _attention_widths(config)}
    if len(head_widths) != 1 and counts != {1}:
        raise UserError(
            f"UNet2DModel has one head width for all levels, this U-Net has {sorted(head_widths)}; keep --to ours"
        )
    theirs |= {
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": head_widths.pop() if len(head_widths) == 1 else None,  # one head of any width
        "time_embedding_type": "positional",
        "center_input_sample": False,
    }
    split: StateDict = dict(state)
    for ours, other in plain:
        names += _nested(ours, other, _ATTENTION_NAMES)
        heads_here = _heads_at(config, len(split[f"{ours}.norm.weight"]))
        for kind in ("weight", "bias"):
            # Rows go head by head, (q, k, v) inside each head.
            qkv = split.pop(f"{ours}.qkv.{kind}")
            qkv = qkv.flatten(1) if kind == "weight" else qkv
            for name, part in zip(("to_q", "to_k", "to_v"), qkv.unflatten(0, (heads_here, 3, -1)).unbind(1)):
                split[f"{ours}.{name}.{kind}"] = part.flatten(0, 1).contiguous()
        split[f"{ours}.proj_out.weight"] = split[f"{ours}.proj_out.weight"].flatten(1)
    return _rename(split, names, "U-Net"), theirs


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
    if isinstance(config.get("cross_attention_dim"), (list, tuple)):
        raise UserError("unet/config.json: cross_attention_dim differs between levels; expected one number")
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
        **{option: config.get(their_option) for option, their_option in _UNET_OPTIONS},
        "num_res_blocks": layers.pop(),
        "dropout": config.get("dropout", 0.0),
        "model_channels": widths[0],
        "attention_resolutions": [2**i for i, attend in enumerate(attends) if attend],
        "channel_mult": [width // widths[0] for width in widths],
        "num_heads": -1,
        "num_head_channels": -1,
        "norm_groups": config.get("norm_num_groups", 32),
        "use_scale_shift_norm": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "use_spatial_transformer": spatial,
        "transformer_depth": depths.pop(),
        "context_dim": config.get("cross_attention_dim") if spatial else None,
    }
    if not spatial:
        ours |= {"num_heads": 1} if heads is None else {"num_head_channels": heads}
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
    names, plain = _unet_names(ours)
    for a, b in plain:
        names += _nested(a, b, _ATTENTION_NAMES)
    renamed = _rename(_modern(state), _swap(names), "U-Net")
    _refuse_groups(ours["norm_groups"], _norm_widths(renamed), "unet")
    if spatial:
        for key, value in renamed.items():
            if key.endswith((".proj_in.weight", ".proj_out.weight")) and value.ndim == 2:
                renamed[key] = value[:, :, None, None]  # use_linear_projection
    for a, theirs in plain:
        parts = [f"{a}.{part}.{kind}" for part in ("to_q", "to_k", "to_v", "proj_out") for kind in ("weight", "bias")]
        if lacking := [part for part in [f"{a}.norm.weight", *parts] if part not in renamed]:
            raise UserError(f"U-Net: of {theirs} the weight {lacking[0].removeprefix(a + '.')} is missing")
        n = _heads_at(ours, len(renamed[f"{a}.norm.weight"]))
        for kind in ("weight", "bias"):
            rows = [renamed.pop(f"{a}.{part}.{kind}").unflatten(0, (n, -1)) for part in ("to_q", "to_k", "to_v")]
            qkv = torch.stack(rows, dim=1).flatten(0, 2)
            renamed[f"{a}.qkv.{kind}"] = qkv[..., None] if kind == "weight" else qkv
        renamed[f"{a}.proj_out.weight"] = renamed[f"{a}.proj_out.weight"][..., None]
    return renamed, ours


# Names of plain attention that diffusers used before 0.18; checkpoints on the hub still have them.
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(state: Mapping[str, Tensor]) -> StateDict:
    """A component's weights under the names of today's diffusers."""

    def modern(key: str) -> str:
        for old, new in _OLD_ATTENTION_NAMES.items():
            key = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", key)
        return key

    return {modern(key): value for key, value in state.items()}


_FIRST_RES_NAMES: Names = [(n, n) for n in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")]
_FIRST_ATTENTION_NAMES: Names = [
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
]


def _width(state: Mapping[str, Tensor], name: str) -> int:
    if name not in state:
        raise UserError(f'not a whole first stage: "{name}" is missing')
    return len(state[name])


def infer_first_stage_config(state: Mapping[str, Tensor], resolution: int = 256) -> dict[str, Any]:
    """{kind, ddconfig, embed_dim, n_embed} that fit a first stage's state dict in the authors' names.

    Args:
        resolution: nominal image side; only decides by which number attn_resolutions names a level.
    """
    needed = (
        "encoder.conv_in.weight",
        "decoder.conv_out.weight",
        "quant_conv.weight",
        "encoder.down.0.block.0.conv1.weight",
    )
    for key in (*needed, "decoder.conv_in.weight", "post_quant_conv.weight"):
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
        "ch_mult": [_width(state, f"encoder.down.{i}.block.0.conv1.weight") // ch for i in range(levels)],
        "num_res_blocks": blocks,
        "attn_resolutions": [
            resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state
        ],
        "dropout": 0.0,
        "attn_type": "vanilla" if "encoder.mid.attn_1.norm.weight" in state else "none",
    }
    return {
        "kind": kind,
        "ddconfig": ddconfig,
        "embed_dim": state["post_quant_conv.weight"].shape[1],
        "n_embed": None if codebook is None else len(codebook),
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


def _first_norm_widths(state: Mapping[str, Tensor]) -> list[int]:
    """Widths of a first stage's GroupNorms, in the authors' names."""
    return [len(v) for k, v in state.items() if re.search(r"norm\w*\.weight$", k)]


# What diffusers' options must be, where they are given, for the paper's first stage.
_FIRST_MUST_BE: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
    "latents_std": (None,),
}
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
    groups = _single_group_count(_first_norm_widths(state), "first stage", norm_groups)
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


# What diffusers' options must be, where they are given, for a first stage of the paper's.


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
    for key, only in _FIRST_MUST_BE.items():
        if config.get(key, only[0]) not in only:
            raise UserError(f"vae/config.json: {key}={config[key]!r} is missing here (only {only[0]!r})")
    if config.get("shift_factor") or config.get("latents_mean") or config.get("latents_std"):
        raise UserError("vae/config.json: latents that are shifted are not the paper's (expected only scaling_factor)")
    attends = ["Attn" in name for name in config["down_block_types"]]
    blocks = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
    if not set(config["down_block_types"]) <= blocks or [
        name.replace("UpDecoder", "DownEncoder") for name in reversed(config.get("up_block_types", []))
    ] != list(config["down_block_types"]):
        raise UserError(
            f"vae/config.json: block types {config['down_block_types']} and {config.get('up_block_types')}; expected "
            "DownEncoderBlock2D and AttnDownEncoderBlock2D and, mirrored, UpDecoderBlock2D"
        )
    names = _first_stage_names(len(attends), config.get("layers_per_block", 1), attends)
    ours = _rename(_modern(state), _swap(names), "first stage")
    ours = {k: v[:, :, None, None] if v.ndim == 2 and _FIRST_ATTENTION_WEIGHT.search(k) else v for k, v in ours.items()}
    groups = config.get("norm_num_groups", 32)
    _refuse_groups(groups, _first_norm_widths(ours), "vae")
    found = infer_first_stage_config(ours, config.get("sample_size") or 256)
    # Where diffusers' classes take their default, files of theirs mean it.
    return ours, {**found, "norm_groups": groups, "scale_factor": config.get("scaling_factor", 0.18215)}


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
    if config.get("activation_function", "gelu") != "gelu":
        raise UserError(
            f"text encoder: activation_function {config['activation_function']!r}, the paper's tau has gelu"
        )
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
