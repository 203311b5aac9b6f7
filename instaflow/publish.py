"""Put a finished run into the repository: `python instaflow/publish.py --run_dir runs/instaflow-small --name shapes32`.

Copies the one-step pipeline in half precision to pretrained/, checks that stock diffusers opens it, writes its model
card from the run's own metrics, and brings the comparison sheet (results/figures/instaflow/) and the numbers
(results/runs/, results/run_instaflow.md for the README) along.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import publishing
from common.errors import run_main
from common.files import write_atomically, write_json
from common.paths import RESULTS, WORKPLACE

PRETRAINED = WORKPLACE / "instaflow" / "pretrained"
CAPTION = "Default run, same prompts and noises: teacher with 25 steps and 1, 2-RF and InstaFlow with 1."
COLUMNS = {
    "fd_data": "FD to held-out data",
    "fd_teacher": "FD to the teacher",
    "perceptual": "perceptual distance",
    "hf_error": "high-frequency error",
    "accuracy": "accuracy",
    "entropy": "entropy",
}


def arms_table(metrics: dict[str, Any]) -> str:
    """A Markdown table, one line an arm, then the seconds of every part."""
    forwards = metrics["unet_forwards_per_image"]
    shown = [key for key in COLUMNS if all(key in arm for arm in metrics["arms"].values())]
    head = ["arm", "U-Net evaluations an image", *(COLUMNS[key] for key in shown)]
    rows = [
        [name, str(forwards.get(name, "-")), *(f"{round(arm[key], 6):.4g}" for key in shown)]
        for name, arm in metrics["arms"].items()
    ]
    seconds = ", ".join(f"{part} {value:.0f}" for part, value in metrics["seconds"].items())
    return f"{publishing.markdown_table(head, rows)}\n\nWall seconds: {seconds}.\n"


def about(name: str, seed: int, metrics: Mapping[str, Any], commit: str) -> publishing.About:
    """The front matter of the flow's card."""
    arm = metrics["arms"]["InstaFlow 1-step"]
    return publishing.About(
        name,
        "text-to-image",
        "diffusers",
        data=f"pictures of the teacher from prompts of {metrics['prompts']}",
        seeds=[seed],
        commit=commit,
        measured={key: arm[key] for key in COLUMNS if key in arm},
        judge=metrics["judge"],
        held_out=f"{metrics['images']} held-out prompts of {metrics['prompts']}",
        base_model=metrics["teacher"],
    )


def card(front: publishing.About, table: str, facts: dict[str, str]) -> str:
    """The model card's text; every number comes from the run."""
    name = front.name
    return publishing.model_card(
        front,
        "A one-step text-to-image model: `ldm/pretrained/shapes32-v`, reflowed and distilled by `instaflow` of this "
        "repository.",
        f"""```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("instaflow/pretrained/{name}")
pipe("a red star", num_inference_steps=1, guidance_scale=0.0).images[0].save("star.png")
```""",
        "![comparison](comparison.png)",
        publishing.facts_table(facts),
        table,
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's pipeline to pretrained/`name` and its picture and numbers to results/.

    Raises:
        UserError: the run is not finished.
    """
    config, metrics = publishing.read_run(run_dir, "comparison.png", "pipeline/model_index.json")
    origin = publishing.origin([run_dir], "torch", "diffusers", "transformers")

    import torch
    from diffusers import StableDiffusionPipeline

    from common.costs import parameter_count
    from common.pretrained import from_folder

    pairs, steps = config["pairs"], {stage: config[stage]["steps"] for stage in ("reflow", "distil", "perceptual")}
    table, target = arms_table(metrics), PRETRAINED / name
    publishing.copy_pipeline(run_dir / "pipeline", target)
    for path in target.rglob("*.safetensors"):
        publishing.copy_half(path, path)
    opened = from_folder(StableDiffusionPipeline, target, dtype=torch.float32)
    shutil.copyfile(run_dir / "comparison.png", target / "comparison.png")
    facts = {
        "teacher": "`ldm/pretrained/shapes32-v`, sha256 " + str(metrics["teacher_sha256"])[:16],
        "command": "`make instaflow-train` (instaflow/configs/small.yaml)",
        "pairs": f"{pairs['count']}, {pairs['steps']} steps, guidance {pairs['guidance']}",
        "steps": f"reflow {steps['reflow']}, distillation {steps['distil']}, perceptual {steps['perceptual']}",
        "parameters of the U-Net": f"{parameter_count(opened.unet):,}, float16",
        "judge": f"{metrics['judge']}; {metrics['images']} images an arm",
        **origin,
        "hardware": f"{origin['hardware']}; one thread, other programs were running beside it",
    }
    (target / "README.md").write_text(card(about(name, config["seed"], metrics, origin["commit"]), table, facts))
    write_atomically(RESULTS / "run_instaflow.md", lambda temporary: temporary.write_text(table))
    write_json(RESULTS / "runs" / "instaflow-small.json", {**metrics, "facts": facts})
    publishing.copy_picture(run_dir / "comparison.png", RESULTS / "figures" / "instaflow" / "default_run.png", CAPTION)
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
