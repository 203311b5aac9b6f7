"""The first stage of a run (section 3.1): built as its options say, read from a file, and what it keeps of images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.images import to_uint8, to_unit
from common.pretrained import refuse_not_finite
from common.processes import is_main_process
from common.weights import check_weights
from ldm.autoencoder import AutoencoderKL, FirstStage, IdentityFirstStage, VQModel
from ldm.config import AutoencoderOptions, FirstStageConfig
from ldm.convert import autoencoder_from_diffusers_dir, first_stage_in
from ldm.layouts import infer_first_stage_config
from ldm.official import autoencoder_of


def build_first_stage(config: FirstStageConfig, size: int, channels: int = 3) -> FirstStage:
    """The autoencoder that the config describes (untrained)."""
    if config.kind == "pixels":
        return IdentityFirstStage(channels)
    network = AutoencoderKL if config.kind == "kl" else VQModel
    return network(config, size, in_channels=channels, out_channels=channels)


def describe(model: AutoencoderKL | VQModel, size: int) -> dict[str, Any]:
    """What a file says of the first stage in it (`build_described`); the number of groups is not in the weights.

    Args:
        size: nominal side of the images.
    """
    return {**infer_first_stage_config(model.state_dict(), size), "norm_groups": model.norm_groups}


def build_described(about: Mapping[str, Any], legacy: bool = True) -> AutoencoderKL | VQModel:
    """The first stage that a file says it holds (untrained).

    Args:
        legacy: where beta stands in a codebook's loss.
    """
    groups = about.get("norm_groups", 32)
    return autoencoder_of(
        about["ddconfig"], about["embed_dim"], about.get("n_embed"), norm_groups=groups, legacy=legacy
    )


def adopted(config: FirstStageConfig, about: Mapping[str, Any]) -> FirstStageConfig:
    """The options with the network's own replaced by those of a described first stage."""
    network = about["ddconfig"]
    return replace(
        config,
        kind=about["kind"],
        ch=network["ch"],
        ch_mult=list(network["ch_mult"]),
        num_res_blocks=network["num_res_blocks"],
        norm_groups=about.get("norm_groups", 32),
        z_channels=network["z_channels"],
        n_embed=about.get("n_embed") or config.n_embed,
        attn_resolutions=list(network["attn_resolutions"]),
        attention=network.get("attn_type", "vanilla") != "none",
    )


def given_options(config: FirstStageConfig, size: int) -> FirstStageConfig:
    """The options as the files of `weights` or `init_from` decide them; what differs from those given is said.

    Raises:
        UserError: nothing readable there, or a first stage of another kind.
    """
    given = [(name, path) for name in ("weights", "init_from") if (path := getattr(config, name))]
    if not given or config.kind == "pixels":
        return config
    (name, path), *_ = given
    model = load_first_stage(Path(path), config, size, f"first_stage.{name}")
    found = adopted(config, describe(model, size))
    changed = [
        f"{field.name} {getattr(found, field.name)} instead of {getattr(config, field.name)}"
        for field in fields(AutoencoderOptions)
        if getattr(found, field.name) != getattr(config, field.name)
    ]
    if changed and is_main_process():
        print(
            f"--first_stage.{name} {path} decides how the first stage is built: {', '.join(changed)}", file=sys.stderr
        )
    return found


def load_first_stage(
    path: Path, config: FirstStageConfig, size: int, option: str = "first_stage.weights"
) -> AutoencoderKL | VQModel:
    """A first stage built as its file says: .safetensors or .ckpt in the authors' names, or a diffusers `vae/` folder.

    The authors' checkpoints have 32 groups everywhere, as their code; .safetensors that say nothing of themselves are
    built as the options say.

    Raises:
        UserError: no such file, a damaged one, one that does not fit what it says or the options, or of another kind.
    """
    label = f"{option} {path}"
    if path.is_file() and path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        path = path.parent  # a component of a diffusers folder
    if path.is_dir():
        model = autoencoder_from_diffusers_dir(path)
    elif not path.is_file():
        raise UserError(f"{label}: no such file or directory")
    else:
        state, about = first_stage_in(path, option)
        if about is None and path.suffix != ".safetensors":
            about = infer_first_stage_config(state, size)
        if about is None:
            plain = build_first_stage(config, size)
            assert isinstance(plain, (AutoencoderKL, VQModel))
            model, against = plain, "the first_stage options"
        else:
            model, against = build_described(about, config.legacy_beta), "what the file says of itself"
        check_weights(state, model.state_dict(), label, against)
        model.load_state_dict(state)
    kind = "kl" if isinstance(model, AutoencoderKL) else "vq"
    if kind != config.kind:
        raise UserError(
            f"{label} holds a first stage of kind {kind}: give --first_stage.kind {kind}, not {config.kind}"
        )
    refuse_not_finite(model, path)
    return model


def freeze(model: FirstStage) -> FirstStage:
    return model.eval().requires_grad_(False)  # type: ignore[return-value]


@torch.no_grad()
def reconstruct(model: FirstStage, images_uint8: Tensor, batch_size: int = 100) -> Tensor:
    """Encode and decode uint8 images [N, 3, H, W]; deterministic (posterior mean)."""
    parts = []
    for x in images_uint8.split(batch_size):
        moments = model.moments(to_unit(x))
        mean = moments.chunk(2, dim=1)[0] if isinstance(model, AutoencoderKL) else moments
        parts.append(to_uint8(model.decode_latent(mean)))
    return torch.cat(parts)
