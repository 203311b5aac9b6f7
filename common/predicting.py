"""The classes that a trained classifier gives the user's own pictures.

for path, name, share in label_pictures(network, about, Path("PHOTOS")): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.data.folders import Framing
from common.errors import UserError
from common.images import image_files, open_rgb

BATCH = 64


@torch.no_grad()
def label_pictures(
    network: nn.Module, about: Mapping[str, Any], path: Path, device: torch.device | str = "cpu"
) -> Iterator[tuple[Path, str, float]]:
    """(file, class, probability 0..1) of a picture, or of every picture below a folder in the order of their paths.

    Args:
        network: gives logits [B, K], or a tuple that begins with them.
        about: `classes`, `size` in pixels, and `mean` and `std` by channel in [0, 1] of the training pictures.

    Raises:
        UserError: no such file, no picture, or the network's answers are not finite.
    """
    if not path.exists():
        raise UserError(f"{path}: no such picture or folder of pictures")
    files = image_files(path) if path.is_dir() else [path]
    network = network.to(device).eval()
    for start in range(0, len(files), BATCH):
        chosen = files[start : start + BATCH]
        logits = network(torch.stack([_input(file, about) for file in chosen]).to(device))
        shares_BK = (logits[0] if isinstance(logits, tuple) else logits).float().softmax(1).cpu()
        if not torch.isfinite(shares_BK).all():
            raise UserError("the network's answers are not finite: its weights have run away; train again")
        best_B = shares_BK.argmax(1).tolist()
        yield from (
            (file, str(about["classes"][k]), float(shares_K[k])) for file, k, shares_K in zip(chosen, best_B, shares_BK)
        )


def _input(path: Path, about: Mapping[str, Any]) -> Tensor:
    """[C, size, size] as at evaluation: the middle, normalised; in grey where the network saw grey pictures."""
    framed = Framing(int(about["size"]))(Image.fromarray(open_rgb(path)), np.random.default_rng(0))
    if len(about["mean"]) == 1:
        grey = Image.fromarray(framed.permute(1, 2, 0).numpy()).convert("L")
        framed = torch.from_numpy(np.array(grey))[None]
    mean_C, std_C = (torch.tensor(about[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
    return (framed.float() / 255 - mean_C) / std_C


def told(found: Iterator[tuple[Path, str, float]]) -> list[dict[str, Any]]:
    """Print `FILE TAB CLASS TAB PROBABILITY` of every picture; returns the same as records."""
    records = []
    for path, name, share in found:
        print(f"{path}\t{name}\t{share:.4f}")
        records.append({"file": str(path), "class": name, "probability": share})
    return records
