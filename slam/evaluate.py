"""What few steps are worth: of a training run, or of any student folder on given captions.

    python slam/evaluate.py --run_dir runs/slam-small                       # a finished run: its metrics.json again
    python slam/evaluate.py --model FOLDER --steps 1 2 4 8                  # held-out Shapes captions
    python slam/evaluate.py --model UNET_FOLDER --teacher SD15_FOLDER --data.name folder --data.path PICTURES

Every arm starts from the same prompts and noises. Only Inception features may be called FID; every number names its
judge and its counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Range

if TYPE_CHECKING:
    from torch import Tensor

    from common.metrics.measures import PromptSet
    from slam.model import Student
    from slam.run import Run

SAMPLING_SEED = 4310  # of the noise that is added between steps, the same for every model


def few_step_source(
    student: Student, steps: int, w: float | None = None, times: Sequence[int] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """(noise, states) -> latents; the noises between the steps depend on the first noise alone."""
    import torch

    from common.data.sampling import step_generator
    from slam.sampler import sample

    student = student.recorded()

    def draw(noise_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
        keys = noise_BCHW.flatten(1)[:, :4].contiguous().cpu().view(torch.int32).long().abs().sum(1).tolist()
        generators = [step_generator(SAMPLING_SEED, key) for key in keys]

        def fresh(_: int) -> Tensor:
            return torch.stack([torch.randn(noise_BCHW.shape[1:], generator=g) for g in generators])

        return sample(student, noise_BCHW, states_BLD, steps, fresh, w=w, times=times)

    return draw


def evaluate_run(run: Run, students: Mapping[str, Student]) -> dict[str, Any]:
    """Teacher with many and with few steps, LCM, SLAM: same prompts, same noises.

    Returns:
        {"arms": {name: measures}, "unet_forwards_per_image": {name: number}, ...}; pictures go to `comparison.png`, the
        table to `table.md`, the mechanism to `errors.png`.
    """
    from common.files import write_atomically
    from common.images import comparison_grid
    from common.metrics.judge import judge_of
    from common.publishing import markdown_table
    from common.solvers import DiffusionSource
    from slam.data import held_out
    from slam.figures import errors_figure

    config, teacher = run.config, run.teacher
    prompts = held_out(config.data, teacher)
    guidance = (sum(config.loss.w_range) / 2 if config.loss.w_range else config.loss.guidance) + 1
    solver: dict[str, Any] = {"options": {"timestep_spacing": "trailing"}}
    sources: dict[str, tuple[Any, int]] = {}
    for steps in (config.evaluation.teacher_steps, 4):
        source = DiffusionSource(teacher, "DDIMScheduler", steps, guidance, **solver)
        sources[f"teacher {steps} steps"] = source, source.evaluations
    w = guidance - 1 if config.loss.w_range else None
    for name in ("lcm", "slam"):
        if name in students:
            for steps in config.evaluation.steps:
                label = f"{name.upper()} {steps} step{'s' * (steps > 1)}"
                sources[label] = few_step_source(students[name], steps, w), steps
    images = {
        arm: teacher.draw(source, prompts.prompts, prompts.noise, config.evaluation.batch_size)
        for arm, (source, _) in sources.items()
    }
    judge = judge_of(config.evaluation.judge, config.data.name)
    arms = measured(prompts, images, judge, next(iter(images.values())))
    shown = {arm: found for arm, found in images.items() if not arm.startswith("LCM") or arm == "LCM 4 steps"}
    comparison_grid(shown, prompts.prompts, config.evaluation.grid, run.folder / "comparison.png")
    errors_figure(run, students, prompts)
    metrics = {
        "teacher": config.teacher,
        "teacher_sha256": teacher.checksum(),
        "judge": judge.name,
        "images": len(prompts),
        "data": config.data.name,
        "guidance": guidance,
        "arms": arms,
        "unet_forwards_per_image": {arm: forwards for arm, (_, forwards) in sources.items()},
    }
    keys = list(arms[next(iter(arms))])
    rows = [[arm, str(sources[arm][1]), *(f"{values[key]:.4g}" for key in keys)] for arm, values in arms.items()]
    text = markdown_table(["arm", "U-Net evaluations", *keys], rows)
    write_atomically(run.folder / "table.md", lambda temporary: temporary.write_text(text + "\n"))
    report(metrics)
    return metrics


def measured(prompts: PromptSet, images: Mapping[str, Tensor], judge: Any, teacher: Tensor) -> dict[str, Any]:
    """The measures of every arm, against held-out pictures and the teacher's."""
    from common.metrics.measures import Yardstick
    from common.metrics.perceptual import perceptual_distance

    yardstick = Yardstick(prompts, judge, teacher, perceptual_distance("trained"))
    return {arm: yardstick.measure(found) for arm, found in images.items()}


def report(metrics: dict[str, Any]) -> None:
    """Print one line an arm."""
    print(f"{metrics['images']} images an arm, judged by {metrics['judge']}")
    for arm, values in metrics["arms"].items():
        print(f"  {arm}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of slam/train.py")
    parser.add_argument("--model", type=Path, help="a student's folder instead: a pipeline, or a published U-Net")
    parser.add_argument("--teacher", type=Path, help="what stands around a U-Net folder: the pipeline it came from")
    parser.add_argument("--steps", type=Count, nargs="+", default=[1, 2, 4, 8], help="of the student")
    parser.add_argument(
        "--data.name", dest="name", choices=("shapes", "emoji", "folder"), default="shapes", help="held-out set"
    )
    parser.add_argument("--data.path", dest="path", help="for folder: pictures with captions")
    parser.add_argument("--images", type=Annotated[int, Range(2)], default=512, help="held-out captions")
    parser.add_argument("--judge", help="shapes64, lite0 or inception:FILE")
    options = parser.parse_args(argv)
    if (options.run_dir is None) == (options.model is None):
        raise UserError("expected either --run_dir, a finished run, or --model, a student's folder")
    if options.run_dir:
        from slam.run import Run

        run = Run.existing(options.run_dir)
        names = [name for name in ("slam", "lcm") if (run.folder / name / "student.safetensors").is_file()]
        return evaluate_run(run, {name: run.load(name) for name in names or ["slam"]})
    from common.metrics.judge import judge_of
    from common.teacher import Teacher
    from slam.config import DataConfig
    from slam.data import held_out
    from slam.export import load_student

    student, around = load_student(options.model, Teacher.load(options.teacher) if options.teacher else None)
    prompts = held_out(DataConfig(name=options.name, path=options.path, eval_images=options.images), around)
    images = {
        f"{steps} steps": around.draw(few_step_source(student, steps), prompts.prompts, prompts.noise)
        for steps in options.steps
    }
    judge = judge_of(options.judge, options.name)
    arms = measured(prompts, images, judge, images[f"{max(options.steps)} steps"])
    metrics = {"judge": judge.name, "images": len(prompts), "arms": arms}
    report(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main)
