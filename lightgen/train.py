"""LightGen: a teacher's pictures, masked autoregression at rising resolution, preferences, the six columns.

    python lightgen/train.py                                    # configs/small.yaml: minutes, on a laptop
    python lightgen/train.py --config lightgen/configs/emoji.yaml                 # real artwork
    python lightgen/train.py --data.name folder --data.path PICTURES --run_dir runs/lightgen-mine
    python lightgen/train.py --config lightgen/configs/paper.yaml --data.path SET --autoencoder SD35
    torchrun --nnodes 2 --nproc-per-node 8 ... lightgen/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, a folder a stage (checkpoints, logs, sample grids, weights), pairs/, dpo/, sft/,
metrics.json, table.md, comparison.png, preferences.png and model/, with which lightgen/sample.py draws.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from lightgen.config import LightgenConfig

if TYPE_CHECKING:
    from common.data.sampling import Table
    from lightgen.data import Captioned
    from lightgen.model import Fluid
    from lightgen.preferences import Pairs
    from lightgen.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, export and measure; returns the metrics."""
    config, text = parse_config(LightgenConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import write_metrics
    from lightgen.evaluate import evaluate_run
    from lightgen.run import Run

    run = Run.open(config, text)
    with run.timed("teacher"):
        pictures = run.pictures
    before = None
    for number in range(len(run.stages)):
        before = train_stage(run, number, pictures, before)
    assert before is not None
    models = {"before": before[1]}
    if config.preferences.pairs:
        pairs = preference_pairs(run, pictures, before[1])
        if config.preferences.baseline:
            models["sft"] = train_on_winners(run, pairs, before[1])
        models["dpo"] = train_preferences(run, pairs, before[1])
    if not is_main_process():
        return {}
    run.painter(list(models.values())[-1]).save(run.folder / "model", config.autoencoder, {"data": config.data.name})
    metrics = evaluate_run(run, models)
    print(f"the model: {run.folder / 'model'}, for lightgen/sample.py --model {run.folder / 'model'} --prompt ...")
    return write_metrics(run.folder / "metrics.json", metrics, run.seconds, time.perf_counter() - started)


def train_stage(run: Run, number: int, pictures: Captioned, before: tuple[Fluid, Fluid] | None) -> tuple[Fluid, Fluid]:
    """One resolution (section 4.2), unless it is finished: (trained, averaged), both handed on.

    Args:
        before: of the stage before.
    """
    from lightgen.data import latents

    config, name = run.config, run.stages[number]
    if found := run.restore(name):
        return found
    with run.timed("latents"):
        table = latents(
            pictures, config.stages.sizes[number], run.autoencoder, config.data.flip, config.trainer.progress
        )
    return masked_training(run, name, table, pictures.captions, before, config.stages.steps[number], number)


def train_on_winners(run: Run, pairs: Pairs, start: Fluid) -> Fluid:
    """The baseline: as many steps of the last stage's objective on the winners, at a tenth of its rate, since the
    weights are trained: with the whole rate it unlearns."""
    if found := run.restore("sft"):
        return found[1]
    steps = run.config.preferences.steps
    return masked_training(run, "sft", pairs.winners, pairs.captions, (start, start), steps, -1, 0.1)[1]


def masked_training(
    run: Run,
    name: str,
    table: Table,
    captions: list[str],
    start: tuple[Fluid, Fluid] | None,
    steps: int,
    number: int,
    share: float = 1.0,
) -> tuple[Fluid, Fluid]:
    """Train from (trained, averaged) weights at a share of the stage's rate; returns the same two."""
    import copy

    from common.data.sampling import StepDataModule
    from common.training import EveryNSteps, train
    from lightgen.trainer import MaskedTraining

    config, options = run.config, run.config.trainer
    module = MaskedTraining(
        run.new_model() if start is None else copy.deepcopy(start[0]),
        None if start is None else start[1],
        run.text.cached(captions, options.progress),
        config.stages,
        config.optimiser,
        seed=config.seed,
        lr=share * config.stages.lr[number],
        steps=steps,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
    )
    grids = [EveryNSteps(options.sample_every, grid_of(run, name, module, number))] if options.sample_every else []
    data = StepDataModule(table, options.batch_size, steps, config.seed, accumulate=options.accumulate)
    with run.timed(name):
        train(
            run.folder / name,
            module,
            data,
            options,
            steps=steps,
            batch_size=options.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            callbacks=grids,
            networks=module.model.blocks(),
            dynamic=True,
        )
    trained, averaged = module.model.to(run.device).eval(), module.averaged().to(run.device)
    run.save(name, trained, averaged)
    return trained, averaged


def preference_pairs(run: Run, pictures: Captioned, model: Fluid) -> Pairs:
    """Given pictures against the model's own samples of their captions."""
    from lightgen.data import given_pictures
    from lightgen.preferences import build_pairs

    config = run.config
    given = given_pictures(config, pictures, config.preferences.pairs)
    with run.timed("pairs"):
        return build_pairs(run.painter(model), given, run.folder / "pairs", progress=config.trainer.progress)


def train_preferences(run: Run, pairs: Pairs, start: Fluid) -> Fluid:
    """DPO (Equation 7), unless it is finished."""
    import copy

    from common.data.sampling import StepDataModule
    from common.training import train
    from lightgen.trainer import PreferenceTraining

    if found := run.restore("dpo"):
        return found[1]
    config, options = run.config, run.config.preferences
    module = PreferenceTraining(
        copy.deepcopy(start).requires_grad_(True),
        copy.deepcopy(start),
        run.text.cached(pairs.captions, config.trainer.progress),
        len(pairs.captions),
        options,
        config.optimiser,
        config.stages.mask_min,
        seed=config.seed,
        accumulate=config.trainer.accumulate,
    )
    data = StepDataModule(
        pairs.table, options.batch_size, options.steps, config.seed, accumulate=config.trainer.accumulate
    )
    with run.timed("dpo"):
        train(
            run.folder / "dpo",
            module,
            data,
            config.trainer,
            steps=options.steps,
            batch_size=options.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            unit=("pairs", 1.0),
            networks=module.policy.blocks(),
            dynamic=True,
        )
    policy = module.policy.to(run.device).eval()
    run.save("dpo", policy, policy)
    return policy


def grid_of(run: Run, name: str, module: Any, number: int) -> Any:
    """Draws the same held-out prompts with the averaged weights while a stage learns."""
    from common.images import save_grid
    from lightgen.data import evaluation_prompts
    from lightgen.evaluate import EVALUATION_SEED

    size = run.config.stages.sizes[number]

    def show(step: int) -> None:
        prompts = list(dict.fromkeys(evaluation_prompts(run.config)[0]))[:: max(1, run.config.evaluation.per_task // 4)]
        images = run.painter(module.averaged()).draw(prompts, EVALUATION_SEED, size=(size, size))
        save_grid(images, run.folder / name / "samples" / f"step_{step:06d}.png", captions=prompts, tile=96)

    return show


if __name__ == "__main__":
    run_main(main)
