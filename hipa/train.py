"""Make a frozen diffusion model draw in one step by small adaptors, HiPA beside the losses that it adds to.

    python hipa/train.py                                             # configs/small.yaml: a small teacher, on a laptop
    python hipa/train.py --teacher DIR --pairs.prompts prompts.txt   # Stable Diffusion 1.x or 2.x, your own prompts
    python hipa/train.py --task.name inpainting                      # or superres, editing: an adaptor of its own
    python hipa/train.py --pairs.target data --pairs.pictures PHOTOS   # real pictures in place of the teacher's
    python hipa/train.py --adaptor.placement full --arms '[hipa]'    # every weight: the upper line
    python hipa/train.py --trainer.devices 2 --trainer.strategy ddp             # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... hipa/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, an arm's folder each (checkpoints, logs, sample grids, adaptors, lora/, pipeline/),
base/ (what the teacher became for inpainting or superres), metrics.json, table.md, comparison.png and spectra.png.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from hipa.config import HipaConfig

if TYPE_CHECKING:
    from hipa.model import OneStep
    from hipa.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pairs, adaptors, export, measures; returns the metrics."""
    config, text = parse_config(HipaConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import write_metrics
    from hipa.evaluate import evaluate_run
    from hipa.export import export
    from hipa.run import Run

    run = Run.open(config, text)
    if run.needs_base:
        make_base(run)
    students: dict[str, OneStep] = {arm: adapt(run, arm) for arm in config.arms}
    if not is_main_process():
        return {}
    for arm, student in students.items():
        export(student, run.base, run.folder / arm, config)
    metrics = evaluate_run(run, students)
    trained = bool(run.seconds.keys() - {"pairs"})
    return write_metrics(run.folder / "metrics.json", metrics, run.seconds, time.perf_counter() - started, trained)


def make_base(run: Run) -> None:
    """Section 2.8: the plain teacher learns to take the task's picture beside the noise, unless it has already."""
    from common.data.sampling import StepDataModule
    from common.processes import is_main_process
    from common.training import booked, train
    from hipa.data import base_table
    from hipa.export import write_pipeline
    from hipa.run import BASE
    from hipa.tasks import extra_channels, widened
    from hipa.trainer import BaseTraining

    config, options = run.config, run.config.trainer
    if (run.folder / BASE / "model_index.json").is_file():
        return
    table, captions = base_table(config, run.teacher, options.progress)
    unet = widened(run.teacher, extra_channels(config.task, run.teacher))
    steps, batch = config.task.base_steps, options.batch_size
    module = BaseTraining(
        unet.train(),
        run.teacher.schedule,
        run.states(captions),
        run.teacher.null().float(),
        lr=config.task.base_lr,
        seed=config.seed,
        steps=steps,
        batch_size=batch,
        accumulate=options.accumulate,
    )
    data = StepDataModule(table, batch, steps, config.seed, accumulate=options.accumulate)
    with booked(run.seconds, "base"):
        train(
            run.folder / "base",
            module,
            data,
            options,
            steps=steps,
            batch_size=batch,
            resume=config.resume,
            grad_clip=1,
            networks=[unet],
        )
    if is_main_process():
        scheduler = run.teacher.scheduler_config
        write_pipeline(unet.eval(), run.teacher, run.folder / BASE, config.task, scheduler, {})
    while not (run.folder / BASE / "model_index.json").is_file():
        time.sleep(1)  # the main process is still writing it


def adapt(run: Run, arm: str) -> OneStep:
    """Train the adaptors of one arm, unless they are finished; returns the student."""
    from common.data.sampling import StepDataModule
    from common.steps import steps_of
    from common.training import EveryNSteps, booked, train
    from hipa.data import pair_table, training_prompts, with_pictures
    from hipa.trainer import HipaTraining

    config, options = run.config, run.config.trainer
    student = run.new_student()
    if run.restore(student, arm):
        return student
    with booked(run.seconds, "pairs"):
        table = pair_table(config, run.base, options.progress)
        if config.loss.space == "pixels":
            table = with_pictures(table, run.base, options.cache_pictures_gb)
    prompts = training_prompts(config, run.base.image_size[0])
    module = HipaTraining(
        student,
        run.loss(arm),
        run.states(prompts),
        config.optimiser,
        **steps_of(config),
        fresh_noise=config.pairs.target == "data",
    )
    show = grid_of(run, arm, student, table, prompts)
    data = StepDataModule(table, options.batch_size, options.max_steps, config.seed, accumulate=options.accumulate)
    with booked(run.seconds, arm):
        train(
            run.folder / arm,
            module,
            data,
            options,
            steps=options.max_steps,
            batch_size=options.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            callbacks=[EveryNSteps(options.sample_every, show)] if options.sample_every else [],
            networks=[student.unet, run.base.vae.decoder],
        )
    finished = module.final().to(run.base.device)
    run.save(finished, arm)
    return finished


def grid_of(run: Run, arm: str, student: OneStep, table: Any, prompts: list[str]) -> Any:
    """Draws the first pairs' noises in one step while the student learns."""
    from common.images import save_grid

    rows = range(min(run.config.evaluation.grid, len(table)))
    first = table.__getitems__(rows)
    shown = [prompts[i] for i in first["prompt"].tolist()]

    def show(step: int) -> None:
        student.eval()
        images = run.base.draw(student, shown, first["x0"].float())
        student.train()
        save_grid(images, run.folder / arm / "samples" / f"step_{step:06d}.png", len(shown), shown, tile=96)

    return show


if __name__ == "__main__":
    run_main(main)
