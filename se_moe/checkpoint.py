"""Checkpoints: a file per expert, one for everything dense, and a step that is complete or absent.

    checkpoints/step-000100/
        meta.json                                options that decide the numbers, layout, step, checksums
        dense.safetensors                        dense parameters and moments as whole tensors, whoever sliced them
        experts/layer000.expert0003.safetensors  parameters, both moments and step count of one expert

Nothing in a checkpoint knows how many ranks wrote it, nor which switches were on: any number of ranks that divides the
experts may continue, with tiers or without. Expert files of a tiered run are hard links to the file tier's current
versions, which are never overwritten, so a checkpoint costs only what has changed. The folder gets its name when every
rank has written its part: a process killed at any moment leaves the last complete step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import claim, file_sha256, read_object, reading, write_atomically, write_json
from common.weights import load_weights, read_weights, save_weights
from se_moe.communication import ParallelGroups, barrier, gather
from se_moe.config import FIXED_OPTIONS, ModelConfig, TrainConfig
from se_moe.data import TextData
from se_moe.homes import ResidentHome, link_or_copy
from se_moe.model import MoELanguageModel, is_expert
from se_moe.storage import MOMENTS, ExpertKey, HostSlot, RecordLayout, parameters_of
from se_moe.trainer import Trainer

VERSION = 1
DENSE = "dense.safetensors"
_STEP = re.compile(r"step-(\d+)")


def expert_file(folder: Path, key: ExpertKey) -> Path:
    return folder / "experts" / f"layer{key.layer:03d}.expert{key.expert:04d}.safetensors"


def newest(folder: Path) -> Path | None:
    """The last complete step in a folder of checkpoints."""
    if not folder.is_dir():
        return None
    steps = sorted((int(m[1]), path) for path in folder.iterdir() if (m := _STEP.fullmatch(path.name)))
    return steps[-1][1] if steps else None


def step_of(folder: Path) -> int:
    """The step of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def newest_sound(folder: Path, groups: ParallelGroups) -> Path | None:
    """The last complete step whose files are what their checksums say; a collective call. Damaged ones are named.

    Raises:
        UserError: there are steps, and all of them are damaged.
    """
    fault = None
    steps = sorted((int(m[1]), path) for path in folder.glob("step-*") if (m := _STEP.fullmatch(path.name)))
    for _, step in reversed(steps):
        fault = next(filter(None, gather(_fault(step, groups.rank, groups.world_size))), None)
        if fault is None:
            return step
        if groups.rank == 0:
            print(f"{fault}; the step before it is taken, if there is one", file=sys.stderr, flush=True)
    if fault is not None:
        raise UserError(
            f"{fault}, and no earlier step is whole: restore it from a copy, or delete {folder} to train this arm anew"
        )
    return None


def _fault(step: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        meta = read_meta(step)
    except UserError as error:
        return str(error)
    if int(meta["step"]) != int(step.name.rpartition("-")[2]):
        return f"{step / 'meta.json'} is damaged (it is of step {meta['step']})"
    if "sha256" not in meta:
        if rank == 0:
            print(f"{step}: written before checkpoints had checksums, so it cannot be checked", file=sys.stderr)
        return None
    for name, checksum in sorted(meta["sha256"].items())[rank::ranks]:
        if not (step / name).is_file():
            return f"{step / name} is missing"
        if file_sha256(step / name) != checksum:
            return f"{step / name} is damaged (its checksum is not that of meta.json)"
    return None


def write_record(path: Path, layout: RecordLayout, fields: Mapping[str, Tensor]) -> None:
    """One expert as a safetensors file whose header fills whole blocks, as the file tier reads it."""
    slot = HostSlot(layout, pinned=False)
    for name, view in slot.fields.items():
        view.copy_(fields[name])
    content = slot.memory()[: layout.file_bytes]
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def save(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    """Write the present state as folder/step-NNNNNN; a collective call. Older steps beyond `keep` are removed."""
    target = folder / f"step-{trainer.done:06d}"
    part = folder / f".{target.name}.part"
    main = trainer.groups.rank == 0
    claimed = -1
    if main:
        shutil.rmtree(part, ignore_errors=True)
        (part / "experts").mkdir(parents=True)
        claimed = claim(part)
    barrier()
    written = _save_experts(trainer, part)
    dense = dense_state(trainer)
    if main:
        save_weights(part / DENSE, dense)
        written.append(part / DENSE)
    known = trainer.checksums
    checksums = {path.relative_to(part).as_posix(): _checksum(path, known) for path in written}
    checksums = {name: value for of_rank in gather(checksums) for name, value in of_rank.items()}
    if main:
        write_json(part / "meta.json", _meta(trainer) | {"sha256": checksums})
        for inside in (part, part / "experts"):
            _sync(inside)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
        os.close(claimed)
        _sync(folder)
        steps = sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name))
        for old in steps[:-keep]:
            # A folder that is being deleted must not look like a checkpoint.
            gone = old.with_name(f".{old.name}.gone.part")
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
    barrier()
    return target


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_experts(trainer: Trainer, folder: Path) -> list[Path]:
    """Returns the files of this rank."""
    groups, home = trainer.groups, trainer.home
    first_copy = groups.rank < groups.expert_size  # other ranks hold copies of the same experts
    if isinstance(home, ResidentHome):
        keys = sorted(home.parameters) if first_copy else []
        for key in keys:
            write_record(expert_file(folder, key), home.layout, home.record(key))
        return [expert_file(folder, key) for key in keys]
    tag = f"step-{trainer.done:06d}"
    home.store.commit(tag)
    keys = sorted(home.files.versions) if first_copy else []
    for key in keys:
        link_or_copy(home.files.path(key), expert_file(folder, key))
    home.files.prune([tag])
    return [expert_file(folder, key) for key in keys]


def _checksum(path: Path, known: dict[tuple[int, int, int], str]) -> str:
    """Of a file that was just written or linked; `known` are those of versions of experts that were linked before."""
    stat = path.stat()
    version = (stat.st_dev, stat.st_ino, stat.st_mtime_ns)
    if version not in known:
        known[version] = file_sha256(path)
    return known[version]


@torch.no_grad()
def dense_state(trainer: Trainer) -> dict[str, Tensor]:
    """Dense parameters and their moments as whole tensors by name, on every rank; a collective call."""
    model, optimiser = trainer.model, trainer.optimiser
    found: dict[str, Tensor] = {"step": torch.tensor([optimiser.step_count])}
    sources = {"": [p.detach() for p in optimiser.parameters]}
    sources |= {f"{moment}.": getattr(optimiser, moment) for moment in MOMENTS}
    values = [p.detach().clone() for p in optimiser.parameters]
    for prefix, tensors in sources.items():
        # What gathers parameters gathers moments as well: they take the parameters' place for a moment.
        for p, t in zip(optimiser.parameters, tensors):
            p.copy_(t)
        found |= {f"{prefix}{name}": t for name, t in _whole_parameters(trainer, model).items()}
        for p, value in zip(optimiser.parameters, values):
            p.copy_(value)
    return found


def _whole_parameters(trainer: Trainer, model: MoELanguageModel) -> dict[str, Tensor]:
    def read() -> dict[str, Tensor]:
        split = {id(p) for p in trainer.split}
        return {
            name: p.detach().cpu().clone()
            for name, p in model.named_parameters()
            if not is_expert(name) and id(p) not in split
        }

    if trainer.sharding is None:
        found = read()
    else:
        with trainer.sharding.whole():
            found = read()
    if trainer.split:
        found["wte.weight"] = model.wte.full().cpu().contiguous()
    return found


def _meta(trainer: Trainer) -> dict[str, Any]:
    return {
        "version": VERSION,
        "step": trainer.done,
        "fixed": fixed_options(trainer.config),
        "model": trainer.model.config.plain(),
        "data": trainer.data.fingerprint,
        "ranks": trainer.groups.world_size,
        "experts": [list(key) for key in _all_keys(trainer)],
    }


def _all_keys(trainer: Trainer) -> list[ExpertKey]:
    return [ExpertKey(i, e) for i, layer in enumerate(trainer.model.moe_layers()) for e in range(layer.num_experts)]


def fixed_options(config: TrainConfig) -> dict[str, Any]:
    """The options that decide a run's numbers, as plain JSON; of the data not where they lie."""
    found = json.loads(json.dumps({key: value for key, value in asdict(config).items() if key in FIXED_OPTIONS}))
    del found["data"]["tasks"]
    return found


def read_meta(step: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    file = step / "meta.json"
    kinds = {"version": int, "step": int, "fixed": dict, "model": dict, "experts": list}
    advice = f"not a checkpoint of this program; delete {step.name} or give another folder"
    meta = read_object(file, "not a checkpoint of this program", kinds, advice)
    if meta["version"] != VERSION:
        raise UserError(
            f"{file}: format {meta['version']}, expected {VERSION}; train anew or use the program that wrote it"
        )
    return meta


def open_trainer(
    config: TrainConfig,
    data: TextData,
    device: torch.device,
    groups: ParallelGroups,
    tier_folder: Path,
    step: Path | None = None,
    **options: Any,
) -> Trainer:
    """A trainer at its start, or at a checkpoint written by any number of ranks with any switches.

    Raises:
        UserError: the checkpoint belongs to other options, or lacks files.
    """
    if step is None:
        return Trainer(config, data, device, tier_folder, groups, **options)
    meta = read_meta(step)
    known = meta["fixed"]
    known["data"].pop("tasks", None)  # checkpoints of before the data's fingerprint have it
    changed = [key for key, value in fixed_options(config).items() if known.get(key) != value]
    if meta.get("data", data.fingerprint) != data.fingerprint:
        changed.append("the text of data.tasks")
    if changed:
        raise UserError(
            f"{step} was written with other options ({', '.join(changed)}); choose another --run_dir, or give the "
            "same options as before"
        )
    records = _own_records(config, groups, step, meta)
    trainer = Trainer(config, data, device, tier_folder, groups, records, **options)
    _load_dense(trainer, step)
    trainer.done = int(meta["step"])
    return trainer


def _own_records(
    config: TrainConfig, groups: ParallelGroups, step: Path, meta: Mapping[str, Any]
) -> dict[ExpertKey, Path]:
    experts = config.model.experts
    if experts % groups.expert_size:
        raise UserError(f"--model.experts is {experts}: it must be a multiple of the {groups.expert_size} expert ranks")
    per_rank = experts // groups.expert_size
    first = groups.expert_rank * per_rank
    keys = [ExpertKey(*pair) for pair in meta["experts"]]
    found = {key: expert_file(step, key) for key in keys if first <= key.expert < first + per_rank}
    missing = [path for path in found.values() if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: the expert's file is missing; delete {step.name}, the step before it is used")
    return found


@torch.no_grad()
def _load_dense(trainer: Trainer, step: Path) -> None:
    state = read_weights(step / DENSE)[0]
    optimiser, model = trainer.optimiser, trainer.model
    optimiser.step_count = int(state["step"])
    targets: list[tuple[str, list[Tensor]]] = [(f"{m}.", getattr(optimiser, m)) for m in MOMENTS]
    for prefix, moments in targets:
        _write_whole(trainer, model, state, prefix)
        for moment, p in zip(moments, optimiser.parameters):
            moment.copy_(p)
    _write_whole(trainer, model, state, "")


def _write_whole(trainer: Trainer, model: MoELanguageModel, state: Mapping[str, Tensor], prefix: str) -> None:
    """Whole tensors into the parameters, wherever their slices are."""
    split = {id(p) for p in trainer.split}

    def write() -> None:
        for name, p in model.named_parameters():
            if not is_expert(name) and id(p) not in split:
                p.copy_(state[f"{prefix}{name}"])

    if trainer.sharding is None:
        write()
    else:
        with trainer.sharding.whole(write=True):
            write()
    if trainer.split:
        model.wte.load_full(state[f"{prefix}wte.weight"].to(trainer.device))


def export_model(checkpoints: Path, folder: Path, tokenizer: str | None = None) -> Path:
    """The newest checkpoint's weights as one model folder: config.json, model.safetensors, tokenizer.json."""
    step = newest(checkpoints)
    if step is None:
        raise UserError(f"{checkpoints} holds no checkpoint; train a model first (make se_moe-train)")
    if fault := _fault(step):
        raise UserError(f"{fault}: restore it from a copy, or delete {step.name} and start again")
    meta = read_meta(step)
    weights = parameters_of(read_weights(step / DENSE)[0])
    config = ModelConfig.parse(meta["model"])
    layers = [i for i in range(config.layers) if config.has_experts(i)]
    for layer, expert in meta["experts"]:
        record = parameters_of(read_weights(expert_file(step, ExpertKey(layer, expert)))[0])
        stem = f"blocks.{layers[layer]}.moe.deepspeed_moe.experts.deepspeed_experts.{expert}"
        weights |= {f"{stem}.{name}": tensor for name, tensor in record.items()}
    save_weights(folder / "model.safetensors", weights)
    write_json(folder / "config.json", meta["model"])
    if tokenizer is not None:
        write_atomically(folder / "tokenizer.json", lambda path: path.write_text(tokenizer, encoding="utf-8"))
    return folder


def load_model(folder: str | Path) -> MoELanguageModel:
    """The model that `export_model` wrote, on one process, in evaluation mode.

    Raises:
        UserError: files are missing or do not fit together.
    """
    folder = Path(folder)
    with reading(folder / "config.json", "not the config of a trained model"):
        config = ModelConfig.parse(read_object(folder / "config.json", "not a trained model"))
    model = MoELanguageModel(config)
    load_weights(model, folder / "model.safetensors", against="config.json")
    return model.eval()
