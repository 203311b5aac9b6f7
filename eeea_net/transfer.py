"""Put a searched backbone under a detector, a segmentation or a pose network, beside others of equal MACs.

    python eeea_net/transfer.py --task detection --backbone runs/eeea_net-once_for_all/member_0
    python eeea_net/transfer.py --task segmentation --backbone EEEA_C1 --beside '[mobilenetv3]'
    python eeea_net/transfer.py --task pose --data.name photos --run_dir runs/pose-photos     # after make data-photos
    python eeea_net/transfer.py --task detection --beside '[runs/pc_darts-small/pc_darts/genotype.json]'
    python eeea_net/transfer.py --task detection --config eeea_net/configs/paper/transfer_detection.yaml

The defaults are in configs/transfer/TASK.yaml. Every backbone is first trained to classify (`pretrain`), then with the
task's head (`fit`), the same pictures, steps and seeds for each. Started again after an interruption (kill -9 too), a
run goes on where it stopped. A run folder holds config.yaml, table.md, metrics.json, predictions.png, and a folder for
each backbone with its checkpoints, log.csv, trained.json and model/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import run_main
from eeea_net.transfer_config import FREE_OPTIONS, TransferConfig, read_config


def run(config: TransferConfig, text: str) -> dict[str, Any]:
    """Everything that `config` asks for; `text` is its YAML. Returns what metrics.json holds.

    Raises:
        UserError: bad options, data or files.
    """
    # Torch is imported here, so that --help and a misspelt option answer at once.
    import torch

    from common.cpu import tune_allocator
    from common.training import open_run_folder
    from eeea_net.comparison import pick_device
    from eeea_net.transferring import Transfer

    if config.threads:
        torch.set_num_threads(config.threads)
    tune_allocator()
    folder = Path(config.run_dir)
    opened = open_run_folder(folder, config.resume, text, FREE_OPTIONS, {"data": ["data.path"]})
    transfer = Transfer(config, pick_device(config.device))
    plans = transfer.plans()
    opened.begin({"data": transfer.contents, "backbones": transfer.made_of(plans)})
    rows = []
    for plan in plans:
        rows.append(transfer.one(plan))
        content = transfer.write(rows)
    transfer.draw(plans)
    if config.progress:
        print(f"\n{(folder / 'table.md').read_text()}\npredictions: {folder / 'predictions.png'}", file=sys.stderr)
        print(f"trained networks: {folder / transfer.name(plans[0]) / 'model'}, ...", file=sys.stderr)
    return content


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns what metrics.json holds."""
    return run(*read_config(argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run_main(main)
