"""Checkpoints of latent diffusion models between three homes, both ways, exactly.

    python ldm/convert.py --from compvis   --to ours      model.ckpt model.safetensors
    python ldm/convert.py --from compvis   --to diffusers model.ckpt folder/           --config the-authors.yaml
    python ldm/convert.py --from diffusers --to ours      folder/    model.safetensors
    python ldm/convert.py --from ours      --to compvis   model.safetensors model.ckpt
    python ldm/convert.py --from ours      --to diffusers runs/ldm-small folder/       # a finished run, float32

compvis    the authors' `.ckpt`: model.diffusion_model.*, first_stage_model.*, cond_stage_model.*, model_ema.*; their
           YAML is written, and read, beside it under the same name
ours       one .safetensors with the same names, averaged weights in place, and all else as JSON in its header;
           or a run folder, which holds one
diffusers  a folder with unet/, vae/ or vqvae/, bert/ (the paper's tau as LDMBertModel) or another text encoder,
           tokenizer/ and scheduler/

A model draws the same pictures in every home, or what cannot be carried there is named and nothing is written;
`--parts` then takes some of its networks alone. `--config` (a file of ldm/configs/paper or one of the authors' YAMLs)
is needed to go from one of the authors' `.ckpt` to diffusers: the number of attention heads is not in the weights.
"""

from __future__ import annotations

import json
import re
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
from common.weights import check_weights, not_finite, read_weights, save_weights, weight_shards
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.carried import (
    PREDICTIONS,
    authors_config,
    authors_yaml,
    authors_yaml_text,
    read_index,
    read_tokenizer_files,
    refuse_other_sampling,
    schedule_of_betas,
    schedule_of_scheduler,
    scheduler_config,
)
from ldm.conditioners import TransformerEmbedder
from ldm.diffusion import NoiseSchedule
from ldm.layouts import (
    StateDict,
    first_stage_from_diffusers,
    first_stage_to_diffusers,
    infer_first_stage_config,
    infer_unet_config,
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
Components = dict[str, tuple[StateDict, dict[str, Any]]]  # weights and config.json by folder
# Layout version that exported configs declare (the pinned diffusers).
_DIFFUSERS_VERSION = "0.42.1"


@dataclass
class Checkpoint:
    """Weights in the authors' names by part (unet, first_stage, conditioner), and what is known besides.

    config: arguments of the networks by part, `schedule` and `scale_factor`; from diffusers also `scheduler` and
        `pipeline`, its scheduler_config.json and model_index.json as they were.
    tokenizer: its files by name.
    """

    parts: dict[str, StateDict] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, str] = field(default_factory=dict)

    def only(self, parts: Sequence[str]) -> None:
        """Leave the other networks out, and with them the pipeline.

        Raises:
            UserError: one that it has not.
        """
        for part in parts:
            if part not in self.parts:
                raise UserError(f"--parts {part}: not in this checkpoint, which has {', '.join(self.parts)}")
        self.parts = {part: weights for part, weights in self.parts.items() if part in parts}
        self.config.pop("pipeline", None)
        if "conditioner" not in self.parts:
            self.tokenizer = {}

    def check(self) -> None:
        """Refuse networks that lack weights, or whose weights have other shapes or are not finite.

        Raises:
            UserError: naming the weight.
        """
        for part, weights in self.parts.items():
            if bad := not_finite(weights):
                raise UserError(f"{part}: {bad[0]} holds numbers that are not finite")
            with torch.device("meta"):
                network = self._network(part)
            if network is not None:
                check_weights(weights, network.state_dict(), part, "the network that is described")

    def _network(self, part: str) -> torch.nn.Module | None:
        weights, about = self.parts[part], self.config.get(part) or {}
        if part == "unet":
            return unet_of(about if "model_channels" in about else infer_unet_config(weights, num_heads=1))
        if part == "first_stage":
            found = infer_first_stage_config(weights)
            return autoencoder_of(
                found["ddconfig"], found["embed_dim"], found["n_embed"], norm_groups=about.get("norm_groups", 32)
            )
        if "transformer.token_emb.weight" not in weights:
            return None
        sizes = text_encoder_to_diffusers(weights, about.get("dim_head", 64))[1]
        head = "transformer.to_logits.weight" in weights
        return TransformerEmbedder(
            sizes["d_model"],
            sizes["encoder_layers"],
            sizes["vocab_size"],
            sizes["max_position_embeddings"],
            sizes["encoder_attention_heads"],
            sizes["head_dim"],
            logits_head=head,
        )


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
    if "betas" in state:
        found.config["schedule"] = schedule_of_betas(state["betas"])
    return found


def load_compvis(path: Path, ema: bool = True) -> Checkpoint:
    """Read one of the authors' checkpoints (weights only); see `split_compvis`. Of a YAML beside it under the same name
    the rest is taken."""
    found = split_compvis(read_state_dict(path), ema, f"checkpoint {path}")
    if path.suffix != ".safetensors" and authors_yaml(path).is_file():
        adopt_config(found, authors_yaml(path))
    return found


def adopt_config(checkpoint: Checkpoint, path: Path) -> None:
    """Take what a config says of the architecture; of noise levels and scale the checkpoint has the last word.

    Raises:
        UserError: the U-Net is of another network.
    """
    given = read_config(path)
    schedule = {**given.get("schedule", {}), **checkpoint.config.get("schedule", {})}
    if "unet" in checkpoint.parts and "unet" in given:
        with torch.device("meta"):
            expected = unet_of(given["unet"]).state_dict()
        check_weights(checkpoint.parts["unet"], expected, "the checkpoint", str(path))
        checkpoint.config["unet"] = given["unet"]
    checkpoint.config = {**given, **checkpoint.config, **({"schedule": schedule} if schedule else {})}


def read_config(path: Path) -> dict[str, Any]:
    """{unet, first_stage, conditioner, schedule, scale_factor} from configs/paper/*.yaml or the authors' YAML."""
    content = read_yaml(path, f"config {path}")
    if "model" not in content:
        if "unet" not in content:
            raise UserError(f'config {path}: expected "unet" (ldm/configs/paper) or "model" (the authors\' files)')
        if isinstance(content.get("first_stage"), str):
            zoo = read_yaml(path.parent / "first_stages.yaml")
            content["first_stage"] = zoo[content["first_stage"]]
        if content.get("schedule"):  # all models of the paper predict the noise, on levels linear in sqrt(beta)
            content["schedule"] = {"kind": "linear", "prediction": "epsilon", **content["schedule"]}
        return content
    params = content["model"].get("params", {})
    unet = dict(params.get("unet_config", {}).get("params", {}))
    unet.pop("use_checkpoint", None)
    prediction = params.get("parameterization", "eps")
    if prediction not in PREDICTIONS:
        raise UserError(f"config {path}: parameterization is {prediction!r}; expected {', '.join(PREDICTIONS)}")
    schedule = {
        "kind": params.get("beta_schedule", "linear"),
        "linear_start": params.get("linear_start", 1e-4),
        "linear_end": params.get("linear_end", 2e-2),
        "timesteps": params.get("timesteps", 1000),
        "prediction": PREDICTIONS[prediction],
    }
    result: dict[str, Any] = {"unet": unet, "schedule": schedule}
    first_stage = params.get("first_stage_config", {}).get("params", {})
    if "ddconfig" in first_stage:
        result["first_stage"] = {k: first_stage.get(k) for k in ("ddconfig", "embed_dim", "n_embed")}
    if "scale_factor" in params:
        result["scale_factor"] = params["scale_factor"]
    conditioner = params.get("cond_stage_config")
    if isinstance(conditioner, Mapping) and str(conditioner.get("target", "")).endswith("BERTEmbedder"):
        sizes = {k: v for k, v in conditioner.get("params", {}).items() if k not in ("device", "use_tokenizer")}
        result["conditioner"] = {"kind": "tau", **sizes}
    return result


def _json(path: Path) -> dict[str, Any]:
    return read_object(path)


_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16")


def _weight_file(folder: Path) -> Path:
    """The weights of a component of a diffusers folder, or the index of their shards.

    Raises:
        UserError: there are none.
    """
    for kind in ("safetensors", "bin"):
        for stem in _STEMS:
            for variant in _VARIANTS:
                for name in (f"{stem}{variant}.{kind}", f"{stem}.{kind}.index{variant}.json"):
                    if (folder / name).is_file():
                        return folder / name
    raise UserError(f"{folder}: no weights (expected diffusion_pytorch_model.safetensors or model.safetensors)")


def read_component(folder: Path) -> tuple[StateDict, dict[str, Any]]:
    """Weights (float32), whole or in shards, and config.json of one component of a diffusers folder."""
    config = _json(folder / "config.json")
    path = _weight_file(folder)
    if path.suffix == ".json" and ".bin." in path.name:
        state: StateDict = {}
        for shard in weight_shards(path, str(path)):
            state |= read_state_dict(shard)
    elif path.suffix == ".json":
        state = read_weights(path, "checkpoint")[0]
    else:
        state = read_state_dict(path)
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, config


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


_FOLDERS = {"unet": ["unet"], "first_stage": ["vae", "vqvae"], "conditioner": ["bert", "text_encoder"]}


def load_diffusers(path: Path) -> Checkpoint:
    """Every component of a diffusers folder that a latent diffusion model has.

    Raises:
        UserError: something in it that decides what is drawn and cannot be carried.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder (a diffusers pipeline or component)")
    found = Checkpoint()
    places = {
        part: folder
        for part, names in _FOLDERS.items()
        for folder in (path / name for name in names)
        if (folder / "config.json").is_file()
    }
    if not places and (path / "config.json").is_file():
        kind = str(_json(path / "config.json").get("_class_name", ""))
        places["unet" if kind.startswith("UNet") else "first_stage"] = path
    if not places:
        raise UserError(f"{path}: no unet/, vae/ or vqvae/ with a config.json in it")
    if index := read_index(path):
        found.config["pipeline"] = index
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
            prefix = "bert." if config.get("model_type") == "bert" else "transformer."
            found.parts[part] = {prefix + name: tensor for name, tensor in state.items()}
            found.config[part] = config
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        found.config["scheduler"] = _json(scheduler)
        found.config["schedule"] = schedule_of_scheduler(found.config["scheduler"])
    if (path / "tokenizer").is_dir():
        found.tokenizer = read_tokenizer_files(path / "tokenizer")
    return found


def load_ours(path: Path) -> Checkpoint:
    """A .safetensors with the authors' names and all else in its header, or the folder of a run with one."""
    folder = path / "tokenizer" if path.is_dir() else None
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors":
        return load_compvis(path)
    state, notes = read_weights(path, "checkpoint")
    found = split_compvis(state, what=f"checkpoint {path}")
    found.config |= described(notes, path)
    found.tokenizer = described(notes, path, "tokenizer")
    if folder and folder.is_dir():
        found.tokenizer = read_tokenizer_files(folder)
    return found


def described(notes: Mapping[str, str], path: Path, note: str = "config") -> dict[str, Any]:
    """What the header of one of our files says of the architecture (or its `tokenizer`); empty where it says nothing.

    Raises:
        UserError: it is damaged.
    """
    try:
        about = json.loads(notes.get(note, "{}"))
    except ValueError as error:
        raise UserError(f"{path}: the note `{note}` in its header is no JSON ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: the note `{note}` in its header is no JSON object")
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
    """A `.ckpt` that the authors' code loads (no averaged copies: the weights already are the ones to sample with),
    with their tables of noise levels, and their YAML beside it.

    Raises:
        UserError: their code would draw something else.
    """
    config = checkpoint.config
    kind = (config.get("conditioner") or {}).get("model_type")
    if kind and "conditioner" in checkpoint.parts:
        raise UserError(
            f"the authors' code cannot carry this text encoder ({kind}) and its tokenizer: convert --to ours, or leave "
            "it out with --parts unet first_stage"
        )
    if "scheduler" in config:
        refuse_other_sampling(config["scheduler"])
    state = to_compvis_names(checkpoint)
    schedule = config.get("schedule")
    if schedule and set(checkpoint.parts) != {"first_stage"}:
        state |= {name: table.clone() for name, table in _tables(schedule).items()}
    described_by = authors_config(config, checkpoint.parts)
    if "unet" in checkpoint.parts and "unet" in config:
        text = authors_yaml_text(described_by, authors_yaml(path))
        write_atomically(authors_yaml(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_atomically(path, lambda temporary: torch.save({"state_dict": state}, temporary))


def _tables(schedule: Mapping[str, Any]) -> StateDict:
    """The tables of a schedule under the authors' names."""
    given, steps = schedule.get("betas"), schedule.get("timesteps", 1000)
    ends = schedule["linear_start"], schedule["linear_end"]
    return NoiseSchedule(schedule.get("kind", "linear"), steps, *ends, betas=given).official_tables()


def save_ours(checkpoint: Checkpoint, path: Path) -> None:
    """The authors' names in one .safetensors, with all else as JSON in the header."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: our format is one .safetensors file; give a name that ends so")
    notes = {"config": json.dumps(checkpoint.config)}
    if checkpoint.tokenizer:
        notes["tokenizer"] = json.dumps(checkpoint.tokenizer)
    save_weights(path, to_compvis_names(checkpoint), notes)


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
    """A pipeline where diffusers has one, else component folders unet/, vae/ or vqvae/, bert/, scheduler/; load each of
    those with its class's `from_pretrained`.

    Raises:
        UserError: something that diffusers has not.
    """
    components: Components = {}
    config, index = checkpoint.config, checkpoint.config.get("pipeline") or {}
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
        usual = "vae" if converted[1]["_class_name"] == "AutoencoderKL" else "vqvae"
        components[next((name for name in ("vae", "vqvae") if name in index), usual)] = converted
    tau = checkpoint.parts.get("conditioner", {})
    about = config.get("conditioner") or {}
    bert = "bert.embeddings.word_embeddings.weight" in tau and "vae" in components
    learned = bert and not index and bool(about) and bool(checkpoint.tokenizer)
    if learned:
        components["vae"][1]["force_upcast"] = False
        components["text_encoder"] = text_component(_bare(tau), about)
    elif "transformer.token_emb.weight" in tau:
        components["bert"] = text_encoder_to_diffusers(tau, about.get("dim_head", 64))
    elif tau and "model_type" in about:
        components["text_encoder"] = _bare(tau), about
    elif tau:
        raise UserError(
            f"diffusers has no counterpart of the conditioner ({next(iter(tau))}, ...: class embeddings, map rescalers "
            "or a text encoder without its config): convert --to ours, or the rest with --parts unet first_stage"
        )
    if not index and not tau and "unet" in components:
        components, index = _unconditional(components)

    def fill(folder: Path) -> None:
        for name, (state, component) in components.items():
            _write_component(folder / name, state, component)
        if "scheduler" in config:
            _write_scheduler(folder / "scheduler", config["scheduler"])
        elif schedule := config.get("schedule"):
            _write_scheduler(folder / "scheduler", _scheduler_of(schedule))
        if checkpoint.tokenizer:
            (folder / "tokenizer").mkdir()
            for name, text in checkpoint.tokenizer.items():
                (folder / "tokenizer" / name).write_text(text, encoding="utf-8")
        if learned:
            _write_pipeline_files(folder)
        elif index and (folder / "scheduler").is_dir():
            _write_json(folder / "model_index.json", index)

    replace_folder(path, fill)


def _bare(weights: StateDict) -> StateDict:
    """A text encoder's weights by transformers' names."""
    return {re.sub(r"^(bert|transformer)\.", "", name): tensor for name, tensor in weights.items()}


def _scheduler_of(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of a schedule that was never diffusers'."""
    kind, levels = schedule.get("kind", "linear"), schedule.get("betas")
    ends, steps = (schedule["linear_start"], schedule["linear_end"]), schedule.get("timesteps", 1000)
    return scheduler_config(*ends, steps, schedule.get("prediction", "epsilon"), kind, levels)


def _unconditional(components: Components) -> tuple[Components, dict[str, Any]]:
    """The components and model_index.json of stock diffusers' pipeline without conditions, where these networks make
    one; else the components and nothing.
    """
    unet = components["unet"][1]
    stage = next((components[name] for name in ("vae", "vqvae") if name in components), None)
    plain = unet["_class_name"] == "UNet2DModel" and unet["in_channels"] == unet["out_channels"]
    if stage is None or not plain or not unet["sample_size"] or unet["num_class_embeds"]:
        return components, {}
    index = {
        "_class_name": "LDMPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vqvae": ["diffusers", stage[1]["_class_name"]],  # the pipeline's name of any autoencoder
    }
    return {"unet": components["unet"], "vqvae": stage}, index


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
    parser.add_argument("--parts", nargs="+", choices=tuple(PREFIXES), help="convert only these of its networks")
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
        adopt_config(checkpoint, options.config)
    if options.parts:
        checkpoint.only(options.parts)
    checkpoint.check()
    {"compvis": save_compvis, "ours": save_ours, "diffusers": save_diffusers}[options.target](
        checkpoint, options.output
    )
    for part, weights in checkpoint.parts.items():
        print(f"{part}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()) / 1e6:.1f}M parameters")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_main(main)
