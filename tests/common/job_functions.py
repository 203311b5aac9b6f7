"""Jobs for tests; light, since every worker imports this."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json


def square(number: int, folder: str, seconds: float = 0.0) -> dict[str, Any]:
    """Writes its result and returns it."""
    time.sleep(seconds)
    write_json(Path(folder) / f"{number}.json", number * number)
    return {"square": number * number, "pair": (number, 0.1 * number)}


def dies(folder: str, times: int) -> int:
    """Kills its process so many times, whoever runs it, and then says how often it was started."""
    started = len(list(Path(folder).iterdir()))
    (Path(folder) / str(started)).touch()
    if started < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return started + 1


def mistaken(name: str) -> None:
    raise UserError(f"{name}: no such thing")


def broken() -> None:
    raise ValueError("by design")
