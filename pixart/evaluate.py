"""Metrics of a trained stage against held-out pictures.

    python pixart/evaluate.py --run_dir runs/pixart-small                  # measure its last stage again
    python pixart/evaluate.py --run_dir runs/pixart-small --stage stage2
    python pixart/evaluate.py --run_dir runs/pixart-small --images DIR     # against your own captioned pictures

Every number names its judge and counts; the distance of two halves of the real images (the floor) stands beside it.

    held_out         error of the predicted noise on fixed times and noises, and by what share it grows when the
                     captions are those of other pictures (the early, low-noise sign that the text is used)
    judge            KID (the headline) and FID with their floor, precision, recall, density, coverage
    shapes_score     scenes: the verifier's accuracy on fixed prompts of each task, as a person would ask
    own_captions     scenes: its accuracy on held-out captions of the stage's own grade (dense, web, ...)
    buckets          scenes: the same for each aspect bucket that is not square
    alignment        emoji: how well pictures and captions find each other among others
    curve            FID, KID and accuracy against the guidance scale (appendix A.6)
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main

if TYPE_CHECKING:
    from torch import Tensor

    from pixart.config import SamplingConfig
    from pixart.data import Pictures
    from pixart.run import Stage
    from pixart.sample import Painter

PROMPT_SEED, SAMPLE_SEED = 7, 1


def evaluate_stage(stage: Stage, painter: Painter) -> dict[str, Any]:
    """All metrics that fit the stage's data; the real pictures beside the samples go to `real.png`.

    Raises:
        UserError: the data set has too few held-out pictures.
    """
    from common.images import save_grid
    from common.metrics.evaluate import compare_held_out, judged
    from common.metrics.features import extract, load_extractor

    config, sampling = stage.config, stage.config.sampling
    pictures = stage.held_out(min(sampling.metric_images, config.data.eval_images))
    count = len(pictures)
    real = pictures.images(range(count))
    judge = load_extractor("lite0")
    real_features = extract(real, judge)
    started = time.perf_counter()
    fake = draw_like(painter, pictures, range(count), sampling, config.kind)
    seconds = time.perf_counter() - started
    compared = compare_held_out(real_features, extract(fake, judge), judge)
    metrics: dict[str, Any] = {
        "task": f"{config.kind}, {pictures.name}, {config.data.size} px",
        "images": count,
        **judged(compared),
        "images_per_second": round(count / seconds, 2),
        "sampling": {k: v for k, v in vars(sampling).items() if k not in ("grid", "curve", "curve_images")},
        "parameters": sum(p.numel() for p in painter.network.parameters()),
    }
    if config.kind == "text":
        metrics["held_out"] = held_out_error(painter, pictures)
    if pictures.specs is not None:
        from common.data.shapes_verifier import score

        metrics["own_captions"] = score(fake.numpy(), pictures.specs)
        if config.kind != "class":
            metrics["shapes_score"] = prompted_score(stage, painter, sampling)
            metrics |= bucket_scores(stage, painter)
    if config.data.name == "emoji" and config.kind != "class":
        from common.metrics.alignment import AlignmentScorer

        scorer = AlignmentScorer()
        metrics["alignment"] = scorer.score(fake, pictures.captions)
        metrics["alignment_real"] = scorer.score(real, pictures.captions)
    if sampling.curve and config.kind != "class":
        metrics["curve"] = guidance_curve(stage, painter, pictures)
    save_grid(real[: sampling.grid], stage.folder / "real.png", columns=6, tile=96 if config.data.size < 96 else None)
    report(metrics)
    return metrics


def draw_like(painter: Painter, pictures: Pictures, rows: range, sampling: SamplingConfig, kind: str) -> Tensor:
    """Samples for the captions (or classes) of some held-out pictures of one bucket, uint8."""
    bucket = pictures.buckets[int(pictures.bucket_N[rows[0]])]
    size = (bucket.height, bucket.width)
    if kind == "class":
        return painter.classes(pictures.labels_N[list(rows)], *size, sampling, SAMPLE_SEED)
    control = pictures.images(rows) if kind == "controlnet" else None
    return painter.captions([pictures.captions[i] for i in rows], *size, sampling, SAMPLE_SEED, control)


def held_out_error(painter: Painter, pictures: Pictures, count: int = 256, seed: int = 0) -> dict[str, float]:
    """Error of the predicted noise on held-out square pictures at times 100 to 900, and the wrong-caption penalty.

    Returns:
        mse: mean over fixed times and noises; wrong_caption_mse: the same with each caption given to the next picture;
        penalty: (wrong_caption_mse - mse) / mse, which is 0 while the text is ignored.
    """
    import torch

    from pixart.diffusion import Diffusion

    assert painter.encoder is not None
    network, codec, diffusion = painter.network, painter.codec, Diffusion()
    device = next(network.parameters()).device
    rows = range(min(count, len(pictures)))
    moments = codec.moments(pictures.images(rows))
    generator = torch.Generator().manual_seed(seed)
    posterior_noise, noise = torch.randn(2, len(rows), codec.channels, *moments.shape[2:], generator=generator)
    x0_BCHW, noise = codec.latents(moments, posterior_noise).to(device), noise.to(device)
    t_B = torch.linspace(100, 900, len(rows)).long().to(device)
    features, mask = painter.encoder.encode([pictures.captions[i] for i in rows])
    features, mask = features.to(device), mask.to(device)
    conditions: dict[str, Tensor] = {}
    if network.config.multi_scale:
        conditions = {
            "size_B2": pictures.originals_N2[list(rows)].float(),
            "ratio_B1": pictures.ratios_N[list(rows), None],
        }

    def error(order_B: Tensor) -> float:
        parts = []
        for part in torch.arange(len(rows)).split(64):
            kept = {name: values[part].to(device) for name, values in conditions.items()}
            shown = order_B[part]

            def predict(x: Tensor, t: Tensor, shown: Tensor = shown, kept: dict[str, Tensor] = kept) -> Tensor:
                return network(x, t, features[shown], mask[shown], **kept)

            parts.append(diffusion.training_losses(predict, x0_BCHW[part], t_B[part], noise[part])["mse"])
        return float(torch.cat(parts).mean())

    with torch.no_grad():
        right = error(torch.arange(len(rows)))
        wrong = error(torch.arange(len(rows)).roll(1))
    return {"mse": right, "wrong_caption_mse": wrong, "penalty": (wrong - right) / right, "pictures": len(rows)}


def prompted_score(stage: Stage, painter: Painter, sampling: SamplingConfig) -> dict[str, float]:
    """The verifier's accuracy per GenEval-like task, on fixed prompts in the stage's world of shapes and colours."""
    from common.data.shapes import TASKS, prompts
    from common.data.shapes_verifier import score
    from pixart.data import world_of

    data = stage.config.data
    specs = prompts(sampling.per_task, "test", TASKS, PROMPT_SEED, **world_of(data))
    images = painter.captions([spec.caption for spec in specs], data.size, data.size, sampling, SAMPLE_SEED)
    return score(images.numpy(), specs)


def bucket_scores(stage: Stage, painter: Painter) -> dict[str, Any]:
    """Accuracy on held-out captions in each aspect bucket that is not square, and a grid of each."""
    from common.data.shapes_verifier import score
    from common.images import save_grid
    from pixart.data import pad_to_square

    sampling = stage.config.sampling
    pictures = stage.held_out(sampling.per_task * 3, square=False)
    found: dict[str, Any] = {}
    for number, bucket in enumerate(pictures.buckets):
        rows = pictures.members(number)
        if bucket.height == bucket.width or not rows:
            continue
        captions = [pictures.captions[i] for i in rows]
        images = painter.captions(captions, bucket.height, bucket.width, sampling, SAMPLE_SEED)
        assert pictures.specs is not None
        name = f"{bucket.height}x{bucket.width}"
        found[name] = score(pad_to_square(images).numpy(), [pictures.specs[i] for i in rows])
        save_grid(images[:12], stage.folder / f"samples-{name}.png", columns=6, captions=captions[:12], tile=96)
    return {"buckets": found} if found else {}


def guidance_curve(stage: Stage, painter: Painter, pictures: Pictures) -> list[dict[str, float]]:
    """FID, KID and the verifier's accuracy at each guidance scale of `sampling.curve`, at equal counts."""
    from common.data.shapes_verifier import verify
    from common.metrics.distribution import fid, kid
    from common.metrics.features import extract, load_extractor

    sampling = stage.config.sampling
    count = min(sampling.curve_images, len(pictures))
    judge = load_extractor("lite0")
    real = extract(pictures.images(range(count)), judge)
    curve = []
    for guidance in sampling.curve:
        fake = draw_like(painter, pictures, range(count), replace(sampling, guidance=guidance), stage.config.kind)
        features = extract(fake, judge)
        point = {"guidance": guidance, "images": count, "fid_lite0": fid(real, features)}
        point["kid_lite0"] = kid(real, features).value
        if pictures.specs is not None:
            point["accuracy"] = float(verify(fake.numpy(), pictures.specs[:count]).mean())
        curve.append(point)
    return curve


def report(metrics: dict[str, Any]) -> None:
    """Print the numbers a person looks for first."""
    from common.metrics.evaluate import format_report

    if "judge" in metrics:
        print(format_report(metrics["judge"]))
    for name in ("shapes_score", "own_captions"):
        if name in metrics:
            values = {k: v for k, v in metrics[name].items() if not k.endswith(("_low", "_high"))}
            print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    if "held_out" in metrics:
        print("held out: noise error {mse:.4f}, with wrong captions {penalty:+.1%}".format(**metrics["held_out"]))
    for point in metrics.get("curve", ()):
        print(", ".join(f"{name} {value:.4g}" for name, value in point.items()))
    print(f"sampling: {metrics['images_per_second']} images/s")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of a run of train.py")
    parser.add_argument("--stage", help="default: the one that finished last")
    parser.add_argument("--images", type=Path, help="your own image folder (default: the stage's held-out pictures)")
    options = parser.parse_args(argv)
    from common.training import write_metrics
    from pixart.config import read_recipe
    from pixart.run import Stage
    from pixart.sample import ABOUT

    marks = sorted(options.run_dir.glob(f"{options.stage or '*'}/model/{ABOUT}"), key=lambda p: p.stat().st_mtime)
    if not marks:
        raise UserError(f"{options.run_dir}: no finished stage {options.stage or ''} there; train first")
    folder = marks[-1].parents[1]
    arguments = ["--config", str(folder / "config.yaml"), "--run_dir", str(options.run_dir)]
    ((config, _),) = read_recipe(arguments, "").stages
    stage = Stage(config, folder, None)
    painter = stage.painter()
    if options.images is not None:
        config.data.name, config.data.path, config.vae = "folder", str(options.images), stage.vae
        stage = Stage(config, folder / f"on-{options.images.resolve().name}", None, measured="all")
    return write_metrics(stage.folder / "metrics.json", evaluate_stage(stage, painter), {}, 0.0, trained=False)


if __name__ == "__main__":
    run_main(main)
