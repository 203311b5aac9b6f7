"""A finished student as a folder that stock diffusers samples from, and such folders (published ones too) as students.

full    LatentConsistencyModelPipeline: unet/ with `time_cond_proj_dim`, and the LCM scheduler on the student's grid.
        gamma = 1 embeds 0, which is what stock code sends for guidance_scale 1.
lora    pytorch_lora_weights.safetensors for `load_lora_weights` on the teacher, beside scheduler/.
fused   StableDiffusionPipeline with the adaptors merged; costs no more than the bare U-Net.

Guidance is inside the student: stock code must be called with guidance_scale 1, and negative prompts do nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.adaptors import adaptor_state, merge_adaptors, write_adaptors
from common.errors import UserError
from common.files import read_object, replace_folder
from common.pretrained import quiet_libraries, read_network
from common.teacher import NoiseSchedule, Teacher, load_parts, read_schedule
from slam.config import SlamConfig, SubPathConfig
from slam.model import Reading, Student, copy_unet
from slam.subpath import SubPaths

CARD = "slam.json"


def scheduler_config(teacher: Teacher, paths: SubPaths, reading: Reading) -> dict[str, Any]:
    """Of the LCM scheduler that takes the student's own times and reads it as it is read here."""
    return {
        **teacher.schedule.config,
        "num_train_timesteps": teacher.schedule.steps,
        "prediction_type": teacher.schedule.prediction_type,
        "original_inference_steps": paths.steps,
        "set_alpha_to_one": False,
        **reading.options(),
    }


def export(student: Student, teacher: Teacher, folder: Path, config: SlamConfig, subpath: SubPathConfig) -> Path:
    """Write the student below `folder`: pipeline/ if there is none yet, and lora/ for one that is made of adaptors.

    Returns:
        the pipeline's folder.
    """
    card = {
        "method": "SLAM" if subpath.gamma != "one" else "LCM",
        "teacher_sha256": teacher.checksum(),
        "guidance_inside": config.loss.w_range or config.loss.guidance + 1,
        "guidance_scale": [w + 1 for w in config.loss.w_range] or 1.0,
        "solver_steps": subpath.solver_steps,
        "time": subpath.time,
        "sigma": subpath.sigma,
    }
    unet, lora = student.unet, config.student.kind == "lora"
    if lora:
        adaptors = {name: (down.cpu(), up.cpu()) for name, (down, up) in adaptor_state(unet).items()}
        unet = copy_unet(teacher, None).cpu()
        merge_adaptors(unet, adaptors)
        if not (folder / "lora" / CARD).is_file():
            notes = {"teacher_sha256": teacher.checksum(), "guidance_scale": "1"}

            def fill_lora(target: Path) -> None:
                write_adaptors(target, adaptors, notes)
                lcm_scheduler(teacher, student.paths, student.reading).save_pretrained(target / "scheduler")
                (target / CARD).write_text(json.dumps(card, indent=1) + "\n")

            replace_folder(folder / "lora", fill_lora)
    target = folder / "pipeline"
    if not (target / "model_index.json").is_file():
        replace_folder(target, lambda place: write_pipeline(unet, teacher, student.paths, place, card))
    return target


def lcm_scheduler(teacher: Teacher, paths: SubPaths, reading: Reading) -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler(**scheduler_config(teacher, paths, reading))


@quiet_libraries()
def write_pipeline(
    unet: Any, teacher: Teacher, paths: SubPaths, folder: Path, card: dict[str, Any], reading: Reading | None = None
) -> None:
    """A diffusers directory around a U-Net; the other parts are the teacher's."""
    from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

    full = unet.config.time_cond_proj_dim is not None
    pipeline_class: Any = LatentConsistencyModelPipeline if full else StableDiffusionPipeline
    device = next(unet.parameters()).device
    unet = unet.cpu().to(memory_format=torch.contiguous_format)  # what files hold
    parts = {
        "vae": teacher.vae.cpu(),
        "text_encoder": teacher.text_encoder.cpu(),
        "tokenizer": teacher.tokenizer,
        "unet": unet,
        "scheduler": lcm_scheduler(teacher, paths, reading or Reading()),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipeline_class(**parts).save_pretrained(folder)
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
    teacher.to(device)
    unet.to(device)


def student_card(folder: Path) -> dict[str, Any]:
    """What is known of a student: the card in its folder, or above that of its U-Net; {} where there is none."""
    places = (folder / CARD, folder.parent / CARD if folder.name == "unet" else folder / CARD)
    return next((read_object(place) for place in places if place.is_file()), {})


def paths_of(schedule: NoiseSchedule, card: Mapping[str, Any], steps: int = 50) -> SubPaths:
    """The sub-paths that a card tells of, `steps` of them where it does not.

    Raises:
        UserError: it tells of none that there are.
    """
    told, sigma = card.get("solver_steps", steps), card.get("sigma", "quadrature")
    if not isinstance(told, int) or sigma not in ("quadrature", "linear"):
        raise UserError(f"{CARD}: solver_steps {told!r}, sigma {sigma!r}; expected what slam/train.py writes")
    return SubPaths(schedule, told, sigma)


def load_student(
    folder: Path, teacher: Teacher | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Student, Teacher]:
    """A student and the parts around it from a pipeline folder: ours, or a published one in the same layout.

    Args:
        teacher: the model whose text encoder and autoencoder go with a folder that holds a U-Net alone.

    Raises:
        UserError: not such a folder; its card says that it was trained as something else.
    """
    from diffusers import UNet2DConditionModel

    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        config, parts = load_parts(folder, dtype)
        around = Teacher(*parts, config, folder, distilled=True)  # its text encoder, autoencoder and schedule
        unet = parts[0]
    elif teacher is not None and (folder / "config.json").is_file():
        unet = read_network(UNet2DConditionModel, folder, torch_dtype=dtype)
        config, around = {"original_inference_steps": 50}, teacher
    else:
        raise UserError(f"{folder}: no model_index.json; expected a pipeline folder, or a U-Net's with --teacher")
    card = student_card(folder)
    schedule = read_schedule(config, str(folder)) if "beta_schedule" in config else around.schedule
    paths = paths_of(schedule, card, int(config.get("original_inference_steps", 50)))
    # Only an LCM scheduler's own options are the student's; others have defaults that were never meant for it.
    reading = Reading.of(config) if config.get("_class_name") == "LCMScheduler" else Reading()
    return Student(unet.eval().requires_grad_(False), paths, reading=reading), around
