"""On the path of a program under test: from step HELD_AFTER on it waits ten seconds after each, so that it can be hit.

It leaves a file in HELD_IN whose name is its rank and the number of its process. Python imports this module by its name
when it starts. Ranks that torchrun has started again do not wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    from common.stopping import Steps

    ended, done = Steps.ended, 0

    def held(self: Steps, save: Callable[[], str]) -> None:
        global done
        done += 1
        if done >= int(os.environ["HELD_AFTER"]):
            rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
            Path(os.environ["HELD_IN"], f"{rank}-{os.getpid()}").touch()
            time.sleep(10)
        ended(self, save)

    Steps.ended = held  # type: ignore[method-assign]
