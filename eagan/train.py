"""Search a generator, then a discriminator for it, train the pair from scratch, and draw with it (EAGAN).

    python eagan/train.py                                           # configs/small.yaml: emoji, on a laptop
    python eagan/train.py --config eagan/configs/smoke.yaml         # the whole path in a minute
    python eagan/train.py --data.name folder --data.path PICTURES --data.only '[]' --run_dir runs/eagan-mine   # yours
    python eagan/train.py --genotype best_G,cifar10_D --run_dir runs/eagan-published           # no search
    python eagan/train.py --search.order coupled --run_dir runs/eagan-coupled                  # section 5.3
    python eagan/train.py --evaluation.engine processes             # the population on all cores; or ray
    python eagan/train.py --config eagan/configs/cifar10.yaml --data.path CIFAR                # the authors' recipe

Started again after an interruption (kill -9 too), a run continues where it stopped, with identical populations and
weights. A run folder holds config.yaml, stage_g/ and stage_d/ (rounds/ with everybody's genes, scores, samples and
front), genotype.json with its drawings, train/ (log, sample grids), model/ (the trained pair), metrics.json,
table.md and samples.png.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from eagan.config import RunConfig

if TYPE_CHECKING:
    from eagan.genotypes import Genes
    from eagan.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Search, train and measure; returns what metrics.json holds."""
    config, text = parse_config(RunConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch is imported here, so that --help and a misspelt option answer at once.
    from common.training import write_metrics
    from eagan.evaluate import measure_folder, report
    from eagan.run import Run, given_pair

    run = Run.open(config, text)
    pair = given_pair(config)
    if pair is None:
        found = run.search()
        assert found.generator is not None
        pair = found.generator, found.discriminator
    content: dict[str, Any] = {"generator": pair[0], "discriminator": pair[1] or "simple", "data": run.real.name}
    trained = train_pair(run, *pair) if config.train.steps else False
    if config.train.steps:
        with run.timed("evaluation"):
            run.reference()
            content |= measure_folder(run.folder, config.evaluation, run.final_images, str(run.device))
        if config.progress:
            report(content)
            print(
                f"the trained pair is in {run.folder / 'model'}, samples in {run.folder / 'samples.png'}",
                file=sys.stderr,
            )
    return write_metrics(
        run.folder / "metrics.json",
        content,
        run.seconds,
        time.perf_counter() - started,
        trained or not config.train.steps,
    )


def train_pair(run: Run, generator: Genes, discriminator: Genes | None) -> bool:
    """Train a pair from scratch and save it, unless that is done; whether it was done now."""
    from eagan.evaluate import grid
    from eagan.retraining import Training, save_pair

    config, model = run.config, run.folder / "model"
    if (model / "config.json").is_file():
        return False
    every = config.train.sample_every

    def look(step: int, averaged: Any) -> None:
        grid(averaged, run.folder / "train" / "samples" / f"step_{step:06d}.png", config.evaluation.batch_norm)

    training = Training(
        config.train,
        config.network,
        generator,
        discriminator,
        run.real,
        run.folder / "train",
        config.seed,
        config,
        run.device,
        config.precision == "bf16-mixed",
        (every, look) if every else None,
    )
    with run.timed("train"):
        averaged, finished = training.run()
    notes = {"data": run.real.name, "steps": config.train.steps, "augment": list(config.train.augment)}
    save_pair(model, averaged, finished, notes)
    return True


if __name__ == "__main__":
    run_main(main)
