"""What a run leaves for stock diffusers: adaptors for `load_lora_weights`, and a folder with them merged.

lora/      pytorch_lora_weights.safetensors, beside it scheduler/ (DDIM that takes its one step at T and ends clean)
pipeline/  StableDiffusionPipeline with the adaptors merged; costs no more than the bare U-Net. An inpainting base's is
           a StableDiffusionInpaintPipeline

Guidance is inside the adaptors: stock code must be called with num_inference_steps=1 and guidance_scale=1, and negative
prompts do nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from common.adaptors import adaptor_card, adaptor_state, merge_adaptors, write_adaptors
from common.errors import UserError
from common.files import replace_folder
from common.options import check_ranges
from common.pretrained import quiet_libraries
from common.teacher import NoiseSchedule, Teacher
from hipa.config import HipaConfig, TaskConfig
from hipa.model import OneStep, bare_copy

CARD = "hipa.json"


def one_step_scheduler(schedule: NoiseSchedule) -> dict[str, Any]:
    """A DDIM scheduler of stock diffusers whose only step is at T and ends at the clean estimate.

    The default spacing ("leading") would begin at step 1, "linspace" at 0; the default end is not clean.
    """
    return {
        **schedule.config,
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "prediction_type": schedule.prediction_type,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,
    }


def card_of(teacher: Teacher, task: TaskConfig, guidance: float, time: int) -> dict[str, Any]:
    """What a reader of the files has to know."""
    return {
        "method": "HiPA",
        "task": vars(task),
        "time": time,
        "steps": 1,
        "guidance_scale": 1.0,
        "guidance_inside": guidance,
        "teacher_sha256": teacher.checksum(),
    }


def read_card(folder: Path) -> tuple[dict[str, Any], TaskConfig]:
    """(the card in or beside some weights, {} where there is none, the task that it names).

    Raises:
        UserError: the card is damaged.
    """
    file = (folder if folder.is_dir() else folder.parent) / CARD
    card = adaptor_card(folder, CARD, {"task": dict, "time": int, "guidance_inside": (int, float)})
    if not card:
        return {}, TaskConfig()
    try:
        task = TaskConfig(**card["task"])
        check_ranges(task, "task.")
        if task.name not in get_args(get_type_hints(TaskConfig)["name"]):
            raise UserError("unknown name")
    except (TypeError, UserError) as error:
        raise UserError(f"{file}: task {card['task']}: {error}; expected what hipa/train.py writes") from None
    return card, task


def export(student: OneStep, teacher: Teacher, folder: Path, config: HipaConfig) -> None:
    """Write lora/ and pipeline/ below `folder` where they are not there yet."""
    guidance = config.pairs.guidance if config.pairs.target == "teacher" else 1.0
    card = card_of(teacher, config.task, guidance, student.time)
    scheduler = one_step_scheduler(teacher.schedule)
    unet = student.unet
    if config.adaptor.placement != "full":
        adaptors = {name: (down.cpu(), up.cpu()) for name, (down, up) in adaptor_state(unet).items()}
        unet = bare_copy(teacher)
        merge_adaptors(unet, adaptors)
        if not (folder / "lora" / CARD).is_file():

            def fill(target: Path) -> None:
                write_adaptors(target, adaptors, {"teacher_sha256": teacher.checksum(), "guidance_scale": "1"})
                write_scheduler(target / "scheduler", scheduler)
                write_card(target, card)

            replace_folder(folder / "lora", fill)
    if not (folder / "pipeline" / "model_index.json").is_file():
        write_pipeline(unet, teacher, folder / "pipeline", config.task, scheduler, card)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def scheduler_of(config: Mapping[str, Any]) -> Any:
    import diffusers

    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return getattr(diffusers, str(config.get("_class_name", "DDIMScheduler"))).from_config(plain)


def write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    with quiet_libraries():
        scheduler_of(config).save_pretrained(folder)


@quiet_libraries()
def write_pipeline(
    unet: Any,
    teacher: Teacher,
    folder: Path,
    task: TaskConfig,
    scheduler: Mapping[str, Any],
    card: Mapping[str, Any],
) -> Path:
    """A diffusers directory around a U-Net; the other parts are the teacher's. A base has no card."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    pipeline_class: Any = StableDiffusionInpaintPipeline if task.name == "inpainting" else StableDiffusionPipeline
    device = next(unet.parameters()).device
    unet = unet.cpu().to(memory_format=torch.contiguous_format)  # what files hold
    parts = {
        "vae": teacher.vae.cpu(),
        "text_encoder": teacher.text_encoder.cpu(),
        "tokenizer": teacher.tokenizer,
        "unet": unet,
        "scheduler": scheduler_of(scheduler),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def fill(target: Path) -> None:
        pipeline_class(**parts).save_pretrained(target)
        if card:
            write_card(target, card)

    replace_folder(folder, fill)
    teacher.to(device)
    unet.to(device)
    return folder
