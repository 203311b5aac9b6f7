"""Put a finished text run into pretrained/: `python ldm/publish.py --run_dir runs/teacher-emoji64 --name emoji64`.

Copies the run's diffusers directory (half precision), draws its sample grid with plain diffusers from the copied files,
and writes the model card from the run's own metrics.json and config.yaml.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from common import publishing
from common.errors import run_main
from common.paths import RESULTS, WORKPLACE

PRETRAINED = WORKPLACE / "ldm" / "pretrained"
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


def card(name: str, seed: int, metrics: dict[str, Any], facts: dict[str, str], base: str | None = None) -> str:
    """The model card's text; every number comes from the run.

    Args:
        base: the model that it was started from.
    """
    summary, sampling, judge = metrics["summary"], metrics["sampling"], metrics["judge"]
    at_floor = f"{summary['metrics_at_floor_n/fid_lite0']:.0f}"
    rows = [
        ("KID x 1000 (`kid_lite0`)", f"{1000 * summary['kid_lite0']:.1f}", f"{1000 * summary['floor/kid_lite0']:.1f}"),
        ("FID (`fid_lite0`)", f"{summary['fid_lite0']:.0f}", "-"),
        ("FID at the floor's count", at_floor, f"{summary['floor/fid_lite0']:.0f}"),
        ("precision", f"{summary['precision_lite0']:.3f}", f"{summary['floor/precision_lite0']:.3f}"),
        ("recall", f"{summary['recall_lite0']:.3f}", f"{summary['floor/recall_lite0']:.3f}"),
    ]
    if "alignment" in metrics:
        scored, real = metrics["alignment"], metrics["alignment_real"]
        rows += [
            ("caption retrieval R@1 of 100", f"{scored['r_at_1']:.3f}", f"{real['r_at_1']:.3f} (real images)"),
            ("right caption beats random", f"{scored['right_beats_random']:.3f}", f"{real['right_beats_random']:.3f}"),
        ]
    blocks = [
        f"A small text-conditional latent diffusion model ({facts['prediction']}-prediction), trained from scratch by "
        "`ldm` of this repository. It is a teacher for experiments, not a product.",
        f"""```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("ldm/pretrained/{name}")
image = pipeline("{facts["prompt"]}", num_inference_steps=50, guidance_scale=3.0).images[0]
```""",
        "![samples](samples.png)",
        f"{PER_PROMPT} seeds per prompt, DDIM 50 steps, guidance 3, drawn by diffusers from these files.",
        publishing.facts_table({key: value for key, value in facts.items() if key not in ("prompt", "prediction")}),
        f"Metrics ({judge['n_fake']} samples against {judge['n_real']} held-out images; {sampling['sampler']} "
        f"{sampling['steps']} steps, guidance {sampling['guidance']}; judge: EfficientNet-Lite0 at 112 px, not "
        "comparable with Inception FID):",
        publishing.markdown_table(("metric", "samples", "floor (two halves of the real images)"), rows),
    ]
    if "first_stage" in metrics:
        stage = metrics["first_stage"]
        blocks.append(f"First stage on held-out images: PSNR {stage['psnr']:.2f} dB, SSIM {stage['ssim']:.3f}.")
    if "shapes_score" in metrics:
        score = metrics["shapes_score"]
        tasks = [
            (task, f"{score[task]:.3f}", f"{score[task + '_low']:.3f} to {score[task + '_high']:.3f}")
            for task in score
            if f"{task}_low" in score
        ]
        blocks.append("Shapes score (the exact verifier, 100 prompts a task, 95 % interval):")
        blocks.append(publishing.markdown_table(("task", "accuracy", "interval"), tasks))
    measured = {key: summary[key] for key in ("kid_lite0", "fid_lite0", "precision_lite0", "recall_lite0")}
    measured |= {"shapes_score": metrics["shapes_score"]["mean"]} if "shapes_score" in metrics else {}
    measured |= {"r_at_1": metrics["alignment"]["r_at_1"]} if "alignment" in metrics else {}
    about = publishing.About(
        name,
        "text-to-image",
        "diffusers",
        data=facts["data"],
        seeds=[seed],
        commit=facts["commit"],
        measured=measured,
        judge="EfficientNet-Lite0 at 112 px",
        held_out=f"{judge['n_real']} held-out images",
        base_model=base,
    )
    return publishing.model_card(about, *blocks)


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


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's pipeline to pretrained/`name`, and its pictures to results/."""
    from common.costs import parameter_count
    from common.images import save_grid
    from common.precision import precisions_taken
    from common.teacher import open_pipeline
    from ldm.sample import pipeline_images

    config, metrics = publishing.read_run(run_dir, "pipeline/model_index.json", "reconstruction.png")
    origin = publishing.origin([run_dir], "torch", "diffusers", "transformers")
    target, figures = PRETRAINED / name, RESULTS / "figures" / "ldm"
    publishing.copy_pipeline(run_dir / "pipeline", target)
    pipeline = open_pipeline(target)
    pipeline.set_progress_bar_config(disable=True)
    prompts = PROMPTS[config["data"]["name"]]
    repeated = [prompt for prompt in prompts for _ in range(PER_PROMPT)]
    images = pipeline_images(pipeline, repeated, steps=50, guidance=3.0, seed=0)
    size = config["data"]["size"]
    save_grid(images, target / "samples.png", columns=2 * PER_PROMPT, captions=repeated, tile=max(64, size))
    caption = f"Teacher {name}: {PER_PROMPT} seeds a prompt, guidance 3."
    publishing.copy_picture(target / "samples.png", figures / f"{name}.png", caption)
    caption = f"First stage of {name}: pictures (above) and their reconstructions (below)."
    publishing.copy_picture(run_dir / "reconstruction.png", figures / f"{name}-reconstruction.png", caption)
    # From the logs, which also know the starts before the last one; a stage that was loaded, not trained, has none.
    logged = {stage: logged_seconds(run_dir / stage) for stage in ("first_stage", "diffusion")}
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in logged.items() if value > 0)
    unet, vae, text = (f"{parameter_count(part):,}" for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    trainer, stage, threads = config["trainer"], config["first_stage"], config["trainer"]["threads"]
    precision = precisions_taken(run_dir / "diffusion", trainer["precision"])
    facts = {
        "prediction": config["diffusion"]["prediction"],
        "prompt": prompts[0],
        "data": f"{config['data']['name']}, {size}x{size}, training split (common/README.md: source, licence)",
        "command": f"`python ldm/train.py --config ldm/configs/teachers/{name}.yaml`",
        "first stage": f"KL, f = {2 ** (len(stage['ch_mult']) - 1)}, {stage['z_channels']} channels, "
        f"{stage['steps']} steps of {stage['batch_size']} images, {stage.get('optimiser', 'adam')}",
        "denoiser": f"{trainer['max_steps']} steps of {trainer['batch_size']} images, {precision}, "
        f"{config['optimiser'].get('name', 'adamw')}"
        + (f", started from `{config['init_from']}`" if config.get("init_from") else ""),
        "seconds (wall; the machine did other work too)": seconds,
        "hardware": f"{origin['hardware']}, {threads or 'all'} thread{'' if threads == 1 else 's'}",
        "parameters": f"U-Net {unet}, autoencoder {vae}, text encoder {text}",
        "size on disk": f"{publishing.weights_megabytes(target):.1f} MB (float16)",
        "versions": origin["versions"],
        "commit": origin["commit"],
    }
    (target / "README.md").write_text(card(name, config["seed"], metrics, facts, config.get("init_from")))
    kept = {
        k: metrics[k] for k in ("summary", "first_stage", "shapes_score", "alignment", "alignment_real") if k in metrics
    }
    (target / "metrics.json").write_text(json.dumps({**kept, "facts": facts}, indent=1) + "\n")
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
