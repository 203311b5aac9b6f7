"""A job whose worker dies the first time, for the tests of a search on several processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from eeea_net.proxy import evaluate


def dies_once(marker: str, **options: Any) -> dict[str, float]:
    """The job of a network, in a process that is killed before it answers, once."""
    place = Path(marker)
    if not place.exists():
        place.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(**options)
