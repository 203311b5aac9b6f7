"""Checkpoints of latent diffusion models between three homes, both ways, exactly.

    python ldm/convert.py --from compvis   --to ours      model.ckpt model.safetensors
    python ldm/convert.py --from compvis   --to diffusers model.ckpt folder/           --config the-authors.yaml
    python ldm/convert.py --from diffusers --to ours      folder/    model.safetensors
    python ldm/convert.py --from ours      --to compvis   model.safetensors model.ckpt
    python ldm/convert.py --from ours      --to diffusers runs/ldm-small folder/       # a finished run, float32

compvis    the authors' `.ckpt`: model.diffusion_model.*, first_stage_model.*, cond_stage_model.*, model_ema.*
ours       one .safetensors with the same names, averaged weights in place, and the architecture as JSON in its header;
           or a run folder, which holds one
diffusers  a folder with unet/, vae/ or vqvae/, bert/ (the paper's tau as LDMBertModel) and scheduler/

`--config` (a file of ldm/configs/paper or one of the authors' YAMLs) is needed to go from a `.ckpt` to diffusers: the
number of attention heads is not in the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import read_object, read_yaml, replace_folder, write_atomically
from common.weights import check_weights, read_weights, save_weights
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.diffusion import make_betas
from ldm.layouts import (
    StateDict,
    first_stage_from_diffusers,
    first_stage_to_diffusers,
    text_encoder_from_diffusers,
    text_encoder_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ldm.model import UNet
from ldm.official import autoencoder_of, unet_of

PREFIXES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "conditioner": "cond_stage_model.",
}
# Layout version that exported configs declare (the pinned diffusers).
_DIFFUSERS_VERSION = "0.42.1"


@dataclass
class Checkpoint:
    """Weights in the authors' names by part (unet, first_stage, conditioner), and what is known of the architecture.

    tokenizer: the folder of the one that a run of ours has learned.
    """

    parts: dict[str, StateDict] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None


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
    if path.suffix == ".safetensors":
        return read_weights(path, "checkpoint")[0]
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
        elif first := next((k for k in state if k.endswith("input_blocks.0.0.weight")), None):
            prefix = first.removesuffix("input_blocks.0.0.weight")
            found.parts["unet"] = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        else:
            raise UserError(
                f"{what} is no latent diffusion model: expected names like model.diffusion_model.* or "
                f'encoder.*, found "{next(iter(state), "nothing")}"'
            )
    if "conditioner" in found.parts and "encoder.conv_in.weight" in found.parts["conditioner"]:
        del found.parts["conditioner"]  # inpainting conditions on the first stage itself, stored twice
    if ema and "unet" in found.parts:
        unet = found.parts["unet"]
        names = {name: "model_ema." + f"diffusion_model.{name}".replace(".", "") for name in unet}
        averaged = {name: state[key] for name, key in names.items() if key in state}
        if averaged and len(averaged) != len(unet):
            raise UserError(
                f"{what}: averaged weights (model_ema) exist for only {len(averaged)} of the U-Net's tensors"
            )
        found.parts["unet"] = averaged or unet
    if "scale_factor" in state:
        found.config["scale_factor"] = float(state["scale_factor"])
    return found


def load_compvis(path: Path, ema: bool = True) -> Checkpoint:
    """Read one of the authors' checkpoints (weights only); see `split_compvis`."""
    return split_compvis(read_state_dict(path), ema, f"checkpoint {path}")


def read_config(path: Path) -> dict[str, Any]:
    """{unet, first_stage, conditioner, schedule, scale_factor} from configs/paper/*.yaml or the authors' YAML."""
    content = read_yaml(path, f"config {path}")
    if "model" not in content:
        if "unet" not in content:
            raise UserError(f'config {path}: expected "unet" (ldm/configs/paper) or "model" (the authors\' files)')
        if isinstance(content.get("first_stage"), str):
            zoo = read_yaml(path.parent / "first_stages.yaml")
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
    return read_object(path)


def read_component(folder: Path) -> tuple[StateDict, dict[str, Any]]:
    """Weights (float32) and config.json of one component of a diffusers folder."""
    config = _json(folder / "config.json")
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for name in (f"{stem}{v}.{ext}" for ext in ("safetensors", "bin") for stem in stems for v in ("", ".fp16")):
        if (folder / name).is_file():
            state = read_state_dict(folder / name)
            return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, config
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
    """A .safetensors with the authors' names and the architecture in its header, or the folder of a run with one."""
    tokenizer = path / "tokenizer" if path.is_dir() else None
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors":
        return load_compvis(path)
    state, notes = read_weights(path, "checkpoint")
    found = split_compvis(state, what=f"checkpoint {path}")
    found.config |= described(notes, path)
    found.tokenizer = tokenizer if tokenizer and tokenizer.is_dir() else None
    return found


def described(notes: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The architecture in the header of one of our files; empty where it says nothing.

    Raises:
        UserError: it is damaged.
    """
    try:
        about = json.loads(notes.get("config", "{}"))
    except ValueError as error:
        raise UserError(f"{path}: the note `config` in its header is no JSON ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: the note `config` in its header is no JSON object")
    return about


def first_stage_in(path: Path, option: str) -> tuple[StateDict, dict[str, Any] | None]:
    """A first stage's tensors from a file of one or of a whole model, and what our files say of it (else None)."""
    notes: dict[str, str] = {}
    if path.suffix == ".safetensors":
        state, notes = read_weights(path, option)
    else:
        state = read_state_dict(path)
    prefix = PREFIXES["first_stage"]
    if whole := {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}:
        state = whole
    weights = {key: value for key, value in state.items() if not key.startswith("loss.")}
    return weights, described(notes, path).get("first_stage")


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
    state = to_compvis_names(checkpoint)
    write_atomically(path, lambda temporary: torch.save({"state_dict": state}, temporary))


def save_ours(checkpoint: Checkpoint, path: Path) -> None:
    """The authors' names in one .safetensors, with the architecture as JSON in the header."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: our format is one .safetensors file; give a name that ends so")
    save_weights(path, to_compvis_names(checkpoint), {"config": json.dumps(checkpoint.config)})


# The noise schedules of `make_betas` by diffusers' names; others are written as their betas.
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler_config(
    beta_start: float, beta_end: float, timesteps: int = 1000, prediction: str = "epsilon", schedule: str = "linear"
) -> dict[str, Any]:
    """Settings with which diffusers' DDIMScheduler equals the authors' DDIM sampler (golden diffusers_ddim_equal).

    Args:
        schedule: see `make_betas`; stock diffusers draws with the same noise levels.
    """
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"prediction {prediction!r}: expected epsilon, v_prediction or sample")
    betas = None if schedule in BETA_SCHEDULES else make_betas(schedule, timesteps, beta_start, beta_end).tolist()
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_component(folder: Path, state: StateDict, config: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    """Weights and config.json as diffusers and transformers name them.

    Args:
        dtype: of the stored weights; None leaves them as they are.
    """
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_weights(folder / f"{stem}.safetensors", state, {"format": "pt"}, dtype)


def _write_scheduler(folder: Path, values: dict[str, Any]) -> None:
    folder.mkdir()
    _write_json(folder / "scheduler_config.json", {"_class_name": "DDIMScheduler", **values})


def save_diffusers(checkpoint: Checkpoint, path: Path) -> None:
    """Component folders unet/, vae/ or vqvae/, bert/, scheduler/; load each with its class's `from_pretrained`."""
    components: dict[str, tuple[StateDict, dict[str, Any]]] = {}
    config = checkpoint.config
    if "unet" in checkpoint.parts:
        components["unet"] = unet_to_diffusers(checkpoint.parts["unet"], config.get("unet") or {})
    if "first_stage" in checkpoint.parts:
        ddconfig = (config.get("first_stage") or {}).get("ddconfig") or {}
        converted = first_stage_to_diffusers(
            checkpoint.parts["first_stage"],
            config.get("scale_factor") or 1.0,
            ddconfig.get("resolution", 256),
            (config.get("first_stage") or {}).get("norm_groups", 32),
        )
        components["vae" if converted[1]["_class_name"] == "AutoencoderKL" else "vqvae"] = converted
    tau = checkpoint.parts.get("conditioner", {})
    whole = "bert.embeddings.word_embeddings.weight" in tau and "conditioner" in config and checkpoint.tokenizer
    if whole:
        components["vae"][1]["force_upcast"] = False
        bert = {name.removeprefix("bert."): tensor for name, tensor in tau.items()}
        components["text_encoder"] = text_component(bert, config["conditioner"])
    elif "transformer.token_emb.weight" in tau:
        components["bert"] = text_encoder_to_diffusers(tau)
    elif tau:
        print("the conditioner has no counterpart in diffusers and is left out (class embeddings, map rescalers)")

    def fill(folder: Path) -> None:
        for name, (state, component) in components.items():
            _write_component(folder / name, state, component)
        if schedule := config.get("schedule"):
            start, end = schedule["linear_start"], schedule["linear_end"]
            timesteps, prediction = schedule.get("timesteps", 1000), schedule.get("prediction", "epsilon")
            values = scheduler_config(start, end, timesteps, prediction, schedule.get("kind", "linear"))
            _write_scheduler(folder / "scheduler", values)
        if whole and checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, folder / "tokenizer")
            _write_pipeline_files(folder)

    replace_folder(path, fill)


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
    schedule: str = "linear",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """A folder that plain `DiffusionPipeline.from_pretrained` opens as a stock StableDiffusionPipeline.

    Args:
        unet: cross-attention U-Net whose context is the text encoder's last hidden state.
        text_encoder: transformers BertModel; the pipeline calls it without attention mask (all tokens are seen).
        tokenizer: fast transformers tokenizer whose `model_max_length` is the text encoder's context length.
        beta_start, beta_end, timesteps, schedule: see `make_betas`.
        sample_size: side of the latents that the U-Net was trained on.
        scaling_factor: what the latents are multiplied by after encoding.
        prediction: epsilon, v_prediction or sample.
        dtype: of the stored weights.
    """
    scheduler = scheduler_config(beta_start, beta_end, timesteps, prediction, schedule)
    unet_weights, unet_config = unet_to_diffusers(unet.state_dict(), {**unet.config, "image_size": sample_size})
    vae_weights, vae_config = first_stage_to_diffusers(
        vae.state_dict(), scaling_factor, sample_size * vae.downsampling, vae.norm_groups
    )
    vae_config["force_upcast"] = False
    version = {"_diffusers_version": _DIFFUSERS_VERSION}
    parts = {
        "unet": (unet_weights, {**unet_config, **version}),
        "vae": (vae_weights, {**vae_config, **version}),
        "text_encoder": text_component(text_encoder.state_dict(), text_encoder.config.to_dict()),
    }

    def fill(folder: Path) -> None:
        for name, (weights, config) in parts.items():
            _write_component(folder / name, weights, config, dtype)
        _write_scheduler(folder / "scheduler", scheduler)
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        _write_pipeline_files(folder)

    replace_folder(path, fill)
    return path


def text_component(weights: StateDict, config: Mapping[str, Any]) -> tuple[StateDict, dict[str, Any]]:
    """Weights and config.json of a BertModel as stock pipelines load it."""
    if "pooler.dense.weight" not in weights:
        # BertModel always has a pooler; nothing reads it here, but a missing one is drawn at random on loading.
        width = config["hidden_size"]
        weights = {
            **weights,
            "pooler.dense.weight": torch.zeros(width, width),
            "pooler.dense.bias": torch.zeros(width),
        }
    # dtype float32: diffusers reads its own networks in float32 unless told otherwise, and transformers must follow.
    return weights, {**config, "architectures": ["BertModel"], "dtype": "float32"}


def _write_pipeline_files(folder: Path) -> None:
    """What makes components and a tokenizer a StableDiffusionPipeline."""
    tokenizer_config = folder / "tokenizer" / "tokenizer_config.json"
    # Newer transformers call the class by a name that older ones do not know.
    _write_json(tokenizer_config, {**_json(tokenizer_config), "tokenizer_class": "PreTrainedTokenizerFast"})
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        **{name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")},
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    homes = ("compvis", "ours", "diffusers")
    parser.add_argument("--from", dest="source", required=True, choices=homes, help="layout of the input")
    parser.add_argument("--to", dest="target", required=True, choices=homes, help="layout of the output")
    parser.add_argument("--config", type=Path, help="architecture: ldm/configs/paper/*.yaml or the authors' YAML")
    parser.add_argument("--no-ema", action="store_true", help="take the trained weights instead of their average")
    parser.add_argument("input", type=Path, help="file or directory to read")
    parser.add_argument("output", type=Path, help="file or directory to write")
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
            with torch.device("meta"):
                expected = unet_of(given["unet"]).state_dict()
            check_weights(checkpoint.parts["unet"], expected, "the checkpoint", str(options.config))
            checkpoint.config["unet"] = given["unet"]
    {"compvis": save_compvis, "ours": save_ours, "diffusers": save_diffusers}[options.target](
        checkpoint, options.output
    )
    for part, weights in checkpoint.parts.items():
        print(f"{part}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()) / 1e6:.1f}M parameters")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_main(main)
