"""Distil a diffusion teacher into 1 to 8 steps by sub-paths, and LCM (gamma = 1) beside it with equal steps.

    python slam/train.py                                            # configs/small.yaml: a small teacher, on a laptop
    python slam/train.py --teacher DIR --data.name folder --data.path PICTURES    # Stable Diffusion, own pictures
    python slam/train.py --config slam/configs/released.yaml        # the form of the released code
    python slam/train.py --student.kind lora                        # adaptors for load_lora_weights
    python slam/train.py --subpath.gamma one --baseline false       # LCM alone
    python slam/train.py --trainer.devices 2 --trainer.strategy ddp               # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... slam/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, slam/ and lcm/ (checkpoints, logs, sample grids, averaged weights, pipeline/ or the
adaptors), metrics.json, table.md and comparison.png.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from slam.config import SlamConfig

if TYPE_CHECKING:
    from slam.model import Student
    from slam.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, export and measure; returns the metrics."""
    config, text = parse_config(SlamConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import write_metrics
    from slam.evaluate import evaluate_run
    from slam.export import export
    from slam.run import Run

    run = Run.open(config, text)
    students = {name: distil(run, name) for name in ("slam", "lcm") if name == "slam" or config.baseline}
    if not is_main_process():
        return {}
    for name, student in students.items():
        export(student, run.teacher, run.folder / name, config, run.subpath(name))
    metrics = evaluate_run(run, students)
    return write_metrics(run.folder / "metrics.json", metrics, run.seconds, time.perf_counter() - started)


def distil(run: Run, name: str) -> Student:
    """Train one student, unless it is finished; returns the averaged one."""
    from common.data.captioned import latents
    from common.data.sampling import StepDataModule
    from common.steps import steps_of
    from common.training import EveryNSteps, booked, train
    from slam.trainer import SlamTraining

    config, options = run.config, run.config.trainer
    student = run.new_student(name)
    if run.restore(student, name):
        return student
    with booked(run.seconds, "latents"):
        table = latents(run.pictures, run.teacher, options.progress)
    module = SlamTraining(
        student,
        run.teacher,
        run.states(run.pictures.captions),
        run.subpath(name),
        config.loss,
        config.optimiser,
        **steps_of(config),
    )
    grids = [EveryNSteps(options.sample_every, grid_of(run, module.target, name))] if options.sample_every else []
    data = StepDataModule(table, options.batch_size, options.max_steps, config.seed, accumulate=options.accumulate)
    with booked(run.seconds, name):
        train(
            run.folder / name,
            module,
            data,
            options,
            steps=options.max_steps,
            batch_size=options.batch_size,
            resume=config.resume,
            grad_clip=config.optimiser.grad_clip,
            callbacks=grids,
            networks=[student.unet, module.target.unet, run.teacher.unet],
        )
    finished = module.final().to(run.teacher.device)
    run.save(finished, name)
    return finished


def grid_of(run: Run, student: Student, name: str) -> Any:
    """Draws the same prompts and noises in 1, 2, 4 ... steps while the student learns."""
    import torch

    from common.images import save_grid
    from common.metrics.measures import fixed_noise
    from slam.evaluate import few_step_source

    shown = list(dict.fromkeys(run.pictures.captions))[: run.config.evaluation.grid]
    noise = fixed_noise(len(shown), run.teacher.latent_shape)
    columns = run.config.evaluation.steps

    def show(step: int) -> None:
        rows = [run.teacher.draw(few_step_source(student, n), shown, noise) for n in columns]
        captions = [f"{n} step{'s' * (n > 1)}: {caption}" for n in columns for caption in shown]
        path = run.folder / name / "samples" / f"step_{step:06d}.png"
        save_grid(torch.cat(rows), path, len(shown), captions, tile=96)

    return show


if __name__ == "__main__":
    run_main(main)
