"""Put a finished text-to-image run into pretrained/: `python publish.py --run_dir runs/teacher-emoji64 --name emoji64`.

Copies the run's diffusers directory (half precision), draws its sample grid with plain diffusers from the copied files,
and writes the model card from the run's own metrics.json and config.yaml.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_main
from common.paths import REPOSITORY, RESULTS

PRETRAINED = Path(__file__).parent / "pretrained"
PROMPTS = {
    "shapes": [
        "a star",
        "a red heart",
        "three blue circles",
        "a green cross and a purple ring",
        "a yellow star left of a pink square",
        "a cyan diamond above an orange triangle",
        "five black squares",
        "a brown ring",
    ],
    "emoji": [
        "red apple, flat style",
        "red heart, shaded style",
        "sun, rounded style",
        "cat face, blob style",
        "grinning face, simple style",
        "tree, shaded style",
        "fish, flat style",
        "blue circle, rounded style",
        # Without a style: the seeds choose it.
        "cat face",
        "house",
        "tree",
        "grinning face",
    ],
}
PER_PROMPT = 6


def card(name: str, config: dict[str, Any], metrics: dict[str, Any], facts: dict[str, str]) -> str:
    """The model card's text; every number comes from the run."""
    summary = metrics["summary"]
    sampling = metrics["sampling"]
    judge = metrics["judge"]
    counts = f"{judge['n_fake']} samples against {judge['n_real']} held-out images"
    rows = [
        ("KID x 1000 (`kid_lite0`)", f"{1000 * summary['kid_lite0']:.1f}", f"{1000 * summary['floor/kid_lite0']:.1f}"),
        ("FID (`fid_lite0`)", f"{summary['fid_lite0']:.0f}", "-"),
        (
            "FID at the floor's count",
            f"{summary['metrics_at_floor_n/fid_lite0']:.0f}",
            f"{summary['floor/fid_lite0']:.0f}",
        ),
        ("precision", f"{summary['precision_lite0']:.3f}", f"{summary['floor/precision_lite0']:.3f}"),
        ("recall", f"{summary['recall_lite0']:.3f}", f"{summary['floor/recall_lite0']:.3f}"),
    ]
    if "alignment" in metrics:
        scored, real = metrics["alignment"], metrics["alignment_real"]
        rows += [
            ("caption retrieval R@1 of 100", f"{scored['r_at_1']:.3f}", f"{real['r_at_1']:.3f} (real images)"),
            ("right caption beats random", f"{scored['right_beats_random']:.3f}", f"{real['right_beats_random']:.3f}"),
        ]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        f"# {name}",
        "",
        f"A small text-conditional latent diffusion model ({facts['prediction']}-prediction), trained from scratch by "
        "[`ldm`](../../README.md) of this repository. It is a teacher for experiments, not a product.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("ldm/pretrained/{name}")',
        f'image = pipeline("{facts["prompt"]}", num_inference_steps=50, guidance_scale=3.0).images[0]',
        "```",
        "",
        "![samples](samples.png)",
        "",
        f"{PER_PROMPT} seeds per prompt, DDIM 50 steps, guidance 3, drawn by diffusers from these files.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items() if key not in ("prompt", "prediction")),
        "",
        f"Metrics ({counts}; {sampling['sampler']} {sampling['steps']} steps, guidance {sampling['guidance']}; judge: "
        "EfficientNet-Lite0 at 112 px, not comparable with Inception FID):",
        "",
        "| metric | samples | floor (two halves of the real images) |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]
    if "first_stage" in metrics:
        stage = metrics["first_stage"]
        lines += ["", f"First stage on held-out images: PSNR {stage['psnr']:.2f} dB, SSIM {stage['ssim']:.3f}."]
    if "shapes_score" in metrics:
        score = metrics["shapes_score"]
        tasks = [key for key in score if f"{key}_low" in score]
        lines += ["", "Shapes score (the exact verifier, 100 prompts a task, 95 % interval):", ""]
        lines += ["| task | accuracy | interval |", "|---|---|---|"]
        lines += [f"| {t} | {score[t]:.3f} | {score[t + '_low']:.3f} to {score[t + '_high']:.3f} |" for t in tasks]
    return "\n".join(lines) + "\n"


def logged_seconds(stage: Path) -> float:
    """Wall seconds between the first and the last logged step of a stage, summed over its starts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seconds = 0.0
    for folder in sorted((stage / "tensorboard").glob("version_*")):
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"][:1]:
            times = [event.wall_time for event in events.Scalars(tag)]
            seconds += times[-1] - times[0]
    return seconds


def publish(run_dir: Path, name: str) -> None:
    import yaml

    from common.images import save_grid
    from common.ledger import commit, hardware, versions
    from common.teacher import open_pipeline
    from ldm.sample import pipeline_images

    for needed in ("pipeline/model_index.json", "metrics.json", "config.yaml", "reconstruction.png"):
        if not (run_dir / needed).is_file():
            raise UserError(f"--run_dir {run_dir}: {needed} is missing; expected a finished text run of train.py")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    metrics = json.loads((run_dir / "metrics.json").read_text())
    revision = commit()  # before the published files change the working tree
    target = PRETRAINED / name
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(run_dir / "pipeline", target)
    pipeline = open_pipeline(target)
    pipeline.set_progress_bar_config(disable=True)
    prompts = PROMPTS[config["data"]["name"]]
    repeated = [prompt for prompt in prompts for _ in range(PER_PROMPT)]
    images = pipeline_images(pipeline, repeated, steps=50, guidance=3.0, seed=0)
    size = config["data"]["size"]
    for path in (target / "samples.png", RESULTS / "figures" / "ldm" / f"{name}.png"):
        save_grid(images, path, columns=2 * PER_PROMPT, captions=repeated, tile=max(64, size))
    shutil.copyfile(run_dir / "reconstruction.png", RESULTS / "figures" / "ldm" / f"{name}-reconstruction.png")
    weights = [path for path in target.rglob("*.safetensors")]
    # From the logs, which also know the starts before the last one; a stage that was loaded, not trained, has none.
    seconds = {stage: logged_seconds(run_dir / stage) for stage in ("first_stage", "diffusion")}
    seconds = {stage: value for stage, value in seconds.items() if value > 0}
    unet = sum(p.numel() for p in pipeline.unet.parameters())
    vae = sum(p.numel() for p in pipeline.vae.parameters())
    text = sum(p.numel() for p in pipeline.text_encoder.parameters())
    trainer, stage = config["trainer"], config["first_stage"]
    facts = {
        "prediction": config["diffusion"]["prediction"],
        "prompt": prompts[0],
        "data": f"{config['data']['name']}, {size}x{size}, training split (common/README.md: source, licence)",
        "command": f"`python ldm/train.py --config ldm/configs/teachers/{name}.yaml`",
        "first stage": f"KL, f = {2 ** (len(stage['ch_mult']) - 1)}, {stage['z_channels']} channels, "
        f"{stage['steps']} steps of {stage['batch_size']} images, {stage.get('optimiser', 'adam')}",
        "denoiser": f"{trainer['max_steps']} steps of {trainer['batch_size']} images, {trainer['precision']}, "
        f"{config['optimiser'].get('name', 'adamw')}"
        + (f", started from `{config['init_from']}`" if config.get("init_from") else ""),
        "seconds (wall; the machine did other work too)": ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()),
        "hardware": f"{hardware()}, {trainer['threads'] or 'all'} thread{'' if trainer['threads'] == 1 else 's'}",
        "parameters": f"U-Net {unet:,}, autoencoder {vae:,}, text encoder {text:,}",
        "size on disk": f"{sum(p.stat().st_size for p in weights) / 1e6:.1f} MB (float16)",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("torch", "diffusers", "transformers")),
        "commit": revision,
    }
    (target / "README.md").write_text(card(name, config, metrics, facts))
    kept = {
        k: metrics[k] for k in ("summary", "first_stage", "shapes_score", "alignment", "alignment_real") if k in metrics
    }
    (target / "metrics.json").write_text(json.dumps({**kept, "facts": facts}, indent=1) + "\n")
    print(f"{target.relative_to(REPOSITORY)}: {facts['size on disk']}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(argv)
    publish(options.run_dir, options.name)


if __name__ == "__main__":
    run_main(main)
