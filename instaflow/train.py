"""Make a one-step text-to-image pipeline from a diffusion teacher: pairs, reflow, distillation, metrics.

    python instaflow/train.py                                     # configs/small.yaml: a small teacher, on a laptop
    python instaflow/train.py --teacher DIR --pairs.prompts prompts.txt # any diffusers directory
    python instaflow/train.py --reflow.rounds 2                   # 3-rectified flow; 0 is direct distillation
    python instaflow/train.py --student.stack separate            # two U-Nets in series (the 1.7B model)
    python instaflow/train.py --pairs.online true                 # pairs drawn afresh in every reflow step
    python instaflow/train.py --trainer.devices 2 --trainer.strategy ddp             # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... instaflow/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, reflow_1/, distil/ and perceptual/ (checkpoints, logs, sample grids, averaged weights),
reflowed/ and pipeline/ (the rectified flow and the one-step model as diffusers directories), metrics.json and
comparison.png.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import UserError, run_main
from instaflow.config import STAGES, InstaFlowConfig, StageConfig

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from instaflow.flow import UNetFlow
    from instaflow.losses import Loss
    from instaflow.run import Run

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the configured stages; returns the metrics."""
    config, text = parse_config(InstaFlowConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    if not config.stages:
        raise UserError(f"--stages is empty; choose from {', '.join(STAGES)}")
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from instaflow.run import Run

    run = Run.open(config, text)
    if "pairs" in config.stages and not (config.pairs.online and config.reflow.rounds) and not run.finished:
        run.teacher_pairs()
    flow = reflow(run) if "reflow" in config.stages else None
    student = distil(run, flow) if "distil" in config.stages else None
    if "perceptual" in config.stages and config.perceptual.steps:
        student = perceptual(run, flow, student)
    if not is_main_process():
        return {}
    run.export(flow, student)
    if "evaluate" not in config.stages:
        return {}
    from common.training import write_metrics
    from instaflow.evaluate import evaluate_run

    metrics = evaluate_run(run, flow, student)
    trained = bool(run.seconds.keys() - {"pairs"})
    return write_metrics(run.metrics, metrics, run.seconds, time.perf_counter() - started, trained)


def reflow(run: Run) -> UNetFlow:
    """Section 2: v_2 .. v_k, one round after the other, each regressing X1 - X0 on the pairs of the flow before."""
    import torch

    from common.data.pairs import PairSource, prompt_list
    from common.data.sampling import TensorTable
    from instaflow.losses import online, reflow_loss
    from instaflow.student import make_student

    options = run.config.reflow
    flow = make_student(run.teacher, run.config.student.init)
    for number in range(1, options.rounds + 1):
        stage, loss = f"reflow_{number}", reflow_loss(options.loss)
        # A copy, since the flow itself goes on learning.
        source: PairSource = run.teacher_source() if number == 1 else run.flow_source(copy.deepcopy(flow))
        if run.restore(flow, stage):
            continue
        if run.config.pairs.online:
            wanted = run.config.pairs
            prompts = prompt_list(wanted.prompts, wanted.count, text=wanted.text_column)
            data: Dataset = TensorTable({"prompt": torch.arange(len(prompts))})
            loss = online(loss, source)
        else:
            pairs = run.teacher_pairs() if number == 1 else run.flow_pairs(flow, run.config.pairs.count, stage)
            data, prompts = pairs, pairs.prompts
        lr = options.later_lr if number > 1 and options.later_lr else options.lr
        first = StageConfig(options.steps, options.batch_size, lr)
        if options.then is None:
            optimise_stage(run, flow, loss, data, prompts, first, stage, (1, 4))
        else:
            optimise_stage(run, flow, loss, data, prompts, first, f"{stage}/phase_1", (1, 4))
            optimise_stage(run, flow, loss, data, prompts, options.then, stage, (1, 4))
    return flow


def distil(run: Run, flow: UNetFlow | None) -> UNetFlow:
    """Section 3.2: the one-step (or k-step) student by L2; without reflow this distils the teacher directly."""
    from instaflow.losses import distillation_loss

    options = run.config.distil
    flow = flow or run.load_flow(run.config.reflow.rounds)
    student = run.new_student(flow)
    if not run.restore(student, "distil"):
        pairs = run.distillation_pairs(flow)
        loss = distillation_loss(options.k)
        optimise_stage(run, student, loss, pairs, pairs.prompts, options, "distil", (options.k,))
    return student


def perceptual(run: Run, flow: UNetFlow | None, student: UNetFlow | None) -> UNetFlow:
    """Continue the distillation with the perceptual loss on decoded images."""
    from common.metrics.perceptual import perceptual_distance
    from instaflow.losses import perceptual_loss

    options, k = run.config.perceptual, run.config.distil.k
    flow = flow or run.load_flow(run.config.reflow.rounds)
    student = student or run.load_student(["distil"])
    if not run.restore(student, "perceptual"):
        pairs = run.distillation_pairs(flow)
        loss = perceptual_loss(run.teacher, perceptual_distance(options.trunk).to(run.teacher.device), k)
        optimise_stage(run, student, loss, pairs, pairs.prompts, options, "perceptual", (k,))
    return student


def optimise_stage(
    run: Run,
    flow: UNetFlow,
    loss: Loss,
    data: Dataset,
    prompts: Sequence[str],
    stage: StageConfig,
    name: str,
    shown_steps: Sequence[int],
) -> None:
    """Train `flow` in place, unless `name` is finished; it ends with its averaged weights, which the run keeps.

    Args:
        shown_steps: Euler steps of the sample grids' rows.
    """
    import torch

    from common.data.sampling import derive_seed
    from common.images import save_grid
    from common.metrics.measures import fixed_noise
    from common.training import booked
    from instaflow.flow import FlowSource
    from instaflow.trainer import optimise

    if run.restore(flow, name):
        return
    config, folder = run.config, run.folder / name
    shown = list(dict.fromkeys(prompts))[: config.evaluation.grid]
    noise = fixed_noise(len(shown), run.teacher.latent_shape)

    def show(step: int) -> None:
        rows = [run.teacher.draw(FlowSource(flow, run.teacher, n, 1.0), shown, noise) for n in shown_steps]
        captions = [f"{n} step{'s' * (n > 1)}: {p}" for n in shown_steps for p in shown]
        save_grid(torch.cat(rows), folder / "samples" / f"step_{step:06d}.png", len(shown), captions, tile=96)

    # Every stage has its own seed stream.
    seed = derive_seed(config.seed, *name.encode())
    with booked(run.seconds, name.split("/")[0]):
        optimise(
            flow, loss, data, run.states(prompts), stage, config.optimiser, seed, folder, config.trainer, show=show
        )
    flow.to(run.teacher.device)
    run.save(flow, name)


if __name__ == "__main__":
    run_main(main)
