"""Checkpoints of PixArt-alpha between three homes, both ways, exactly; and the initialiser of stage 2.

    python pixart/convert.py --to ours      PixArt-XL-2-512x512.pth  folder/       # --weights trained: not the EMA
    python pixart/convert.py --to diffusers PixArt-XL-2-512x512.pth  transformer/
    python pixart/convert.py --to official  transformer/             model.pth
    python pixart/convert.py --reparameterise DiT-XL-2-256x256.pt --to ours  initial/  folder/

official   the authors' `.pth`: {"state_dict": ..., "state_dict_ema": ...}
ours       a folder with model.safetensors (the same names) and config.json (PixArtConfig)
diffusers  a PixArtTransformer2DModel folder, or a pipeline folder with transformer/ in it

The input's home is recognised. A `.pth` does not say how many heads the network has: 16 is assumed at the authors'
width of 1152; `--heads` says it for other widths. `--reparameterise` copies a class-conditional DiT into the network
given as input (section 2.3: "re-parameterization").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import read_object, write_atomically, write_json
from common.options import Count
from common.pretrained import from_folder, quiet_libraries
from common.weights import check_weights, read_weights, save_weights
from pixart.config import PixArtConfig, Timestep
from pixart.model import DiT, PixArt, position_embedding
from pixart.samplers import diffusers_scheduler

StateDict = dict[str, Tensor]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DIFFUSERS_CLASS = "PixArtTransformer2DModel"
# The class that the published folders name: diffusers' general one, with these values where config.json is silent.
PUBLISHED_CLASS = "Transformer2DModel"
_PUBLISHED_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "num_layers": 1,
    "activation_fn": "geglu",
    "attention_bias": False,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
}
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# diffusers has no place for the null caption: it stands beside the weights, where diffusers does not look.
NULL_CAPTION_FILE = "null_caption.safetensors"
NULL_CAPTION = "y_embedder.y_embedding"
_PUBLISHED_NULL_CAPTION = "caption_projection.y_embedding"
CLASSES = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
FORMAT = {"format": "pt"}  # diffusers reads no weights without it
# Layout version that exported configs declare (the pinned diffusers).
_DIFFUSERS_VERSION = "0.42.1"
# The authors' only shape; the number of heads cannot be read from weights.
_AUTHORS_WIDTH, _AUTHORS_HEADS = 1152, 16
# Parts that a network may have beyond the file it starts from: they keep their initialisation.
_MAY_BE_NEW = ("csize_embedder.", "ar_embedder.")


def read_state_dict(path: Path, weights: str = "ema") -> StateDict:
    """Weights of a .pth/.pt/.ckpt/.bin or .safetensors file (or its shards) in float32; no code in the file is run.

    Args:
        weights: "ema" takes `state_dict_ema` (DiT: `ema`) where there is one, "trained" takes `state_dict`.

    Raises:
        UserError: no such file, truncated, pickled objects in it, or no weights.
    """
    if path.name.endswith(".safetensors") or ".safetensors.index" in path.name:
        content: dict[str, Any] = read_weights(path, "checkpoint")[0]
    else:
        from common.training import load_checkpoint  # imports Lightning, which --help need not wait for

        content = load_checkpoint(path)
    names = ("state_dict_ema", "ema", "state_dict", "model") if weights == "ema" else ("state_dict", "model")
    state = next((content[name] for name in names if isinstance(content.get(name), dict)), content)
    found = {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    if not found:
        raise UserError(f"checkpoint {path} has no weights: expected tensors by name, or a state_dict of them")
    return found


def _build_config(values: Mapping[str, Any], path: Path) -> PixArtConfig:
    known = {field.name for field in fields(PixArtConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise UserError(f"{path}: unknown field {unknown[0]!r}; a network's fields are {', '.join(sorted(known))}")
    try:
        return PixArtConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def infer_config(state: Mapping[str, Tensor], what: str, heads: int | None = None) -> PixArtConfig:
    """The shape of a network from weights in the authors' names; one with a table of classes is a DiT.

    Args:
        what: the file, for messages.
        heads: attention heads; None: 16 at the authors' width of 1152.

    Raises:
        UserError: the heads or the resolution cannot be known.
    """
    width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    if heads is None:
        if width != _AUTHORS_WIDTH:
            raise UserError(f"{what}: the heads of a network of width {width} are not in its weights; give --heads")
        heads = _AUTHORS_HEADS
    if POSITIONS not in state:
        raise UserError(f"{what}: {POSITIONS} is missing, so its resolution is unknown; give the network's config")
    side = round(state[POSITIONS].shape[1] ** 0.5)
    input_size = side * patch
    shape = PixArtConfig(
        input_size=input_size,
        patch_size=patch,
        in_channels=in_channels,
        width=width,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        learn_sigma=state["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch**2,
    )
    if CLASSES in state:
        return replace(shape, classes=len(state[CLASSES]) - 1)
    null = state.get(NULL_CAPTION)
    return replace(
        shape,
        caption_channels=state["y_embedder.y_proj.fc1.weight"].shape[1],
        caption_tokens=120 if null is None else len(null),
        interpolation_scale=_recorded_scale(state[POSITIONS], side, input_size, what),
        multi_scale="csize_embedder.mlp.0.weight" in state,
        adaln="single" if "t_block.1.weight" in state else "block",
    )


def _recorded_scale(positions_1ND: Tensor, side: int, input_size: int, what: str) -> float:
    """The interpolation scale of stored positions; multi-scale files store zeros, for them the authors' rule.

    Raises:
        UserError: positions of none of the usual scales.
    """
    rule = float(max(input_size // 64, 1))
    if not positions_1ND.any():
        return rule
    for scale in (1.0, 2.0, 4.0, 0.5, 8.0, 16.0, rule):
        made = position_embedding(positions_1ND.shape[2], side, side, side, scale)
        if torch.allclose(made, positions_1ND[0].float(), atol=1e-2):
            return scale
    raise UserError(
        f"{what}: {POSITIONS} holds positions of none of the interpolation scales 0.5, 1, 2, 4, 8, 16; give the "
        "network's config"
    )


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a PixArtTransformer2DModel or a pipeline with one."""
    return (folder / "transformer" / CONFIG).is_file() or (
        (folder / CONFIG).is_file() and "_class_name" in read_object(folder / CONFIG)
    )


def load_weights(model: PixArt | DiT, state: Mapping[str, Tensor], what: str) -> None:
    """Put weights in the authors' names into a network, which may be meant for another resolution.

    Positions are the network's own; embedders of size and ratio that the file lacks keep their initialisation.

    Raises:
        UserError: names or shapes that do not fit, with the first of them.
    """
    state = {key: value for key, value in state.items() if key != POSITIONS}
    expected = {key: value for key, value in model.state_dict().items() if key != POSITIONS}
    may_lack = [key for key in expected if key == NULL_CAPTION or key.startswith(_MAY_BE_NEW)]
    check_weights(state, expected, what, "the network", may_lack)
    model.load_state_dict(state, strict=False)
    if isinstance(model, PixArt):
        model.has_null_caption = NULL_CAPTION in state


def _read_network(path: Path, weights: str = "ema") -> tuple[StateDict, PixArtConfig | None]:
    """Weights in the authors' names, and the shape where the network's home says it."""
    if not path.is_dir():
        return read_state_dict(path, weights), None
    if is_diffusers(path):
        refuse_other_levels(path / "scheduler" / "scheduler_config.json")
        return from_diffusers(*_read_diffusers(path / "transformer" if (path / "transformer").is_dir() else path))
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return read_state_dict(path / WEIGHTS), _build_config(read_object(path / CONFIG), path / CONFIG)
    raise UserError(f"{path}: no network in this folder (expected {WEIGHTS} and {CONFIG}, or a diffusers transformer)")


# The noise levels that the paper's networks are trained and sampled on.
_LEVELS: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}


def refuse_other_levels(path: Path) -> None:
    """Raise UserError where a pipeline's scheduler says that its network predicts something else, or on other levels:
    what is read here, and converted, is sampled on the paper's.
    """
    values = read_object(path) if path.is_file() else {}
    for option, usual in _LEVELS.items():
        if values.get(option, usual) != usual:
            raise UserError(f"{path}: {option} is {values[option]!r}, which is not carried; PixArt-alpha has {usual!r}")


def load_transformer(
    path: Path | str, config: PixArtConfig | None = None, *, weights: str = "ema", heads: int | None = None
) -> PixArt:
    """A network with its weights: our folder, a diffusers folder (transformer or pipeline), or an official `.pth`.

    Args:
        config: the network to build, for instance at another resolution; None: the one that the file describes.
        weights: "ema" or "trained", where an official file has both.
        heads: attention heads of a `.pth` whose width is not the authors'.

    Raises:
        UserError: no such file, truncated, of another kind, or weights that do not fit `config`.
    """
    state, found = _read_network(Path(path), weights)
    for key in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.y_proj.fc1.weight"):
        if key not in state:
            hint = " (a class-conditional DiT: give it with --reparameterise)" if CLASSES in state else ""
            raise UserError(f'{path} is not a PixArt-alpha transformer: "{key}" is missing{hint}')
    model = PixArt(config or found or infer_config(state, str(path), heads))
    load_weights(model, state, str(path))
    return model


def load_dit(path: Path | str, config: PixArtConfig | None = None, *, heads: int | None = None) -> DiT:
    """A class-conditional DiT: our folder, or an official `.pt` (facebookresearch/DiT), EMA weights preferred."""
    state, found = _read_network(Path(path))
    if CLASSES not in state or "x_embedder.proj.weight" not in state:
        raise UserError(f'{path} is not a class-conditional DiT: "{CLASSES}" is missing')
    dit = DiT(config or found or infer_config(state, str(path), heads))
    load_weights(dit, state, str(path))
    return dit


@torch.no_grad()
def reparameterise(dit: DiT, pixart: PixArt, t: float = 500.0) -> None:
    """Start a text-conditional network from a class-conditional DiT (section 2.3, "re-parameterization").

    With adaLN-single the tables become E_i = adaLN_i(time(t)) - t_block(time(t)) and
    E_f = adaLN_final(time(t)) - time(t): at time t the new network then equals the DiT without its class term for any
    caption, because cross-attention starts at zero. `t_block`, caption embedder and cross-attention keep their
    initialisation; the table of classes is dropped. With the ablation's adaLN the DiT's MLPs are copied.

    Raises:
        UserError: the two networks differ in width, depth, heads, patch or channels.
    """
    for name in ("width", "depth", "heads", "mlp_ratio", "patch_size", "in_channels", "learn_sigma"):
        ours, theirs = getattr(pixart.config, name), getattr(dit.config, name)
        if ours != theirs:
            raise UserError(f"re-parameterisation: the DiT has {name} {theirs}, the text-conditional network {ours}")
    source, target = dit.state_dict(), pixart.state_dict()
    shared = {key: source[key] for key in target if key in source and key != POSITIONS}
    time_1D = dit.t_embedder(torch.tensor([t], device=dit.pos_embed.device))
    if pixart.config.adaln == "single":
        pixart.t_embedder.load_state_dict(dit.t_embedder.state_dict())
        condition_1E = pixart.t_block(time_1D.to(pixart.pos_embed.device))[0]
        for i, block in enumerate(dit.blocks):
            table = block.adaLN_modulation(time_1D)[0].to(condition_1E) - condition_1E  # type: ignore[operator]
            shared[f"blocks.{i}.scale_shift_table"] = table.unflatten(0, (6, -1))
        final = dit.final_layer.adaLN_modulation(time_1D)[0].unflatten(0, (2, -1))
        shared["final_layer.scale_shift_table"] = final - time_1D
    for i in range(pixart.config.depth):
        for part in ("weight", "bias"):
            name = f"blocks.{i}.cross_attn.proj.{part}"
            shared[name] = torch.zeros_like(target[name])
    pixart.load_state_dict(shared, strict=False)


_OUTER_NAMES = [
    ("x_embedder.proj", "pos_embed.proj"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    ("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
    ("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
    ("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
    ("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
    ("t_block.1", "adaln_single.linear"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
]
_BLOCK_NAMES = [
    ("scale_shift_table", "scale_shift_table"),
    ("attn.proj", "attn1.to_out.0"),
    ("cross_attn.q_linear", "attn2.to_q"),
    ("cross_attn.proj", "attn2.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
]
# One linear layer of ours, several of theirs.
_SPLIT_NAMES = [
    ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
]


def _names(depth: int) -> list[tuple[str, str]]:
    blocks = [(f"blocks.{i}.{a}", f"transformer_blocks.{i}.{b}") for i in range(depth) for a, b in _BLOCK_NAMES]
    return _OUTER_NAMES + blocks


def _split_names(depth: int) -> list[tuple[str, list[str]]]:
    return [
        (f"blocks.{i}.{a}", [f"transformer_blocks.{i}.{b}" for b in parts])
        for i in range(depth)
        for a, parts in _SPLIT_NAMES
    ]


def _rename(state: StateDict, names: Mapping[str, str], what: str) -> StateDict:
    """Replace module prefixes; a key without a counterpart is an error."""
    renamed = {}
    for key, value in state.items():
        prefix, _, last = key.rpartition(".")
        if key in names:
            renamed[names[key]] = value
        elif prefix in names:
            renamed[f"{names[prefix]}.{last}"] = value
        else:
            raise UserError(f'{what}: no counterpart for the weight "{key}"')
    return renamed


STOCK_MULTI_SCALE = 128  # latent side at which stock pipelines give the micro-conditions


def to_diffusers(state: Mapping[str, Tensor], config: PixArtConfig) -> tuple[StateDict, dict[str, Any]]:
    """Weights and config.json of the PixArtTransformer2DModel that computes the same function.

    Positions and the null caption are left out: diffusers computes the former and has no place for the latter.

    Raises:
        UserError: diffusers has no such network (named in the message).
    """
    if config.adaln != "single":
        raise UserError('diffusers has no PixArt with adaln "block"; keep --to ours')
    if config.mlp_ratio != 4:
        raise UserError(f"diffusers' transformer blocks have an MLP ratio of 4, this network {config.mlp_ratio}")
    if config.base != config.input_size // config.patch_size:
        raise UserError(f"diffusers derives base_size from the input size; this network has {config.base}")
    rest = {key: value for key, value in state.items() if key not in (POSITIONS, NULL_CAPTION)}
    split: StateDict = {}
    for ours, theirs in _split_names(config.depth):
        for kind in ("weight", "bias"):
            for name, part in zip(theirs, rest.pop(f"{ours}.{kind}").chunk(len(theirs))):
                split[f"{name}.{kind}"] = part.clone()
    theirs_config = {
        "_class_name": DIFFUSERS_CLASS,
        "_diffusers_version": _DIFFUSERS_VERSION,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
        "interpolation_scale": config.interpolation_scale,
        "use_additional_conditions": config.multi_scale,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_embeds_ada_norm": 1000,
        "dropout": 0.0,
    }
    return _rename(rest, dict(_names(config.depth)), "transformer") | split, theirs_config


_MUST_BE: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default", None),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "norm_type": ("ada_norm_single",),
    **dict.fromkeys(("double_self_attention", "only_cross_attention", "use_linear_projection"), (False,)),
    "num_vector_embeds": (None,),
}


def from_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[StateDict, PixArtConfig]:
    """Weights in the authors' names and the network's shape, from a PixArtTransformer2DModel's weights and config.json.

    The published folders' Transformer2DModel is read too. The null caption is taken along if `state` has it, under our
    name or theirs (`caption_projection.y_embedding`, which diffusers' own class passes over).
    """
    kind = config.get("_class_name", DIFFUSERS_CLASS)
    if kind not in (DIFFUSERS_CLASS, PUBLISHED_CLASS):
        raise UserError(f"transformer/config.json: class {kind}; expected {DIFFUSERS_CLASS} or {PUBLISHED_CLASS}")
    if kind == PUBLISHED_CLASS:
        config = {**_PUBLISHED_DEFAULTS, **config}
    for key, allowed in _MUST_BE.items():
        if key in config and config[key] not in allowed:
            raise UserError(f"transformer/config.json: {key}={config[key]!r}; PixArt-alpha has {allowed[0]!r}")
    width = config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72)
    depth, sample_size = config.get("num_layers", 28), config.get("sample_size", 128)
    scale, additional = config.get("interpolation_scale"), config.get("use_additional_conditions")
    if config.get("caption_channels") is None or config.get("cross_attention_dim", 1152) != width:
        raise UserError(
            "transformer/config.json: PixArt-alpha projects captions (caption_channels) to the width of its "
            f"cross-attention (cross_attention_dim = {width})"
        )
    outputs, inputs = config.get("out_channels") or config.get("in_channels", 4), config.get("in_channels", 4)
    if outputs not in (inputs, 2 * inputs):
        raise UserError(
            f"transformer/config.json: out_channels={outputs}; expected {inputs}, or {2 * inputs} with sigma"
        )
    rest = dict(state)
    published_null = rest.pop(_PUBLISHED_NULL_CAPTION, None)
    null = rest.pop(NULL_CAPTION, published_null)
    rest.pop("pos_embed.pos_embed", None)
    joined: StateDict = {}
    for ours, theirs in _split_names(depth):
        for kind in ("weight", "bias"):
            parts = [rest.pop(f"{name}.{kind}", None) for name in theirs]
            if any(part is None for part in parts):
                raise UserError(f"transformer: {theirs[0]}.{kind} or one of its neighbours is missing")
            joined[f"{ours}.{kind}"] = torch.cat([part for part in parts if part is not None])
    channels = config.get("in_channels", 4)
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"transformer/config.json: out_channels={out_channels} with in_channels={channels}; expected {channels} "
            f"(noise alone) or {2 * channels} (noise and variance)"
        )
    names = {theirs: ours for ours, theirs in _names(depth)}
    ours_config = PixArtConfig(
        input_size=sample_size,
        patch_size=config.get("patch_size", 2),
        in_channels=channels,
        width=width,
        depth=depth,
        heads=config.get("num_attention_heads", 16),
        caption_channels=config["caption_channels"],
        caption_tokens=120 if null is None else len(null),
        interpolation_scale=float(scale if scale is not None else max(sample_size // 64, 1)),
        learn_sigma=out_channels != channels,
        multi_scale=additional if additional is not None else sample_size == 128,
    )
    renamed = _rename(rest, names, "transformer") | joined
    return (renamed if null is None else {**renamed, NULL_CAPTION: null}), ours_config


def _read_diffusers(folder: Path) -> tuple[StateDict, dict[str, Any]]:
    half, pickled = "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"
    shards = (f"{DIFFUSERS_WEIGHTS}.index.json", f"{DIFFUSERS_WEIGHTS}.index.fp16.json")
    names = (DIFFUSERS_WEIGHTS, half, pickled, *shards)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: no weights (expected {DIFFUSERS_WEIGHTS})")
    state, null = read_state_dict(file), folder / NULL_CAPTION_FILE
    return (state | read_state_dict(null) if null.is_file() else state), read_object(folder / CONFIG)


def save_transformer(model: PixArt | DiT, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Our form: model.safetensors with the authors' names and config.json, each written in one step."""
    folder = Path(folder)
    state = model.state_dict()
    if isinstance(model, PixArt) and not model.has_null_caption:
        state.pop(NULL_CAPTION)
    save_weights(folder / WEIGHTS, state, FORMAT, dtype)
    write_json(folder / CONFIG, asdict(model.config))


def save_official(model: PixArt, path: Path | str) -> None:
    """A `.pth` as the authors' scripts read it: `state_dict` and `state_dict_ema` hold the same weights.

    Multi-scale networks have zeros as positions there, which the authors' code deletes.

    Raises:
        UserError: a fact of the network that such a file cannot say.
    """
    config = model.config
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    if not model.has_null_caption:
        raise UserError("a .pth holds a null caption, which this network lacks (diffusers has none): convert --to ours")
    if config.multi_scale:
        state[POSITIONS] = torch.zeros_like(model.pos_embed, device="cpu")
    said = infer_config(state, str(path), _AUTHORS_HEADS if config.width == _AUTHORS_WIDTH else config.heads)
    if lost := [field.name for field in fields(config) if getattr(said, field.name) != getattr(config, field.name)]:
        name = lost[0]
        raise UserError(
            f"{path}: a .pth cannot say {name} {getattr(config, name)}, its readers would take {getattr(said, name)}: "
            "convert --to ours"
        )
    write_atomically(Path(path), lambda t: torch.save({"state_dict": state, "state_dict_ema": state}, t))


def save_diffusers(model: PixArt, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """A PixArtTransformer2DModel folder; the null caption stands beside the weights, for `load_transformer`."""
    folder = Path(folder)
    state, config = to_diffusers(model.state_dict(), model.config)
    save_weights(folder / DIFFUSERS_WEIGHTS, state, FORMAT, dtype)
    write_json(folder / CONFIG, config)
    if model.has_null_caption:
        save_weights(folder / NULL_CAPTION_FILE, {NULL_CAPTION: model.y_embedder.y_embedding}, FORMAT)
    else:
        (folder / NULL_CAPTION_FILE).unlink(missing_ok=True)


def export_pipeline(model: PixArt, folder: Path | str, *, dtype: torch.dtype | None = None, **parts: Any) -> Path:
    """A PixArtAlphaPipeline folder: transformer/ and scheduler/, and the parts that are given.

    Args:
        dtype: of the stored transformer.
        parts: `vae`, `text_encoder` and `tokenizer` as diffusers and transformers hold them; `from_pretrained` wants
            those that are left out as arguments. The stock pipeline expects a T5 encoder, and takes the null caption
            as `negative_prompt_embeds` (it is kept beside the transformer).

    Raises:
        UserError: stock pipelines would draw something else, or nothing.
    """
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    folder = Path(folder)
    if model.config.multi_scale and model.config.input_size != STOCK_MULTI_SCALE:
        raise UserError(
            f"stock pipelines tell sizes and ratios to networks for latents of side {STOCK_MULTI_SCALE} only, this one "
            f"has {model.config.input_size} and wants them: convert the transformer alone (--to diffusers)"
        )
    save_diffusers(model, folder / "transformer", dtype)
    with quiet_libraries():
        transformer = from_folder(PixArtTransformer2DModel, folder / "transformer", torch_dtype=dtype)
        missing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        stock = PixArtAlphaPipeline(transformer=transformer, scheduler=diffusers_scheduler(), **{**missing, **parts})
        stock.save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--to", dest="target", required=True, choices=("official", "ours", "diffusers"), help="layout to write"
    )
    parser.add_argument("--weights", choices=("ema", "trained"), default="ema", help="which of an official file's two")
    parser.add_argument("--heads", type=Count, help="attention heads, where a .pth has another width than the authors'")
    parser.add_argument("--input-size", type=Count, help="latent side to convert to (default: the file's own)")
    parser.add_argument("--reparameterise", type=Path, metavar="DIT", help="a DiT to put into the input network")
    parser.add_argument("--time", type=Timestep, default=500.0, help="time at which both networks shall agree")
    parser.add_argument("input", type=Path, help="an official .pth, a folder of ours or a diffusers directory")
    parser.add_argument("output", type=Path, help="file (official) or folder to write")
    options = parser.parse_args(arguments)
    model = load_transformer(options.input, weights=options.weights, heads=options.heads)
    if options.input_size:
        config = replace(
            model.config, input_size=options.input_size, interpolation_scale=float(max(options.input_size // 64, 1))
        )
        model = load_transformer(options.input, config, weights=options.weights)
    if options.reparameterise:
        reparameterise(load_dit(options.reparameterise, heads=options.heads), model, options.time)
    if options.target == "official":
        save_official(model, options.output)
    elif options.target == "diffusers":
        save_diffusers(model, options.output)
    else:
        save_transformer(model, options.output)
    print(f"wrote {options.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    run_main(main)
