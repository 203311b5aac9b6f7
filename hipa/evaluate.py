"""What one step is worth: of a training run, or of any adaptor on held-out captions; and what it cost.

    python hipa/evaluate.py --run_dir runs/hipa-small                              # a finished run: its metrics again
    python hipa/evaluate.py --teacher DIR --lora runs/hipa-small/hipa/lora         # an adaptor beside its teacher
    python hipa/evaluate.py --teacher DIR --lora FILE --prompts emoji --guidance 3

Every arm starts from the same prompts and noises. Only Inception features may be called FID; every number names its
judge and its counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Range

if TYPE_CHECKING:
    from torch import Tensor

    from common.metrics.measures import PromptSet
    from common.teacher import Teacher
    from hipa.model import OneStep
    from hipa.run import Run

TITLES = {"hipa": "HiPA", "spatial": "spatial loss only", "pixel": "pixel loss only"}
TRAIN_STEP = 3  # U-Net forwards that a forward and its backward count for
PROGRESSIVE = {"parameters": 7_740_000_000, "gpu_days": 108.8}  # nine halvings of Stable Diffusion, abstract

Source = Callable[["Tensor", "Tensor"], "Tensor"]


def teacher_sources(
    base: Teacher, steps: int, guidance: float, solver: str, time: int, task: str = "text"
) -> dict[str, tuple[Source, int]]:
    """The frozen model with many steps and, from noise, with two: (sampler, U-Net evaluations a picture)."""
    from common.solvers import DiffusionSource
    from hipa.tasks import many_steps_source

    if task != "text":
        forwards = steps * (2 if guidance > 1 else 1)
        return {f"teacher {steps} steps": (many_steps_source(base, steps, guidance, time), forwards)}
    many = DiffusionSource(base, solver, steps, guidance)
    two = DiffusionSource(base, "DDIMScheduler", 2, guidance, options={"timestep_spacing": "trailing"})
    return {f"teacher {steps} steps": (many, many.evaluations), "teacher 2 steps": (two, two.evaluations)}


def measured(prompts: PromptSet, images: Mapping[str, Tensor], judge: Any, teacher: Tensor) -> dict[str, Any]:
    """The measures of every arm, against held-out pictures and the teacher's."""
    from common.metrics.measures import Yardstick
    from common.metrics.perceptual import perceptual_distance

    yardstick = Yardstick(prompts, judge, teacher, perceptual_distance("trained"))
    return {arm: yardstick.measure(found) for arm, found in images.items()}


def evaluate_run(run: Run, students: Mapping[str, OneStep]) -> dict[str, Any]:
    """Teacher with many steps, frozen one step, each arm in one step: same prompts, same noises.

    Returns:
        {"arms": {name: measures}, "spectra": {arm: numbers}, "costs": ..., ...}; pictures go to `comparison.png`, the
        table to `table.md`, the spectra to `spectra.png`.
    """
    from common.files import write_atomically
    from common.images import comparison_grid
    from common.metrics.judge import judge_of
    from common.publishing import markdown_table
    from hipa.analyse import compare, draw
    from hipa.data import evaluation_set
    from hipa.model import trained_parameters

    config, base = run.config, run.base
    pairs = config.pairs
    prompts = evaluation_set(config, base)
    sources = teacher_sources(base, pairs.steps, pairs.guidance, pairs.solver, run.time, config.task.name)
    many = next(iter(sources))
    sources["frozen, 1 step"] = run.frozen(), 1
    names = {arm: f"{TITLES[arm]}, 1 step" for arm in students}
    sources |= {names[arm]: (student, 1) for arm, student in students.items()}
    images = {
        arm: base.draw(source, prompts.prompts, prompts.noise, config.evaluation.batch_size)
        for arm, (source, _) in sources.items()
    }
    judge = judge_of(config.evaluation.judge, pairs.pictures or pairs.prompts)
    arms = measured(prompts, images, judge, images[many])
    comparison_grid(images, prompts.prompts, config.evaluation.grid, run.folder / "comparison.png")
    radius = round(config.loss.radius * base.image_size[0], 9)  # as in the loss
    one_step = [arm for arm in images if arm.endswith(", 1 step")]
    spectra = {arm: compare(images[arm], images[many], prompts.reference, judge, radius) for arm in one_step}
    first = spectra[one_step[0]]
    curves = {arm: numbers["power_one"] for arm, numbers in spectra.items()} | {many: first["power_many"]}
    draw(spectra, curves | ({"data": first["power_data"]} if "power_data" in first else {}), run.folder / "spectra.png")
    metrics = {
        "teacher": config.teacher,
        "teacher_sha256": run.teacher.checksum(),
        "task": config.task.name,
        "judge": judge.name,
        "images": len(prompts),
        "prompts": pairs.pictures or pairs.prompts,
        "guidance": pairs.guidance,
        "arms": arms,
        "spectra": spectra,
        "unet_forwards_per_image": {arm: forwards for arm, (_, forwards) in sources.items()},
        "costs": costs_of(run, {names[arm]: trained_parameters(student) for arm, student in students.items()}),
    }
    keys = list(arms[many])
    high = [f"{spectra[arm]['coherence'][-2]:.3f}" if arm in spectra else "-" for arm in arms]
    rows = [
        [arm, str(sources[arm][1]), *(f"{values[key]:.4g}" for key in keys), agrees]
        for (arm, values), agrees in zip(arms.items(), high)
    ]
    text = markdown_table(["arm", "U-Net evaluations", *keys, "coherence, high"], rows)
    write_atomically(run.folder / "table.md", lambda temporary: temporary.write_text(text + "\n"))
    report(metrics)
    return metrics


def costs_of(run: Run, trained: Mapping[str, int]) -> dict[str, Any]:
    """Parameters and U-Net evaluations of the adaptors' training, beside what progressive distillation trains."""
    from common.costs import parameter_count

    config = run.config
    samples, pairs = config.trainer.max_steps * config.trainer.batch_size, config.pairs
    forwards = pairs.steps * (2 if pairs.guidance > 1 else 1) * pairs.count if pairs.target == "teacher" else 0
    whole = parameter_count(run.base.unet)
    return {
        "unet_parameters": whole,
        "trained_parameters": dict(trained),
        "trained_share": {arm: count / whole for arm, count in trained.items()},
        "pair_forwards": forwards,
        "training_forwards": TRAIN_STEP * samples,
        "progressive_parameters": whole * (pairs.steps - 1).bit_length(),  # a whole U-Net at every halving
        "paper": {"trained_parameters": 3_319_808, "progressive": PROGRESSIVE, "gpu_days": 3.8},
    }


def report(metrics: dict[str, Any]) -> None:
    """Print one line an arm."""
    print(f"{metrics['images']} images an arm, judged by {metrics['judge']}")
    for arm, values in metrics["arms"].items():
        print(f"  {arm}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of hipa/train.py")
    parser.add_argument("--teacher", type=Path, help="the diffusers directory that --lora is for")
    parser.add_argument("--lora", type=Path, help="adaptors: a folder or a .safetensors file")
    parser.add_argument("--prompts", default="shapes", help="shapes, emoji (held out), or a file of prompts")
    parser.add_argument("--images", type=Annotated[int, Range(2)], default=512, help="held-out prompts")
    parser.add_argument("--steps", type=Annotated[int, Range(1, 1000)], default=25, help="of the teacher")
    parser.add_argument("--guidance", type=Annotated[float, Range(0, 100)], default=1.5, help="of the teacher alone")
    parser.add_argument("--judge", help="shapes64, lite0 or inception:FILE (default: as the prompts are)")
    options = parser.parse_args(argv)
    if (options.run_dir is None) == (options.lora is None) or (options.lora and not options.teacher):
        raise UserError("expected either --run_dir, a finished run, or --lora with --teacher")
    if options.run_dir:
        from hipa.run import Run

        run = Run.existing(options.run_dir)
        return evaluate_run(run, {arm: run.load(arm) for arm in run.finished_arms or ["hipa"]})
    from common.metrics.judge import judge_of
    from common.metrics.measures import held_out_prompts
    from common.teacher import Teacher
    from hipa.model import OneStep
    from hipa.sample import adapted

    teacher = Teacher.load(options.teacher)
    prompts = held_out_prompts(options.prompts, options.images, teacher.latent_shape, teacher.image_size[0])
    solver, time = "DPMSolverMultistepScheduler", teacher.schedule.steps - 1
    sources = teacher_sources(teacher, options.steps, options.guidance, solver, time)
    sources["frozen, 1 step"] = OneStep(teacher.unet, teacher.schedule), 1
    sources["adapted, 1 step"] = adapted(teacher, options.lora), 1
    images = {arm: teacher.draw(source, prompts.prompts, prompts.noise) for arm, (source, _) in sources.items()}
    judge = judge_of(options.judge, options.prompts)
    arms = measured(prompts, images, judge, images[f"teacher {options.steps} steps"])
    metrics = {"judge": judge.name, "images": len(prompts), "arms": arms}
    report(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main)
