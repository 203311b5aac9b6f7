"""Which process this is, known from the launcher's variables before any Trainer exists."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this process writes the shared files."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


def process_place() -> tuple[int, int]:
    """(rank, processes) of this process: of the process group if there is one, else what the launcher says."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))), int(os.environ.get("WORLD_SIZE", "1"))
