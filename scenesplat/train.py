"""Teach an encoder of Gaussians to answer with text features, and ask it about rooms that it has never seen.

    python scenesplat/train.py                                      # configs/small.yaml: furnished rooms, on a laptop
    python scenesplat/train.py --data.furniture all                 # every model that `make data-furniture` fetched
    python scenesplat/train.py --data.name scenes --data.path SCENES --text.encoder SIGLIP2    # own scenes
    python scenesplat/train.py --loss.schedule skip                 # without the contrastive loss
    python scenesplat/train.py --trainer.devices 2 --trainer.strategy ddp          # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... scenesplat/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, pretraining/ (checkpoints, logs, weights), model/ (what query.py asks), metrics.json,
table.md and room.png.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from scenesplat.config import SceneSplatConfig

if TYPE_CHECKING:
    from scenesplat.model import PointTransformer
    from scenesplat.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Lift labels, pre-train, export and measure; returns the metrics."""
    config, text = parse_config(SceneSplatConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import write_metrics
    from scenesplat.evaluate import evaluate_run
    from scenesplat.run import Run

    run = Run.open(config, text)
    network = pretrain(run)
    if not is_main_process():
        return {}
    folder = run.model(network).save(run.folder / "model")
    with run.timed("evaluation"):
        metrics = evaluate_run(run)
    total = time.perf_counter() - started
    found = write_metrics(run.folder / "metrics.json", metrics, run.seconds, total, "pretraining" in run.seconds)
    print(f"the trained model is {folder}; ask any splat:")
    print(f'  python scenesplat/query.py SCENE.ply "a chair" --model {folder}')
    return found


def pretrain(run: Run) -> PointTransformer:
    """Train the network on the training scenes, unless it is finished."""
    from common.steps import steps_of
    from scenesplat.run import fit
    from scenesplat.trainer import LanguagePretraining

    config = run.config
    network = run.new_network()
    if run.restore(network):
        return network
    with run.timed("scenes"):
        scenes = run.scenes("train")
    module = LanguagePretraining(
        network,
        run.text.embed(scenes.classes),
        config.loss,
        config.optimiser,
        **steps_of(config),
    )
    with run.timed("pretraining"):
        fit(module, scenes, run.folder / "pretraining", config)
    run.save(network.eval())
    return network


if __name__ == "__main__":
    run_main(main)
