"""What a checkpoint carries besides its networks' weights, between three homes: noise levels, how they are sampled, the
pipeline around the networks, its tokenizer, and the authors' YAML.

Whatever decides what is drawn is carried exactly, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from common.errors import UserError
from common.files import list_files, read_object
from ldm.diffusion import make_betas

# The noise schedules of `make_betas` by diffusers' names; others are written as their betas.
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # the authors' words and diffusers'


def scheduler_config(
    beta_start: float,
    beta_end: float,
    timesteps: int = 1000,
    prediction: str = "epsilon",
    schedule: str = "linear",
    betas: list[float] | None = None,
) -> dict[str, Any]:
    """Settings with which diffusers' DDIMScheduler equals the authors' DDIM sampler (golden diffusers_ddim_equal).

    Args:
        schedule: see `make_betas`; stock diffusers draws with the same noise levels.
        betas: the levels themselves, where no schedule says them.
    """
    if prediction not in PREDICTIONS.values():
        raise UserError(f"prediction {prediction!r}: expected epsilon, v_prediction or sample")
    if betas is None and schedule not in BETA_SCHEDULES:
        betas = make_betas(schedule, timesteps, beta_start, beta_end).tolist()
    return {
        "num_train_timesteps": timesteps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": BETA_SCHEDULES.get(schedule, "linear"),
        **({} if betas is None else {"trained_betas": betas}),
        "prediction_type": prediction,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def schedule_of_scheduler(values: Mapping[str, Any]) -> dict[str, Any]:
    """The noise levels of a scheduler_config.json as `{kind, linear_start, linear_end, timesteps, prediction}`, with
    `betas` in place of a kind where it lists them. Where diffusers' classes take their defaults, files mean them.

    Raises:
        UserError: a flow, or an unknown prediction.
    """
    kind, prediction = str(values.get("_class_name", "")), values.get("prediction_type") or "epsilon"
    if kind.startswith("FlowMatch") or values.get("use_flow_sigmas"):
        raise UserError(f"scheduler/scheduler_config.json: {kind} is a flow; expected the scheduler of a diffusion")
    if prediction not in PREDICTIONS.values():
        raise UserError(
            f"scheduler/scheduler_config.json: prediction_type is {prediction!r}; expected epsilon, v_prediction or "
            "sample"
        )
    names = {theirs: ours for ours, theirs in BETA_SCHEDULES.items()}
    named = values.get("beta_schedule") or "linear"
    schedule = {
        "kind": names.get(named, named),
        "linear_start": values.get("beta_start") or 1e-4,
        "linear_end": values.get("beta_end") or 2e-2,
        "timesteps": values.get("num_train_timesteps") or 1000,
        "prediction": prediction,
    }
    if values.get("trained_betas") is not None:
        schedule |= {"kind": "betas", "betas": [float(beta) for beta in values["trained_betas"]]}
    return schedule


def schedule_of_betas(betas_T: Tensor) -> dict[str, Any]:
    """The same (but for the prediction, which is not in it) of the table `betas` of an authors' checkpoint."""
    given = betas_T.double().numpy()
    known: dict[str, Any] = {}
    for kind, power in (("sqrt", 2), ("sqrt_linear", 1), ("linear", 1)):
        # Written by people with a few digits, which the table has in float32.
        start, end = (float(f"{value**power:.6g}") for value in (given[0], given[-1]))
        known = {"linear_start": start, "linear_end": end, "timesteps": len(given)}
        if np.allclose(make_betas(kind, len(given), start, end), given, rtol=2e-6, atol=0):
            return {"kind": kind, **known}
    if np.allclose(make_betas("cosine", len(given)), given, rtol=2e-6, atol=1e-9):
        return {"kind": "cosine", **known}
    return {"kind": "betas", "betas": given.tolist(), **known}


# Sampling that the authors' code does one way only, by what a scheduler_config.json may not say otherwise.
_AUTHORS_SAMPLE: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", None),
    "steps_offset": (1,),
    "set_alpha_to_one": (False,),
    "clip_sample": (False,),
    "thresholding": (False, None),
    "rescale_betas_zero_snr": (False, None),
    "use_karras_sigmas": (False, None),
}
# Where DDIMScheduler takes its default, files of diffusers mean it.
_DEFAULTS = {"steps_offset": 0, "set_alpha_to_one": True, "clip_sample": True}


def refuse_other_sampling(values: Mapping[str, Any]) -> None:
    """Raise UserError where the authors' samplers would draw something else than this scheduler."""
    kind = values.get("_class_name", "DDIMScheduler")
    if kind not in ("DDIMScheduler", "PNDMScheduler"):
        raise UserError(
            f"the authors' code has no sampler like the scheduler {kind}, and a .ckpt cannot say it: convert --to ours"
        )
    defaults = _DEFAULTS if kind == "DDIMScheduler" else {"steps_offset": 0, "set_alpha_to_one": False}
    for option, allowed in _AUTHORS_SAMPLE.items():
        value = values.get(option, defaults.get(option, allowed[0]))
        if value not in allowed:
            raise UserError(
                f"scheduler/scheduler_config.json: {option} is {value!r}, which the authors' code cannot do "
                f"({allowed[0]!r} alone) and a .ckpt cannot say: convert --to ours"
            )


# Parts of a pipeline that are carried, and those that draw nothing.
CARRIED = ("unet", "vae", "vqvae", "text_encoder", "bert", "tokenizer", "scheduler")
_DRAW_NOTHING = ("safety_checker", "feature_extractor")


def read_index(folder: Path) -> dict[str, Any] | None:
    """The model_index.json of a pipeline, without its parts that draw nothing; None where there is no pipeline.

    Raises:
        UserError: a part that is not carried.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        return None
    index = read_object(path)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{path}: _class_name names a pipeline of its own code; expected a pipeline of diffusers")
    for name, value in index.items():
        if not isinstance(value, list) or value[0] is None or name in CARRIED:
            continue
        if name not in _DRAW_NOTHING:
            raise UserError(
                f"{path}: its {name} ({value[-1]}) cannot be carried; expected a latent diffusion model of a U-Net, an "
                "autoencoder and one text encoder"
            )
        print(f"{folder / name}: draws nothing and is left out")
        index[name] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    return index


def read_tokenizer_files(folder: Path) -> dict[str, str]:
    """The files of a tokenizer by name.

    Raises:
        UserError: one that is no text.
    """
    found = {}
    for path in list_files(folder):
        try:
            found[path.name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: no text file, and only tokenizers of text files are carried") from None
    return found


def authors_config(config: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' YAML of a checkpoint: what their code, and `convert.py` again, need besides the weights.

    Raises:
        UserError: a fact of the networks that their code has not.
    """
    for part in ("unet", "first_stage"):
        groups = (config.get(part) or {}).get("norm_groups", 32)
        if part in parts and groups != 32:
            raise UserError(
                f"{part}: its GroupNorms have {groups} groups, the authors' code has 32 always: convert --to ours or "
                "diffusers"
            )
    params: dict[str, Any] = {}
    if schedule := config.get("schedule"):
        back = {theirs: ours for ours, theirs in PREDICTIONS.items()}
        params |= {name: schedule[name] for name in ("linear_start", "linear_end", "timesteps") if name in schedule}
        if schedule.get("kind") not in (None, "betas"):  # the tables in the .ckpt are the levels anyway
            params["beta_schedule"] = schedule["kind"]
        if "prediction" in schedule:
            params["parameterization"] = back[schedule["prediction"]]
    if config.get("scale_factor") is not None:
        params["scale_factor"] = float(config["scale_factor"])
    if unet := config.get("unet"):
        known = {name: value for name, value in unet.items() if name != "norm_groups" and value is not None}
        target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
        params["unet_config"] = {"target": target, "params": known}
        params["image_size"] = unet.get("image_size")
        params["conditioning_key"] = "crossattn" if unet.get("use_spatial_transformer") else None
    if stage := config.get("first_stage"):
        kind = "VQModelInterface" if stage.get("n_embed") else "AutoencoderKL"
        options = {"embed_dim": stage["embed_dim"], "ddconfig": stage["ddconfig"]}
        options |= {"n_embed": stage["n_embed"]} if stage.get("n_embed") else {}
        lossconfig = {"target": "torch.nn.Identity"}
        params["first_stage_config"] = {
            "target": f"ldm.models.autoencoder.{kind}",
            "params": {**options, "lossconfig": lossconfig},
        }
    conditioner = config.get("conditioner") or {}
    if "conditioner" not in parts:
        params["cond_stage_config"] = "__is_unconditional__"
    elif conditioner.get("kind") == "tau":
        if (conditioner.get("heads", 8), conditioner.get("dim_head", 64)) != (8, 64):
            raise UserError("conditioner: the authors' text encoder has 8 heads of 64 always: convert --to ours")
        names = ("n_embed", "n_layer", "vocab_size", "max_seq_len")
        sizes = {name: conditioner[name] for name in names if name in conditioner}
        params["cond_stage_config"] = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": sizes}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


_OURS = "# Written by ldm/convert.py beside the .ckpt of the same name: what its weights do not say.\n"


def authors_yaml(path: Path) -> Path:
    """Where the YAML of a .ckpt stands."""
    return path.with_suffix(".yaml")


def authors_yaml_text(content: Mapping[str, Any], path: Path) -> str:
    """The file's text.

    Raises:
        UserError: a file of somebody else's stands there.
    """
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(_OURS):
        raise UserError(f"{path}: this file would be replaced by the one that says what a .ckpt does not; move it away")
    return _OURS + yaml.safe_dump(dict(content), sort_keys=False)
