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

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import run_main
from pc_darts.config import FREE_OPTIONS, RunConfig, read_config


def run(config: RunConfig, text: str) -> dict[str, Any]:
    """Everything that `config` asks for; `text` is its YAML. Returns what metrics.json holds.

    Raises:
        UserError: bad options, data or checkpoints.
    """
    # Torch is imported here, so that --help and a misspelt option answer at once.
    from common.data.cache import names_of
    from common.training import open_run_folder
    from pc_darts.comparison import Comparison
    from pc_darts.training import open_machine

    folder = Path(config.run_dir)
    with open_machine(config.device, config.threads) as machine:
        opened = open_run_folder(folder, config.resume, text, FREE_OPTIONS, {"data": ["data.path"]})
        comparison = Comparison(config, machine)
        comparison.check()
        opened.begin({"data": comparison.data.contents, "classes": names_of(comparison.data.classes)})
        if config.genotype is not None:
            arms = [comparison.given(config.genotype)]
        else:
            ours = comparison.pc_darts()
            arms = [ours]
            comparison.write(arms)
            assert ours.search is not None
            budget = comparison.cost(ours.search)
            if config.compare.darts:
                arms.append(comparison.darts(budget))
                comparison.write(arms)
            if config.compare.random_search:
                arms.append(comparison.random_search(budget))
                comparison.write(arms)
            arms += comparison.random_cells()
        content = comparison.write(arms)
        if machine.main and config.progress:
            print(f"\n{(folder / 'table.md').read_text()}\nwritten to {folder}", file=sys.stderr)
        return content


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns what metrics.json holds."""
    return run(*read_config(argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run_main(main)
