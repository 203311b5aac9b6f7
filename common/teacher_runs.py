"""Runs that train students of one frozen teacher: the folder with the students that are finished, by arm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from common.cli import read_run_config
from common.errors import UserError
from common.processes import is_main_process
from common.teacher import Teacher
from common.training import OpenedOptions, accelerator_device, refuse_other_inputs
from common.weights import restore_trained, save_weights, trained_state

WEIGHTS = "student.safetensors"  # of an arm, in its folder


class TeacherOptions(OpenedOptions, Protocol):
    """What the options of such a run have."""

    @property
    def teacher(self) -> str: ...
    @property
    def dtype(self) -> str: ...


C = TypeVar("C", bound=TeacherOptions)
S = TypeVar("S", bound=nn.Module)


@dataclass
class TeacherRun(Generic[C, S]):
    """One run with options C and students S; `seconds` holds the wall times of what was done in this process."""

    config: C
    folder: Path
    teacher: Teacher
    seconds: dict[str, float] = field(default_factory=dict)

    config_class: ClassVar[type[Any]]

    @classmethod
    def existing(cls, folder: Path) -> Self:
        """A run that train.py has finished; writes nothing.

        Raises:
            UserError: no run there, or its teacher was replaced.
        """
        config = read_run_config(cls.config_class, folder, "--run_dir")
        teacher = cls.load_teacher(config)
        refuse_other_inputs(folder, {"teacher": teacher.checksum})
        return cls(config, folder, teacher)

    @classmethod
    def load_teacher(cls, config: C) -> Teacher:
        """The run's teacher, on the device where the student will be trained."""
        return Teacher.load(config.teacher, accelerator_device(config.trainer), getattr(torch, config.dtype))

    def save(self, student: S, arm: str) -> None:
        """Keep the trained weights of a finished arm."""
        if is_main_process():
            save_weights(self.folder / arm / WEIGHTS, trained_state(student))

    def restore(self, student: S, arm: str) -> bool:
        """Load a finished arm; False if it is not finished."""
        return self.config.resume != "never" and restore_trained(student, self.folder / arm / WEIGHTS)

    def restored(self, student: S, arm: str, program: str) -> S:
        """`student` as the arm has it.

        Args:
            program: that trains it.

        Raises:
            UserError: it is not finished.
        """
        if not self.restore(student, arm):
            raise UserError(f"{self.folder / arm} is not finished; run {program} --run_dir {self.folder} first")
        return student
