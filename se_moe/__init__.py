"""SE-MoE (arXiv 2205.10034): `from se_moe import load_server`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from se_moe.inference import Server


def load_server(folder: str | Path, device_mb: float = 0, device: str = "auto") -> tuple[Server, Tokenizer]:
    """A model behind a ring of experts that fits a budget, and its vocabulary; `server.generate(ids, tokens)`.

    Args:
        folder: a run's `model/`, or one that serve.py saved.
        device_mb: memory of the device in MB; 0: no limit.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: there is none, it is damaged, or not even one section fits.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from se_moe.serve import load, start

    served, tokenizer = load(existing_path(folder))
    return start(served, device_mb, None, "eager", 1, chosen_device(device))[0], tokenizer
