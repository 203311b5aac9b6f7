"""The networks that the authors' configurations describe: their option names, their defaults.

Read for the published models (configs/paper, `convert.py`) and the recorded cases; the program's own runs build their
networks from `config.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from torch import nn

from common.errors import UserError
from ldm import conditioners
from ldm.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.config import AutoencoderOptions, ClassifierNetwork, UNetOptions
from ldm.diffusion import LatentDiffusion, NoiseSchedule
from ldm.model import ConditionedUNet, EncoderUNet, UNet

UNET_DEFAULTS: dict[str, Any] = {"channel_mult": [1, 2, 4, 8], "num_head_channels": -1, "norm_groups": 32}
UNET_NEEDS = ("model_channels", "num_res_blocks", "attention_resolutions", "in_channels", "out_channels")
DDCONFIG_NEEDS = (
    *("ch", "ch_mult", "num_res_blocks", "z_channels"),
    *("attn_resolutions", "resolution", "in_channels", "out_ch"),
)
DDCONFIG_HAS = (*DDCONFIG_NEEDS, "double_z", "dropout", "attn_type")
# Options of the authors' modules that are read by their one value here; another is refused by name.
UNET_ONLY: dict[str, Any] = {"dims": 2, "use_fp16": False}
CLASSIFIER_ONLY: dict[str, Any] = {**UNET_ONLY, "num_heads_upsample": -1}
DDCONFIG_ONLY: dict[str, Any] = {
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "give_pre_end": False,
    "tanh_out": False,
}
FIRST_STAGE_ONLY: dict[str, Any] = {
    "remap": None,
    "use_ema": False,
    "batch_resize_range": None,
    "colorize_nlabels": None,
    "ignore_keys": [],
}
# `sane_index_shape` changes the shape of indices only, which are [B, h, w] here.
FIRST_STAGE_WITHOUT_INFLUENCE = ("sane_index_shape", "image_key", "scheduler_config", "lr_g_factor")
CONDITIONER_ONLY: dict[str, Any] = {"embedding_dropout": 0.0}
TRANSFORMER_ONLY: dict[str, Any] = {"dropout": 0.0, "gated_ff": True, "checkpoint": True}
MODEL_ONLY: dict[str, Any] = {
    "given_betas": None,
    "num_timesteps_cond": 1,
    "use_positional_encodings": False,
    "cond_stage_forward": None,
}
# Options of the authors' configurations that concern their trainer, not the network.
FOREIGN_OPTIONS = ("lossconfig", "monitor", "ckpt_path", "device", "use_tokenizer", "use_checkpoint")


def _need(config: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if name not in config]
    if missing:
        raise UserError(f"{what}: {missing[0]} is missing")


def without_only(config: Mapping[str, Any], only: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The configuration without the options that have one value here.

    Raises:
        UserError: one of them has another value.
    """
    for name, value in only.items():
        if config.get(name, value) not in (value, None):
            raise UserError(f"{what}: {name} is {config[name]!r}, which is missing here (only {value!r})")
    return {name: value for name, value in config.items() if name not in only}


def _call(build: Any, options: Mapping[str, Any], what: str) -> Any:
    """`build(**options)`; an option that it does not have is refused by name."""
    known = inspect.signature(build).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"{what}: option {unknown[0]} is missing here; known: {', '.join(known)}")
    return build(**options)


def _split(config: Mapping[str, Any], options: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to the dataclass `options`, and the rest."""
    names = {field.name for field in fields(options)}
    given = {**UNET_DEFAULTS, **config}
    return {k: v for k, v in given.items() if k in names}, {k: v for k, v in given.items() if k not in names}


def unet_of(config: Mapping[str, Any]) -> UNet:
    """The denoiser of `unet_config.params`."""
    _need(config, UNET_NEEDS, "unet_config")
    options, rest = _split(without_only(config, UNET_ONLY, "unet_config"), UNetOptions)
    return _call(functools.partial(UNet, UNetOptions(**options)), rest, "unet_config")


def classifier_of(config: Mapping[str, Any]) -> EncoderUNet:
    """The classifier of noisy latents with the arguments of the authors' EncoderUNetModel."""
    _need(config, (*UNET_NEEDS, "image_size"), "classifier")
    options, rest = _split(without_only(config, CLASSIFIER_ONLY, "classifier"), ClassifierNetwork)
    return _call(functools.partial(EncoderUNet, ClassifierNetwork(**options)), rest, "classifier")


def autoencoder_of(
    ddconfig: Mapping[str, Any],
    embed_dim: int,
    n_embed: int | None = None,
    *,
    norm_groups: int = 32,
    legacy: bool = True,
) -> AutoencoderKL | VQModel:
    """The first stage of `first_stage_config.params`: KL, or with a codebook of `n_embed` entries VQ.

    Raises:
        UserError: an option is missing, unknown, or contradicts the kind.
    """
    _need(ddconfig, DDCONFIG_NEEDS, "ddconfig")
    ddconfig = without_only(ddconfig, DDCONFIG_ONLY, "ddconfig")
    unknown = [name for name in ddconfig if name not in DDCONFIG_HAS]
    if unknown:
        raise UserError(f"ddconfig: {unknown[0]} is unknown; expected {', '.join(DDCONFIG_HAS)}")
    attention = ddconfig.get("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise UserError(f'ddconfig: attn_type is "{attention}"; expected "vanilla" or "none"')
    kl = n_embed is None
    if ddconfig.get("double_z", kl) != kl:
        kind, meaning = ("KL", "true (mean and log variance)") if kl else ("VQ", "false")
        raise UserError(f"ddconfig: a {kind} autoencoder needs double_z: {meaning}")
    options = AutoencoderOptions(
        ch=ddconfig["ch"],
        ch_mult=list(ddconfig["ch_mult"]),
        num_res_blocks=ddconfig["num_res_blocks"],
        norm_groups=norm_groups,
        z_channels=ddconfig["z_channels"],
        n_embed=n_embed or 0,
        legacy_beta=legacy,
        attn_resolutions=list(ddconfig["attn_resolutions"]),
        attention=attention == "vanilla",
    )
    return (AutoencoderKL if kl else VQModel)(
        options,
        ddconfig["resolution"],
        in_channels=ddconfig["in_channels"],
        out_channels=ddconfig["out_ch"],
        embed_dim=embed_dim,
        dropout=ddconfig.get("dropout", 0.0),
    )


def from_compvis_config(
    config: Mapping[str, Any], *, cond_drop: float = 0.1, logits_head: bool = False
) -> LatentDiffusion:
    """Library: the model that one of the authors' YAML configurations describes (random weights).

    Args:
        config: the whole file ({"model": {"params": ...}}), its `model` entry, or its `params`.
        logits_head: give tau_theta the authors' logits head, which nothing reads (for exact parameter counts).

    Raises:
        UserError: a part that this package does not have.
    """
    params: Mapping[str, Any] = config
    for key in ("model", "params"):
        if isinstance(params.get(key), Mapping):
            params = params[key]
    without_only(params, MODEL_ONLY, "model")

    def build(entry: Mapping[str, Any], known: Mapping[str, Any], what: str) -> nn.Module:
        name = str(entry["target"]).rsplit(".", 1)[-1]
        if name not in known:
            raise UserError(f"{what} {entry['target']!r} is not available: this package has {sorted(known)}")
        options = {k: v for k, v in dict(entry.get("params") or {}).items() if k not in FOREIGN_OPTIONS}
        if what == "first stage":
            options = {k: v for k, v in options.items() if k not in FIRST_STAGE_WITHOUT_INFLUENCE}
            options = without_only(options, FIRST_STAGE_ONLY, what)
        elif what == "conditioner":
            options = without_only(options, CONDITIONER_ONLY, what)
        return _call(known[name], options, f"{what} {name}")

    first_stage = build(
        params["first_stage_config"],
        {
            "AutoencoderKL": autoencoder_of,
            "VQModelInterface": autoencoder_of,
            "VQModel": autoencoder_of,
            "IdentityFirstStage": IdentityFirstStage,
        },
        "first stage",
    )
    tau = functools.partial(conditioners.TransformerEmbedder, logits_head=logits_head)
    cond_config = params.get("cond_stage_config", "__is_unconditional__")
    cond_stage: nn.Module | Literal["first_stage"] | None
    if cond_config == "__is_unconditional__":
        cond_stage = None
    elif cond_config == "__is_first_stage__":
        cond_stage = "first_stage"
    else:
        cond_stage = build(
            cond_config,
            {
                "ClassEmbedder": conditioners.ClassEmbedder,
                "TransformerEmbedder": tau,
                "BERTEmbedder": tau,
                "SpatialRescaler": conditioners.SpatialRescaler,
                "Identity": nn.Identity,
            },
            "conditioner",
        )
    conditioning_key = params.get("conditioning_key") or ("concat" if params.get("concat_mode", True) else "crossattn")
    if cond_stage is None:
        conditioning_key = None
    return LatentDiffusion(
        first_stage,
        ConditionedUNet(unet_of(params["unet_config"]["params"]), conditioning_key),
        cond_stage,
        conditioning_key=conditioning_key,
        first_stage_key=params.get("first_stage_key", "image"),
        cond_stage_key=params.get("cond_stage_key", "image"),
        train_cond_stage=params.get("cond_stage_trainable", False),
        schedule=NoiseSchedule(
            params.get("beta_schedule", "linear"),
            params.get("timesteps", 1000),
            params.get("linear_start", 1e-4),
            params.get("linear_end", 2e-2),
            cosine_s=params.get("cosine_s", 8e-3),
            v_posterior=params.get("v_posterior", 0.0),
            prediction=params.get("parameterization", "eps"),
        ),
        loss=params.get("loss_type", "l2"),
        simple_weight=params.get("l_simple_weight", 1.0),
        elbo_weight=params.get("original_elbo_weight", 0.0),
        learn_logvar=params.get("learn_logvar", False),
        logvar_init=params.get("logvar_init", 0.0),
        scale_factor=params.get("scale_factor", 1.0),
        cond_drop=cond_drop,
    )
