"""Which process this is, known from the launcher's variables before any Trainer exists."""

from __future__ import annotations

import os
import sys
from functools import cache


def is_main_process() -> bool:
    """Whether this process writes the shared files."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


@cache
def say_once(line: str) -> None:
    """A line on stderr, once and by one process."""
    if is_main_process():
        print(line, file=sys.stderr)
