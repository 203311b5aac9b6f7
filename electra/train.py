"""Pre-train ELECTRA: generator and discriminator on English text, then fine-tune and compare.

    python electra/train.py                                     # configs/small.yaml: 40 minutes on 2 CPU cores
    python electra/train.py --config electra/configs/smoke.yaml # the whole path in a minute
    python electra/train.py --data.corpus FOLDER --arms '[electra]' --run_dir runs/mine     # your own .txt files
    python electra/train.py --config electra/configs/paper_small.yaml --data.corpus datasets:Skylion007/openwebtext
    python electra/train.py --trainer.devices 2 --trainer.strategy ddp                      # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... electra/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Every option of the config file can be overridden; --help lists them. Started again after an interruption, it continues
where it stopped, with the same losses as without the interruption. A run folder holds config.yaml, tokenizer/,
metrics.json, table.md, curves.png and a folder an arm: checkpoints/, logs/, and the transformers directories
discriminator/ (for the MLM arms encoder/) and generator/.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import parse_config
from common.errors import run_main
from electra.config import ElectraRun

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pre-train the configured arms, fine-tune them, and return the metrics."""
    config, text = parse_config(ElectraRun, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from common.files import read_object, write_atomically
    from common.processes import is_main_process
    from common.training import write_metrics
    from electra.evaluate import fine_tune, format_table, markdown_tables
    from electra.figures import draw_curves
    from electra.run import Run

    started = time.perf_counter()
    run = Run.open(config, text)
    arms = run.arms()
    for arm in arms:
        if config.resume == "auto" and arm.finished:
            if is_main_process():
                print(f"{arm.folder}: trained already", file=sys.stderr)
        else:
            run.pretrain(arm)
    if not is_main_process():
        return {}

    draw_curves(run.folder, [arm.folder for arm in arms])
    found: dict[str, Any] = {"arms": {arm.name: read_object(arm.folder / "arm.json") for arm in arms}}
    if run.tasks:
        began = time.perf_counter()
        found["downstream"] = fine_tune(run.tasks, config.downstream, {arm.name: arm.encoder for arm in arms})
        run.seconds["downstream"] = time.perf_counter() - began
        print(format_table(found["downstream"]))
    trained = any(arm.name in run.seconds for arm in arms)
    found = write_metrics(run.folder / "metrics.json", found, run.seconds, time.perf_counter() - started, trained)
    tables = markdown_tables(found)
    write_atomically(run.folder / "table.md", lambda path: path.write_text(tables, encoding="utf-8"))
    return found


if __name__ == "__main__":
    run_main(main)
