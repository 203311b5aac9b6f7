"""Train PixArt-alpha: class-conditional DiT, re-parameterisation, dense captions, aesthetics at rising resolution.

    python pixart/train.py                                  # configs/small.yaml: the whole recipe on a laptop
    python pixart/train.py --stage stage2                   # one stage of it
    python pixart/train.py --config my.yaml                 # your recipe, or your single stage
    python pixart/train.py --trainer.threads 4              # any option can be overridden; --help lists them
    python pixart/train.py --config pixart/configs/emoji/recipe.yaml                # real captioned images, 64 px
    python pixart/train.py --stage stage3b --init_from pixart/pretrained/shapes --run_dir runs/own \
        --data.name folder --data.path PHOTOS                                       # your own captioned images
    python pixart/train.py --config pixart/configs/paper/dreambooth.yaml --data.path DOG --init_from WEIGHTS
    torchrun --nnodes 8 --nproc-per-node 8 ... pixart/train.py --config pixart/configs/paper/stage2.yaml

`--stage NAME` takes one stage of a recipe. Started again after an interruption, training continues where it stopped,
with the same losses as without the interruption; a finished stage is not repeated. A run folder holds one folder per
stage: config.yaml, checkpoints/, logs/, samples/, model/ (weights), metrics.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import run_main
from pixart.config import read_recipe

if TYPE_CHECKING:
    from pixart.run import Stage
    from pixart.sample import Painter


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages one after another; what is finished is not repeated. Returns the metrics by stage.

    The metrics of each evaluated stage go to its metrics.json; those of the last finished one, with the scores and
    times of all, to metrics.json of the recipe's folder.
    """
    description = f"{__doc__.splitlines()[0]} Beside the options below: --stage NAME takes one stage of a recipe."
    recipe = read_recipe(argv, description)
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from common.files import read_object
    from common.processes import is_main_process
    from pixart.run import Stage, check_options

    for config, _ in recipe.stages:  # of the last one too, before the first one takes its time
        check_options(config)
    metrics: dict[str, Any] = {}
    for config, text in recipe.stages:
        stage = Stage.open(config, text, recipe.names)
        painter: Painter | None = None
        if stage.finished:
            if is_main_process():
                print(f"{stage.folder}: trained already", file=sys.stderr)
        else:
            painter = stage.train()
        if is_main_process():
            metrics[config.name] = finish(stage, painter)
    if metrics and is_main_process():
        folder = Path(recipe.stages[-1][0].run_dir)
        files = {name: folder / name / "metrics.json" for name in recipe.names}
        write_summary(folder, {name: read_object(file) for name, file in files.items() if file.is_file()})
    return metrics


def finish(stage: Stage, painter: Painter | None) -> dict[str, Any]:
    """Grid and metrics of a trained stage, unless they are there already."""
    from common.files import read_object, write_json
    from common.run_clock import clock_of
    from pixart.evaluate import evaluate_stage

    file, grid = stage.folder / "metrics.json", stage.folder / "samples.png"
    measured = file.is_file() and painter is None
    if measured and grid.is_file():
        return read_object(file)
    started = time.perf_counter()
    painter = painter or stage.painter()
    stage.grid(painter, grid)
    if measured:
        return read_object(file)
    metrics: dict[str, Any] = evaluate_stage(stage, painter) if stage.config.evaluate else {"task": stage.config.kind}
    stage.seconds["evaluation"] = time.perf_counter() - started
    metrics["seconds"] = {name: round(value, 1) for name, value in stage.seconds.items()}
    if earlier := clock_of(stage.folder).earlier:
        metrics["seconds"]["earlier starts"] = round(earlier, 1)
    write_json(file, metrics)
    return metrics


def write_summary(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json of a recipe: the last stage's, the headline numbers and times of every stage, the total time."""
    from common.files import sweep, write_json

    last = dict(next(reversed(metrics.values())))
    last["stages"] = {
        name: {key: values[key] for key in ("summary", "shapes_score", "seconds") if key in values}
        for name, values in metrics.items()
    }
    total = sum(sum(values.get("seconds", {}).values()) for values in metrics.values())
    last["seconds"] = {**last.get("seconds", {}), "total": round(total, 1)}
    sweep(folder)  # every stage sweeps its own
    write_json(folder / "metrics.json", last)


if __name__ == "__main__":
    run_main(main)
