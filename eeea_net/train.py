"""Evolve cells under error, parameters and MACs, train the chosen ones, and set them beside random search.

    python eeea_net/train.py                                  # configs/small.yaml: emoji, within minutes on 2 cores
    python eeea_net/train.py --config eeea_net/configs/smoke.yaml
    python eeea_net/train.py --data.name folder --data.path PHOTOS     # your own pictures, one subfolder per class
    python eeea_net/train.py --genotype EEEA_C                # no search: train a published cell (or a JSON file)
    python eeea_net/train.py --engine processes --workers 8   # networks are trained by eight processes; --engine ray
    python eeea_net/train.py --space once_for_all --run_dir runs/ofa          # the paper's second space, section 4.2
    python eeea_net/train.py --evolution.beta 3 --evolution.population 20     # any option can be overridden, see --help

Started again after an interruption (kill -9 too), a run goes on where it stopped, with identical generations. A run
folder holds config.yaml, table.md, metrics.json, comparison.png, evaluations.json (every trained network), and a folder
for each search (generations with their plots, pareto.json) and each chosen network (cells as SVG, checkpoint, model/).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import run_main
from eeea_net.config import FREE_OPTIONS, RunConfig, read_config


def run(config: RunConfig, text: str) -> dict[str, Any]:
    """Everything that `config` asks for; `text` is its YAML. Returns what metrics.json holds.

    Raises:
        UserError: bad options, data or files.
    """
    # Torch is imported here, so that --help and a misspelt option answer at once.
    import torch

    from common.cpu import tune_allocator
    from common.data.cache import names_of
    from common.data.classes import ImageSet
    from common.training import open_run_folder
    from eeea_net.comparison import Comparison, pick_device

    if config.threads:
        torch.set_num_threads(config.threads)
    tune_allocator()
    folder = Path(config.run_dir)
    opened = open_run_folder(folder, config.resume, text, FREE_OPTIONS, {"data": ["data.path"]})

    def begin(data: ImageSet) -> None:
        opened.begin({"data": data.contents, "classes": names_of(data.classes)})

    if config.space == "once_for_all":
        from eeea_net.shrinking import run as run_once_for_all

        content = run_once_for_all(config, pick_device(config.device), begin)
        if config.progress:
            print(f"\n{(folder / 'table.md').read_text()}\nmembers: {folder / 'member_0'}, ...", file=sys.stderr)
        return content
    comparison = Comparison(config)
    comparison.check()
    begin(comparison.data)
    if config.genotype is not None:
        searches, rows = {}, comparison.given(config.genotype)
    else:
        ours, rows = comparison.filtered()
        comparison.write(rows, {"eeea_net": ours})
        others, more = comparison.others(ours, rows[0].trained)
        searches, rows = {"eeea_net": ours, **others}, [*rows, *more]
    content = comparison.write(rows, searches)
    if config.progress:
        last = f"{rows[0].name if config.genotype is None else 'given'}/model"
        print(f"\n{(folder / 'table.md').read_text()}\ntrained networks: {folder / last}, ...", file=sys.stderr)
    return content


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns what metrics.json holds."""
    return run(*read_config(argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run_main(main)
