"""Search a cell with PC-DARTS, draw it, retrain it, and set it beside DARTS, random search and random cells.

    python pc_darts/train.py                                  # configs/small.yaml: emoji, within 40 minutes on 2 cores
    python pc_darts/train.py --config pc_darts/configs/smoke.yaml
    python pc_darts/train.py --data.name folder --data.path PHOTOS     # your own pictures, one subfolder per class
    python pc_darts/train.py --genotype PC_DARTS_cifar        # no search: train a published cell (or a JSON file)
    python pc_darts/train.py --search.partial 2 --search.unrolled true  # any option can be overridden, see --help
    torchrun --nproc-per-node 8 pc_darts/train.py --config pc_darts/configs/imagenet.yaml --data.path IMAGENET

Started again after an interruption (kill -9 too), a run continues where it stopped, with identical alphas. A run folder
holds config.yaml, table.md, metrics.json, the derived cells as drawings, and a folder per arm with its checkpoint, log,
drawings of every epoch and trained network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.errors import run_main
from pc_darts.config import read_config


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns what metrics.json holds."""
    config, text = read_config(argv, __doc__.splitlines()[0])
    # Torch is imported here, so that --help and a misspelt option answer at once.
    from pc_darts.comparison import run

    return run(config, text)


if __name__ == "__main__":
    run_main(main)
