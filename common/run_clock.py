"""Wall time of a run over all its starts, kept in its folder with every checkpoint: a kill loses little of it."""

from __future__ import annotations

import time
from pathlib import Path

from common.files import read_object, write_json

SECONDS = "seconds.json"


class RunClock:
    """Of one run's folder; `earlier` are the seconds of the starts before this one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.earlier, self._began = folder, _kept(folder), time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self._began

    def keep(self) -> float:
        """Write the seconds so far and return them."""
        seconds = round(self.seconds, 1)
        write_json(self.folder / SECONDS, {"seconds": seconds})
        return seconds


_current: RunClock | None = None


def begin(folder: Path) -> None:
    """This process begins the run in `folder`, or goes on with it, now."""
    global _current
    _current = RunClock(folder)


def clock_of(folder: Path) -> RunClock:
    """The clock of the run that this process is in, or a new one of another folder."""
    same = _current is not None and _current.folder.absolute() == folder.absolute()
    return _current if same and _current is not None else RunClock(folder)


def keep_with(checkpoint: Path) -> None:
    """Keep the time of the run that has just written this checkpoint, if this process is in one."""
    if _current is not None and checkpoint.absolute().is_relative_to(_current.folder.absolute()):
        _current.keep()


def _kept(folder: Path) -> float:
    file, metrics = folder / SECONDS, folder / "metrics.json"
    if file.is_file():
        return float(read_object(file, kinds={"seconds": (int, float)})["seconds"])
    taken = read_object(metrics).get("seconds", 0.0) if metrics.is_file() else 0.0  # of a run before there was a clock
    taken = taken.get("total", 0.0) if isinstance(taken, dict) else taken
    return float(taken) if isinstance(taken, int | float) else 0.0
