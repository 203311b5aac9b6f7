"""On the path of a training under test: its ranks stand still after HELD_AFTER steps, until someone kills them.

Python imports this module by its name when it starts. Ranks that torchrun has started again go on.
"""

from __future__ import annotations

import os
import time
from typing import Any

if "RANK" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    from se_moe.trainer import Trainer

    made = Trainer.step

    def step(self: Trainer, *arguments: Any, **options: Any) -> Any:
        while self.done == int(os.environ["HELD_AFTER"]):
            time.sleep(1)
        return made(self, *arguments, **options)

    Trainer.step = step  # type: ignore[method-assign]
