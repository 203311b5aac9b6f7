"""Train a latent diffusion model: first stage, denoiser in its latent space, samples and metrics.

    python train.py                                        # configs/small.yaml: captions to emoji on a laptop
    python train.py --config configs/class.yaml            # another task; every task has a ready-made file
    python train.py --trainer.max_steps 500 --data.size 64 # any option can be overridden; --help lists them
    python train.py --data.name folder --data.path PHOTOS  # your own images (metadata.jsonl with "file_name", "text")
    python train.py --data.name shards --data.path "DIR/*.parquet"                   # data that do not fit one disk
    python train.py --trainer.devices 2 --trainer.strategy ddp                       # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --trainer.num_nodes 2 --trainer.devices 8 --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, first_stage/, diffusion/ (checkpoints, logs, sample grids), metrics.json and pipeline/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import UserError, run_main
from ldm.config import LdmConfig

if TYPE_CHECKING:
    from ldm.training import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the configured stages; returns the metrics."""
    config, text = parse_config(LdmConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    if not config.stages:
        raise UserError("--stages is empty; choose from first_stage, diffusion, evaluate")
    started = time.perf_counter()
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from ldm.training import Run

    run: Run = Run.open(config, text)
    if run.finished:
        print(f"{run.folder}: trained already", file=sys.stderr)
    elif config.stages != ["evaluate"]:
        run.train_first_stage()
        if "diffusion" in config.stages:
            run.train_diffusion()
    metrics: dict[str, Any] = {}
    if "evaluate" in config.stages and run.is_main:
        metrics = run.evaluate(seconds=time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    run_main(main)
