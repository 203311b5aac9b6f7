"""Metrics of a trained model against held-out images.

    python ldm/evaluate.py --run_dir runs/ldm-small               # a finished run: writes its metrics.json again
    python ldm/evaluate.py --run_dir runs/ldm-small --images DIR  # against your own pictures: RUN/on-DIR/metrics.json

Every number names its judge and counts; the distance of two halves of the real images (the floor) stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import run_main
from common.files import write_atomically

if TYPE_CHECKING:
    from ldm.config import LdmConfig
    from ldm.diffusion import LatentDiffusion
    from ldm.tasks import Task


def evaluate_run(ldm: LatentDiffusion, task: Task, config: LdmConfig, folder: Path) -> dict[str, Any]:
    """Sample `config.sampling.metric_images` held-out conditions and compare.

    Returns KID (the headline) and FID with their floor, precision and recall, for text the alignment and for Shapes the
    verifier's score, how often boxes, label maps and classes are `followed`, for super-resolution and inpainting PSNR,
    SSIM and LPIPS form; reconstruction PSNR and r-FID of the first stage; sampling speed. The pictures go to
    `folder/samples.png`, `real.png` and `reconstruction.png`, the first numbers to `folder/table.md`.
    """
    import torch

    from common.images import save_grid, to_unit
    from common.metrics.evaluate import compare_held_out, flatten, judged
    from common.metrics.features import extract, load_extractor
    from common.metrics.image import psnr, ssim
    from ldm.first_stage import reconstruct
    from ldm.followed import followed
    from ldm.sample import condition_columns, draw, task_grid

    count = min(config.sampling.metric_images, len(task.reference))
    columns = condition_columns(task, config, count)
    real = task.reference.columns["image"][:count]
    started = time.perf_counter()
    size = config.data.size
    fake = draw(ldm, task.name, columns, count, (size, size), config.sampling, config.seed + 1, config.trainer.progress)
    seconds = time.perf_counter() - started
    judge = load_extractor("lite0")
    real_features = extract(real, judge)
    compared = compare_held_out(real_features, extract(fake, judge), judge)
    metrics: dict[str, Any] = {
        "task": task.name,
        "images": count,
        **judged(compared),
        "images_per_second": round(count / seconds, 2),
        "sampling": {k: v for k, v in vars(config.sampling).items() if k != "grid"},
    }
    if config.first_stage.kind != "pixels":
        restored = reconstruct(ldm.first_stage_model, real)  # type: ignore[arg-type]
        rfid = compare_held_out(real_features, extract(restored, judge), judge)
        metrics["first_stage"] = {
            "psnr": float(psnr(restored, real).mean()),
            "ssim": float(ssim(restored, real).mean()),
            **{f"r_{k}": v for k, v in (flatten(rfid) if rfid else {}).items() if k.startswith(("fid", "kid"))},
        }
        spread = torch.linspace(0, count - 1, min(16, count)).long()
        pairs = torch.cat([real[spread], restored[spread]])
        save_grid(pairs, folder / "reconstruction.png", columns=len(spread), tile=64 if size < 64 else None)
    if task.name in ("superres", "inpaint"):
        from common.metrics.perceptual import perceptual_distance

        distance = perceptual_distance("trained")
        metrics["paired"] = {
            "psnr": float(psnr(fake, real).mean()),
            "ssim": float(ssim(fake, real).mean()),
            distance.name: float(distance(to_unit(fake), to_unit(real)).mean()),
        }
    if shares := followed(task, config, columns, fake, real, judge):
        metrics["followed"] = shares
    if task.captions and config.data.name == "emoji":
        from common.metrics.alignment import AlignmentScorer

        scorer = AlignmentScorer()
        metrics["alignment"] = scorer.score(fake, task.captions[:count])
        metrics["alignment_real"] = scorer.score(real, task.captions[:count])
    if task.name == "text" and config.data.name == "shapes":
        metrics["shapes_score"] = shapes_score(ldm, task, config)
    text = table(metrics)
    write_atomically(folder / "table.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    task_grid(ldm, task, config, folder / "samples.png")
    save_grid(real[: config.sampling.grid], folder / "real.png", columns=8, tile=64 if size < 64 else None)
    report(metrics)
    return metrics


WORDS = {
    "object_in_box": "boxes that hold their shape in their colour",
    "colour_in_box": "boxes in their colour",
    "object_in_map": "regions of the map that hold their shape",
    "map_overlap": "overlap with the map (intersection over union)",
    "class_right": "pictures in their class, by a linear probe",
}


def table(metrics: Mapping[str, Any]) -> str:
    """The numbers a person looks for first, drawn pictures beside true ones, as a Markdown table."""
    from common.publishing import markdown_table

    rows: list[Sequence[str]] = []
    shares = metrics.get("followed", {})
    for name, words in WORDS.items():
        if name in shares:
            rows.append((words, f"{shares[name]:.2f}", f"{shares[f'{name}_real']:.2f}"))
    if "shapes_score" in metrics:
        rows.append(("Shapes score, by the verifier", f"{metrics['shapes_score']['mean']:.2f}", ""))
    if "alignment" in metrics:
        drawn, true = (f"{metrics[name]['cosine']:.3f}" for name in ("alignment", "alignment_real"))
        rows.append(("fit of pictures and captions (cosine)", drawn, true))
    summary = metrics.get("summary", {})
    if "kid_lite0" in summary:
        floor = summary.get("floor/kid_lite0")
        true = "" if floor is None else f"{1000 * floor:.0f}"
        rows.append((f"KID x 1000, {metrics['images']} pictures", f"{1000 * summary['kid_lite0']:.0f}", true))
    return markdown_table(("measure", "drawn", "true pictures"), rows)


def shapes_score(ldm: LatentDiffusion, task: Task, config: LdmConfig, per_task: int = 100) -> dict[str, Any]:
    """The verifier's accuracy per GenEval-like task, on fixed prompts of scenes not seen in training."""
    from common.data.shapes_verifier import score
    from ldm.sample import draw

    specs = task.reference_dataset.prompts(per_task, split="test")
    columns = task.caption_columns([spec.caption for spec in specs])
    images = draw(ldm, "text", columns, len(specs), (config.data.size,) * 2, config.sampling, 7)
    return score(images, specs)


def report(metrics: dict[str, Any]) -> None:
    """Print the numbers a person looks for first."""
    from common.metrics.evaluate import format_report

    if "judge" in metrics:
        print(format_report(metrics["judge"]))
    for name in ("first_stage", "paired", "followed", "alignment", "alignment_real", "shapes_score"):
        if name in metrics:
            values = {k: v for k, v in metrics[name].items() if isinstance(v, float)}
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
    print(f"sampling: {metrics['images_per_second']} images/s")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--images", type=Path, help="your own image folder (default: the run's held-out pictures)")
    options = parser.parse_args(argv)
    from common.training import write_metrics
    from ldm.run import Run

    run = Run.existing(options.run_dir, images=options.images)
    folder = run.folder / f"on-{options.images.resolve().name}" if options.images else run.folder
    started = time.perf_counter()
    metrics = evaluate_run(run.load(), run.task, run.config, folder)
    write_metrics(folder / "metrics.json", metrics, {}, time.perf_counter() - started, trained=False)


if __name__ == "__main__":
    run_main(main)
