"""Make a one-step text-to-image pipeline from a diffusion teacher: pairs, reflow, distillation, metrics.

    python train.py                                               # configs/small.yaml: a small teacher, on a laptop
    python train.py --teacher DIR --pairs.prompts prompts.txt     # any diffusers directory (Stable Diffusion 1.5, ...)
    python train.py --reflow.rounds 2                             # 3-rectified flow; 0 is direct distillation
    python train.py --student.stack separate                      # two U-Nets in series (the 1.7B model)
    python train.py --pairs.online true                           # pairs drawn afresh in every reflow step
    python train.py --trainer.devices 2 --trainer.strategy ddp                       # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --trainer.num_nodes 2 --trainer.devices 8 --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, reflow_1/, distil/ and perceptual/ (checkpoints, logs, sample grids, averaged weights),
reflowed/ and pipeline/ (the rectified flow and the one-step model as diffusers directories), metrics.json and
comparison.png.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.cli import parse_config
from common.errors import UserError, run_main
from instaflow.config import STAGES, InstaFlowConfig

if TYPE_CHECKING:
    from instaflow.training import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the configured stages; returns the metrics."""
    config, text = parse_config(InstaFlowConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    if not config.stages:
        raise UserError(f"--stages is empty; choose from {', '.join(STAGES)}")
    started = time.perf_counter()
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from instaflow.training import Run

    run: Run = Run.open(config, text)
    if "pairs" in config.stages and not (config.pairs.online and config.reflow.rounds) and not run.finished:
        run.teacher_pairs()
    if "reflow" in config.stages:
        run.reflow()
    if "distil" in config.stages:
        run.distil()
    if "perceptual" in config.stages and config.perceptual.steps:
        run.perceptual()
    metrics: dict[str, Any] = {}
    if run.is_main:
        run.export()
        if "evaluate" in config.stages:
            metrics = run.evaluate(seconds=time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    run_main(main)
