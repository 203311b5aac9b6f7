"""Instella-T2I (arXiv 2506.21022): `from instella_t2i import load_tokenizer, load_painter`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instella_t2i.generation import Painter
    from instella_t2i.tokenizer import Tokenizer


def load_tokenizer(folder: str | Path, device: str = "auto") -> Tokenizer:
    """Pictures to a string of binary tokens and back: `tokenizer.encode(pixels)`, `tokenizer.decode(codes, side)`.

    Args:
        folder: a tokenizer's, as `decoder/` or `tokenizer/` of a run.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from instella_t2i.tokenizer import load_tokenizer as load

    return load(existing_path(folder), chosen_device(device))


def load_painter(run_dir: str | Path, by: str | None = None, device: str = "auto") -> Painter:
    """Text to pictures with the generators of a finished run; `painter.draw(kind, prompts, SamplingConfig(), seed)`.

    Args:
        by: diffusion or autoregression; None: all that the run has.

    Raises:
        UserError: the run has no such generator.
    """
    from common.options import chosen_device
    from common.paths import existing_path
    from instella_t2i.run import Run

    return Run.existing(existing_path(run_dir)).painter(by, chosen_device(device))
