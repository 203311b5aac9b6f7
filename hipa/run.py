"""A run folder: the base of its task, the adaptors of each arm, and what is exported of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from common.data.cache import fingerprint_strings
from common.data.pairs import StateTable
from common.errors import UserError
from common.metrics.judge import judge_of
from common.options import free_options, refuse_large_batch
from common.teacher import Teacher
from common.teacher_runs import WEIGHTS, TeacherRun
from common.training import accelerator_device, check_trainer, open_run
from hipa.config import HipaConfig, LossConfig
from hipa.data import needs_pictures, open_pictures, teacher_source, training_prompts
from hipa.frozen import spare_memory
from hipa.losses import AdaptationLoss
from hipa.model import OneStep, make_student
from hipa.tasks import extra_channels, has_picture_input, start_time

# What two starts of one run may disagree on: none of it changes the trained weights.
FREE_OPTIONS = free_options(
    "evaluation", "arms", "pairs.folder", "pairs.batch_size", "trainer.cache_text_gb", "trainer.cache_pictures_gb"
)
PLACES = {"teacher": ["teacher"], "prompts": ["pairs.prompts", "pairs.pictures"]}  # only say where an input lies
BASE = "base/pipeline"


class Run(TeacherRun[HipaConfig, OneStep]):
    """One run; `seconds` holds the wall times of what was done in this process."""

    config_class = HipaConfig

    @classmethod
    def open(cls, config: HipaConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; loads the teacher and looks at the data before anything is written.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the teacher is.
        """
        check_options(config)
        opened = open_run(config, config_yaml, FREE_OPTIONS, PLACES)
        run = cls(config, opened.path, cls.load_teacher(config))
        teacher, size = run.teacher, run.teacher.image_size[0]
        has_picture_input(config.task, teacher)
        teacher_source(teacher, config.pairs)  # which knows whether there is such a solver
        make_student(teacher, config.adaptor)  # refuses targets that this U-Net lacks
        prompts = training_prompts(config, size)
        pictures = open_pictures(config, "train", size).fingerprint if needs_pictures(config) else ""
        samples = len(prompts) if needs_pictures(config) else config.pairs.count
        refuse_large_batch("trainer.batch_size", config.trainer.batch_size, samples, "pairs")
        opened.begin({"teacher": teacher.checksum, "prompts": fingerprint_strings([pictures, *prompts])})
        return run

    @classmethod
    def load_teacher(cls, config: HipaConfig) -> Teacher:
        """The run's teacher, on the device where the student will be trained."""
        device, dtype = accelerator_device(config.trainer), getattr(torch, config.dtype)
        return Teacher.load(config.teacher, device, dtype, pictures=config.task.name in ("inpainting", "superres"))

    @property
    def needs_base(self) -> bool:
        """Whether the teacher has to become a base of the task first."""
        return extra_channels(self.config.task, self.teacher) > 0 and not has_picture_input(
            self.config.task, self.teacher
        )

    @cached_property
    def base(self) -> Teacher:
        """The frozen model that the adaptors are for: the teacher, or what it became for the task."""
        if not self.needs_base:
            return self.teacher
        if not (self.folder / BASE / "model_index.json").is_file():
            raise UserError(f"{self.folder / BASE} is not finished; run hipa/train.py --run_dir {self.folder} first")
        return Teacher.load(self.folder / BASE, self.teacher.device, getattr(torch, self.config.dtype), pictures=True)

    @property
    def time(self) -> int:
        """The training step at which the one step is taken."""
        return start_time(self.config.task, self.teacher.schedule)

    def states(self, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Prompt numbers [b] to text states [b, L, D]; encoded once while `trainer.cache_text_gb` lasts."""
        return StateTable(self.teacher, int(self.config.trainer.cache_text_gb * 2**30)).numbered(prompts)

    def loss(self, arm: str) -> AdaptationLoss:
        """Of an arm: whole, without the high-frequency part, or the squared error of pixels alone."""
        spare_memory(self.base.vae)
        return AdaptationLoss(loss_of(arm, self.config.loss), self.base.decode_differentiable, self.base.device)

    def new_student(self) -> OneStep:
        """A student as it starts; the same for every arm."""
        torch.manual_seed(self.config.seed)
        return make_student(self.base, self.config.adaptor, self.time)

    def frozen(self) -> OneStep:
        """The base itself in one step."""
        return OneStep(self.base.unet, self.base.schedule, self.time)

    def load(self, arm: str = "hipa") -> OneStep:
        """A finished student.

        Raises:
            UserError: it is not finished.
        """
        return self.restored(self.new_student(), arm, "hipa/train.py")

    @property
    def finished_arms(self) -> list[str]:
        """Arms whose weights are there, in the order of the configuration."""
        return [arm for arm in self.config.arms if (self.folder / arm / WEIGHTS).is_file()]


def loss_of(arm: str, options: LossConfig) -> LossConfig:
    """An arm's part of the loss: pixel and spatial leave out what HiPA adds to them."""
    if arm == "hipa":
        return options
    return replace(options, weight=0.0, spatial="mse" if arm == "pixel" else options.spatial)


def check_options(config: HipaConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """
    check_trainer(
        config.trainer,
        {"trainer.batch_size": config.trainer.batch_size},
        resume=config.resume,
        ema_decay=config.optimiser.ema_decay,
        grad_clip=config.optimiser.grad_clip,
    )
    if not config.arms or len(set(config.arms)) < len(config.arms):
        raise UserError(f"--arms {config.arms}: expected one or more of hipa, spatial, pixel, each once")
    AdaptationLoss(config.loss, lambda z: z, torch.device("cpu"))  # knows which switches go together
    if config.evaluation.judge is not None:
        judge_of(config.evaluation.judge)
    if config.task.name == "editing" and config.pairs.target == "data":
        raise UserError("--pairs.target data: no picture shows what an edit should look like; expected teacher")
    known = ("shapes", "emoji")
    if needs_pictures(config) and config.pairs.pictures is None and config.pairs.prompts not in known:
        raise UserError(
            f"--pairs.pictures is missing: --pairs.prompts {config.pairs.prompts} has no pictures; expected shapes, "
            "emoji or an image folder with captions"
        )
