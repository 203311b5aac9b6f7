"""A run folder: the students slam and lcm, each with its averaged weights and its exported pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from common.data.cache import fingerprint_strings
from common.data.captioned import Captioned
from common.data.pairs import StateTable
from common.errors import UserError
from common.options import free_options, refuse_large_batch
from common.teacher_runs import TeacherRun
from common.training import check_trainer, open_run
from slam.config import SlamConfig, SubPathConfig
from slam.data import open_pictures
from slam.model import Student, make_student

FREE_OPTIONS = free_options("evaluation", "baseline", "data.cache_text_gb")
PLACES = {"teacher": ["teacher"], "data": ["data.path"]}  # options that only say where an input lies


class Run(TeacherRun[SlamConfig, Student]):
    """One run; `seconds` holds the wall times of what was done in this process."""

    config_class = SlamConfig

    @classmethod
    def open(cls, config: SlamConfig, config_yaml: str) -> Run:
        """Create or continue `config.run_dir`; loads the teacher and looks at the data before anything is written.

        Raises:
            UserError: the folder holds another run or cannot be written, an option is wrong, or the teacher is.
        """
        check_options(config)
        opened = open_run(config, config_yaml, FREE_OPTIONS, PLACES)
        run = cls(config, opened.path, cls.load_teacher(config))
        run.new_student("slam")  # refuses what does not fit the teacher
        refuse_large_batch("trainer.batch_size", config.trainer.batch_size, len(run.pictures.captions))
        data = fingerprint_strings([run.pictures.fingerprint, *run.pictures.captions])
        opened.begin({"teacher": run.teacher.checksum, "data": data})
        return run

    @cached_property
    def pictures(self) -> Captioned:
        """The training pictures."""
        return open_pictures(self.config.data, "train", self.teacher.image_size[0], self.config.seed)

    def states(self, captions: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Caption numbers [b] to text states [b, L, D]; encoded once while `data.cache_text_gb` lasts."""
        return StateTable(self.teacher, int(self.config.data.cache_text_gb * 2**30)).numbered(captions)

    def subpath(self, name: str) -> SubPathConfig:
        """The options of a student; `lcm` is trained at gamma = 1 and is else the same."""
        return self.config.subpath if name == "slam" else replace(self.config.subpath, gamma="one")

    def new_student(self, name: str) -> Student:
        """A student as it starts."""
        torch.manual_seed(self.config.seed)
        return make_student(self.teacher, self.config.student, self.subpath(name)).to(self.teacher.device)

    def load(self, name: str = "slam") -> Student:
        """A finished student.

        Raises:
            UserError: it is not finished.
        """
        return self.restored(self.new_student(name), name, "slam/train.py")


def check_options(config: SlamConfig) -> None:
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
    if config.data.name == "shapes" and config.data.images == 0:
        raise UserError("--data.images 0: expected a number of at least 1 for --data.name shapes, which draws them")
    for steps in config.evaluation.steps:
        if steps > config.subpath.solver_steps:
            raise UserError(
                f"--evaluation.steps {steps}: expected at most --subpath.solver_steps {config.subpath.solver_steps}"
            )
    if config.loss.w_range:
        if len(config.loss.w_range) != 2 or config.loss.w_range[0] > config.loss.w_range[1]:
            raise UserError(f"--loss.w_range {config.loss.w_range}: expected two numbers, the least first")
        if config.subpath.gamma != "one" or config.student.kind != "full":
            raise UserError(
                "--loss.w_range is LCM's recipe, which embeds w where SLAM embeds gamma: expected --subpath.gamma one "
                "and --student.kind full"
            )
