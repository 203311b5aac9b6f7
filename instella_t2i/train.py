"""Train a one-dimensional binary tokenizer in two stages, then generators in its codes.

    python instella_t2i/train.py                                     # configs/small.yaml: real artwork, on a laptop
    python instella_t2i/train.py --stages tokenizer                  # stage 1 alone
    python instella_t2i/train.py --data.name folder --data.path PICTURES --run_dir runs/mine      # own pictures
    python instella_t2i/train.py --network.tokens 8 --run_dir runs/instella-8                     # fewer tokens
    python instella_t2i/train.py --network.quantizer vq --network.bits 10 --run_dir runs/vq       # a baseline
    python instella_t2i/train.py --trainer.devices 2 --trainer.strategy ddp                       # two processes

Stages: `tokenizer` trains encoder, quantizer and decoder at one size; `decoder` trains the decoder alone on several
sizes, from the frozen encoder's codes. Started again after an interruption, a run continues where it stopped, with the
same losses as without the interruption; finished stages are not repeated.

A run folder holds config.yaml, a folder a stage (checkpoints, logs, sample pictures, config.json and model.safetensors
of the tokenizer), metrics.json, table.md and reconstructions.png.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from instella_t2i.config import InstellaConfig

if TYPE_CHECKING:
    from instella_t2i.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the stages and measure them; returns the metrics."""
    config, text = parse_config(InstellaConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import write_metrics
    from instella_t2i.evaluate import evaluate_run
    from instella_t2i.run import Run, stages_of

    run = Run.open(config, text)
    for name, train_stage in STAGES.items():
        if name in stages_of(config) and not run.is_finished(name):
            with run.timed(name):
                train_stage(run)
    if not is_main_process():
        return {}
    metrics = evaluate_run(run)
    return write_metrics(run.folder / "metrics.json", metrics, run.seconds, time.perf_counter() - started)


def train_tokenizer(run: Run) -> None:
    """Stage 1: reconstruction, perceptual and adversarial loss; the bits' noise falls."""
    from instella_t2i.trainer import TokenizerTraining

    options = run.config.tokenizer
    module = TokenizerTraining(run.new_tokenizer(), options, run.config.data.flip, run.config.trainer, run.config.seed)
    fit(run, "tokenizer", module, run.pictures.table(), options.batch_size, options.steps)
    run.save_tokenizer(module.tokenizer, "tokenizer")


def train_decoder(run: Run) -> None:
    """Stage 2: the decoder alone, on several sizes."""
    from instella_t2i.data import open_pictures
    from instella_t2i.trainer import DecoderTraining

    config, options = run.config, run.config.decoder
    tokenizer = run.load_tokenizer("tokenizer")
    largest = open_pictures(config.data, "train", max(config.data.size, *options.sizes), config.seed)
    module = DecoderTraining(
        tokenizer, options, config.tokenizer, config.data, config.trainer, config.seed
    )
    fit(run, "decoder", module, largest.table(), options.batch_size, options.steps)
    run.save_tokenizer(module.tokenizer, "decoder")


def fit(run: Run, stage: str, module: Any, table: Any, batch_size: int, steps: int) -> None:
    """Train a stage on a table, with pictures on the way."""
    from common.data.sampling import StepDataModule
    from common.training import EveryNSteps, train
    from instella_t2i.evaluate import sheet

    config = run.config
    shown = run.held_out.images(range(min(config.evaluation.grid, len(run.held_out))))

    def show(step: int) -> None:
        module.eval()
        sheet(module.tokenizer, shown, run.folder / stage / "samples" / f"step_{step:06d}.png")
        module.train()

    every = config.trainer.sample_every
    train(
        run.folder / stage,
        module,
        StepDataModule(table, batch_size, steps, config.seed),
        config.trainer,
        steps=steps,
        batch_size=batch_size,
        resume=config.resume,
        optimisers=2,
        callbacks=[EveryNSteps(every, show)] if every else [],
    )


STAGES: dict[str, Callable[[Run], None]] = {"tokenizer": train_tokenizer, "decoder": train_decoder}

if __name__ == "__main__":
    run_main(main)
