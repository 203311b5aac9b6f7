"""Which of several equal forms a run takes, measured on the machine at hand and kept in the run's folder.

Which of two equal forms is faster depends on the machine, so nothing is written down from one machine. But forms round
differently: a run that goes on must go on with the form it began with, and all processes must take the same one. So the
main process measures and writes the choice down, and everybody else, and every later start, reads it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.cpu import cpu_name
from common.errors import UserError
from common.files import read_object, reading, write_json
from common.processes import is_main_process

FILE = "choices.json"


class Choices:
    """Choices by their keys, for example {"precision": {"chosen": "32-true", "seconds": {...}, "cpu": "..."}}.

    Args:
        folder: of the run, which gets choices.json; None keeps them for this process only.
        patience: seconds that other processes wait for the main one's measurement.
    """

    def __init__(self, folder: Path | None = None, patience: float = 300.0) -> None:
        self.file = None if folder is None else folder / FILE
        self.patience = patience
        self._known: dict[str, dict[str, Any]] = {}

    def kept(self, key: str) -> dict[str, Any] | None:
        """The record of a choice that was made before: chosen, seconds, cpu."""
        if key not in self._known and self.file is not None and self.file.is_file():
            self._known = self._read(self.file)
        return self._known.get(key)

    def choose(
        self,
        key: str,
        measure: Callable[[], Mapping[str, float]],
        *,
        default: str,
        margin: float = 0.0,
        together: bool = True,
        pick: Callable[[Mapping[str, float]], str] | None = None,
    ) -> str:
        """The form to take: the one on record, else the fastest by measurement.

        Args:
            measure: returns seconds by form; called at most once a key, on the main process.
            default: is taken unless another form is faster by more than `margin` (0.1 is 10 %), so that equal machines
                choose alike.
            together: all processes ask for this key at the same place of the program. Else whichever asks first
                measures for all: the main process may be waiting for the asking one in a collective operation.
            pick: another rule than the fastest, from the seconds by form.
        """
        record = self.kept(key)
        if record is not None:
            return str(record["chosen"])
        if self.file is None or (together and is_main_process()):
            return self._measure(key, measure, default, margin, pick)
        if together:
            return str(self._wait(key)["chosen"])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # a process that dies lets go
            record = self.kept(key)
            return self._measure(key, measure, default, margin, pick) if record is None else str(record["chosen"])
        finally:
            os.close(handle)

    def _measure(
        self,
        key: str,
        measure: Callable[[], Mapping[str, float]],
        default: str,
        margin: float,
        pick: Callable[[Mapping[str, float]], str] | None,
    ) -> str:
        seconds = dict(measure())
        fastest = min(seconds, key=lambda form: seconds[form])
        wins = seconds[default] > (1 + margin) * seconds[fastest]
        chosen = pick(seconds) if pick else fastest if wins else default
        if self.file is not None and self.file.is_file():
            self._known = self._read(self.file)  # another key may have come meanwhile
        self._known[key] = {"chosen": chosen, "seconds": seconds, "cpu": cpu_name()}
        if self.file is not None:
            write_json(self.file, self._known)
        return chosen

    def _wait(self, key: str) -> dict[str, Any]:
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            record = self.kept(key)
            if record is not None:
                return record
            time.sleep(0.05)
        raise UserError(f"{self.file}: the main process has not written its choice of {key} within {self.patience:g} s")

    @staticmethod
    def _read(file: Path) -> dict[str, dict[str, Any]]:
        with reading(file, "expected a choice by each name; delete it, and the run measures anew"):
            return {key: {**record, "chosen": str(record["chosen"])} for key, record in read_object(file).items()}
