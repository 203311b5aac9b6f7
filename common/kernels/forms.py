"""Which of an operation's equal forms is taken: one that somebody fixed, or one that was measured and is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from common.choices import Choices
from common.errors import UserError

UNMEASURED = "unmeasured"


class Forms:
    """The state of one operation's choice in this process.

    Args:
        what: "attention form", for messages.
        environment: variable that fixes a form where nobody else does.
        forms: their names.

    `choices` keeps what was measured, `taken` what this process has taken by its key, `fixed` is "auto", "unmeasured"
    (the default, whatever the machine) or a form.
    """

    def __init__(self, what: str, environment: str, forms: Sequence[str]) -> None:
        self.what, self.environment, self.forms = what, environment, tuple(forms)
        self.choices, self.fixed = Choices(), "auto"
        self.taken: dict[str, str] = {}
        self.fix("auto")

    def use_choices(self, choices: Choices | None) -> None:
        """Where measured forms are kept and read from now on, for example a run's folder; None: this process alone."""
        self.choices = choices or Choices()
        self.taken.clear()

    def fix(self, form: str) -> None:
        """The form from now on, or "unmeasured": the default. "auto" leaves it to the environment, and without that to
        measurement.

        Raises:
            UserError: no such form.
        """
        chosen = os.environ.get(self.environment, "auto") if form == "auto" else form
        expected = ("auto", UNMEASURED, *self.forms)
        if chosen not in expected:
            name = self.environment if form == "auto" else self.what
            raise UserError(f'{name} "{chosen}": expected one of {", ".join(expected)}')
        self.fixed = chosen

    @contextmanager
    def hold(self, form: str) -> Iterator[None]:
        """`fix` for the length of a block."""
        before = self.fixed
        self.fix(form)
        try:
            yield
        finally:
            self.fixed = before


def measured_apart(timed: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """timed(*arguments) in a thread of its own, which knows nothing of the caller's modes: autocast, inference,
    counters of operators, hooks on saved tensors. Torch's random state stays as it is.

    It has one core: a second pool of threads beside the caller's waits in another way than a run's own, which made
    forms of many small operations look slow. `time.thread_time` counts it without what other processes take.
    """
    threads = torch.get_num_threads()

    def alone() -> dict[str, float]:
        torch.set_num_threads(1)
        try:
            return timed(*arguments)
        finally:
            torch.set_num_threads(threads)  # some libraries know but one number for all threads

    with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(1) as other:
        return other.submit(alone).result()
