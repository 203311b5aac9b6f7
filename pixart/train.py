"""Train PixArt-alpha: class-conditional DiT, re-parameterisation, dense captions, aesthetics at rising resolution.

    python pixart/train.py                                  # configs/small.yaml: the whole recipe on a laptop
    python pixart/train.py --stage stage2                   # one stage of it
    python pixart/train.py --config my.yaml                 # your recipe, or your single stage
    python pixart/train.py --trainer.threads 4              # any option can be overridden; --help lists them
    python pixart/train.py --config pixart/configs/emoji/recipe.yaml                # real captioned images, 64 px
    python pixart/train.py --stage stage2 --data.name folder --data.path PHOTOS     # your own captioned images
    python pixart/train.py --config pixart/configs/paper/dreambooth.yaml --data.path DOG --init_from WEIGHTS
    torchrun --nnodes 8 --nproc-per-node 8 ... pixart/train.py --config pixart/configs/paper/stage2.yaml

`--stage NAME` takes one stage of a recipe. Started again after an interruption, training continues where it stopped,
with the same losses as without the interruption; a finished stage is not repeated. A run folder holds one folder per
stage: config.yaml, checkpoints/, logs/, samples/, model/ (weights), metrics.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import run_main
from pixart.config import read_recipe

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the configured stages; returns their metrics by name."""
    description = f"{__doc__.splitlines()[0]} Beside the options below: --stage NAME takes one stage of a recipe."
    recipe = read_recipe(argv, description)
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from pixart.training import run_recipe

    return run_recipe(recipe)


if __name__ == "__main__":
    run_main(main)
