"""What one step learns from: noises and the pictures that belong to them, as a table of the trainer.

Columns: x0 [C (+ picture's channels), H, W] what the step begins with, x1 [C, H, W] latents of its picture, prompt [],
and, where they fit in memory, `picture` [3, h, w]: x1 decoded to [0, 1] once instead of in every step.

Shape suffixes: N pairs, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.cache import FeatureCache, fingerprint_strings
from common.data.captioned import Captioned, open_captioned
from common.data.pairs import make_pairs, prompt_list
from common.data.sampling import TensorTable
from common.metrics.measures import EVALUATION_SEED, PromptSet, fixed_noise, held_out_prompts
from common.paths import cache_dir
from common.solvers import DiffusionSource
from common.teacher import Teacher
from hipa.config import HipaConfig, PairsConfig
from hipa.tasks import Inputs, many_steps

DRAWN = 256  # pairs of a task in a file of the cache


def open_pictures(config: HipaConfig, part: str, size: int) -> Captioned:
    """The pictures that tasks begin with, or that stand for the teacher's; train and test share none.

    Raises:
        UserError: `pairs.pictures` is none of the sets, no folder, or has too few pictures.
    """
    limit = config.pairs.count if part == "train" else config.evaluation.images
    name = config.pairs.pictures or config.pairs.prompts
    return open_captioned(name, part, size, limit, seed=config.seed, option="--pairs.pictures")  # type: ignore[arg-type]


def needs_pictures(config: HipaConfig) -> bool:
    return config.task.name != "text" or config.pairs.target == "data"


def training_prompts(config: HipaConfig, size: int) -> list[str]:
    """The prompts, by the numbers that stand in the column `prompt`."""
    if needs_pictures(config):
        return open_pictures(config, "train", size).captions
    return prompt_list(config.pairs.prompts, config.pairs.count)


def teacher_source(teacher: Teacher, pairs: PairsConfig) -> DiffusionSource:
    """The guided teacher with many steps."""
    return DiffusionSource(teacher, pairs.solver, pairs.steps, pairs.guidance)


def pair_table(config: HipaConfig, base: Teacher, progress: bool = True) -> Dataset:
    """The pairs of a run: made once, kept in the cache, shared with whoever wants the same.

    Args:
        base: the frozen model of the task.
    """
    pairs = config.pairs
    if not needs_pictures(config):
        folder = Path(pairs.folder) if pairs.folder else None
        prompts = prompt_list(pairs.prompts, pairs.count)
        source = teacher_source(base, pairs)
        return make_pairs(
            source, prompts, pairs.count, config.seed, pairs.batch_size, pairs.shard_size, folder, progress
        )
    pictures = open_pictures(config, "train", base.image_size[0])
    inputs = Inputs(config.task, base, pictures, config.seed)

    def drawn(rows: list[int]) -> dict[str, Tensor]:
        parts = []
        for first in range(0, len(rows), pairs.batch_size):
            some = rows[first : first + pairs.batch_size]
            x0_BCHW = inputs(some)
            if pairs.target == "data":
                x1_BCHW = base.encode_images(pictures.images(some).float() / 127.5 - 1)
            else:
                states = base.encode([pictures.captions[row] for row in some]).float()
                x1_BCHW = many_steps(base, x0_BCHW, states, pairs.steps, pairs.guidance, inputs.time)
            parts.append({"x0": x0_BCHW.half().cpu(), "x1": x1_BCHW.half().cpu()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    task, made = vars(config.task), (pairs.steps, pairs.guidance, pairs.target, config.seed)
    key = fingerprint_strings([base.checksum(), *map(str, [*task.items(), *made])])
    count = len(pictures.captions)
    name = f"{key[:12]}-{fingerprint_strings([pictures.fingerprint])[:12]}"
    place = Path(pairs.folder) if pairs.folder else cache_dir("hipa", "pairs", name)
    cache = FeatureCache.open_or_build(place, count, key, pictures.fingerprint, drawn, DRAWN, progress)
    columns = cache[slice(None)]
    return TensorTable({"x0": columns["x0"].float(), "x1": columns["x1"].float(), "prompt": torch.arange(count)})


def with_pictures(table: Dataset, base: Teacher, limit_gb: float) -> Dataset:
    """The same table with its pictures decoded, where they take at most `limit_gb`."""
    count = len(table)  # type: ignore[arg-type]
    height, width = base.image_size
    if count * 3 * height * width * 4 > limit_gb * 2**30:
        return table
    rows = table.__getitems__(range(count))  # type: ignore[attr-defined]
    with torch.no_grad():
        decoded = [base.decode_differentiable(part.to(base.device)).cpu() for part in rows["x1"].float().split(64)]
    picture_NCHW = (torch.cat(decoded) + 1) / 2
    return TensorTable({**{name: rows[name] for name in ("x0", "x1", "prompt")}, "picture": picture_NCHW})


def base_table(config: HipaConfig, teacher: Teacher, progress: bool = True) -> tuple[Dataset, Sequence[str]]:
    """(latents x1 of real pictures with what stands beside the noise, their captions): what a base learns from."""
    pictures = open_pictures(config, "train", teacher.image_size[0])
    inputs = Inputs(config.task, teacher, pictures, config.seed)

    def encoded(rows: list[int]) -> dict[str, Tensor]:
        x1_BCHW = teacher.encode_images(pictures.images(rows).float() / 127.5 - 1)
        return {"x1": x1_BCHW.half().cpu(), "beside": inputs.beside(rows).half().cpu()}

    key = fingerprint_strings([teacher.checksum(), *map(str, [config.task.name, config.task.scale, config.seed])])
    place = cache_dir("hipa", "bases", f"{key[:12]}-{fingerprint_strings([pictures.fingerprint])[:12]}")
    count = len(pictures.captions)
    cache = FeatureCache.open_or_build(place, count, key, pictures.fingerprint, encoded, DRAWN, progress)
    columns = {name: column.float() for name, column in cache[slice(None)].items()}
    return TensorTable({**columns, "prompt": torch.arange(count)}), pictures.captions


def evaluation_set(config: HipaConfig, base: Teacher, seed: int = EVALUATION_SEED) -> PromptSet:
    """Held-out prompts with what one step begins with, and real pictures where there are some.

    Args:
        seed: of noises and masks.
    """
    size, count = base.image_size[0], config.evaluation.images
    name = config.pairs.prompts
    if needs_pictures(config):
        name = config.pairs.pictures or name
    if not needs_pictures(config) or name in ("shapes", "emoji"):
        found = held_out_prompts(name, count, base.latent_shape, size)
        found = replace(found, noise=fixed_noise(len(found), base.latent_shape, seed))
    else:
        pictures = open_pictures(config, "test", size)
        rows = list(range(len(pictures.captions)))
        found = PromptSet(pictures.captions, fixed_noise(len(rows), base.latent_shape, seed), pictures.images(rows))
    if config.task.name == "text":
        return found
    assert found.reference is not None
    reference = found.reference
    inputs = Inputs(config.task, base, Captioned(found.prompts, lambda rows: reference[rows], ""), seed)
    rows = list(range(len(found)))
    return replace(found, noise=torch.cat([inputs(rows[i : i + 64]).cpu() for i in range(0, len(rows), 64)]))
