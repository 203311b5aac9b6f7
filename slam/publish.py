"""Put a finished run into the repository: `python slam/publish.py --run_dir runs/slam-small --name shapes32`.

Copies the student's pipeline in half precision to pretrained/, checks that stock diffusers opens it, writes its model
card from the run's own metrics, and brings its pictures to results/figures/slam/. Its numbers come into results/ with
`python -m report.record_run slam runs/slam-small`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import publishing
from common.errors import run_main
from common.paths import RESULTS, WORKPLACE

PRETRAINED = WORKPLACE / "slam" / "pretrained"
CAPTION = "Default run, same prompts and noises: teacher with 25 and 4 steps, LCM with 4, SLAM with 1, 2, 4 and 8."


def about(name: str, seed: int, metrics: Mapping[str, Any], commit: str) -> publishing.About:
    """The front matter of the student's card."""
    arms = {key: value for key, value in metrics["arms"].items() if key.startswith("SLAM")}
    return publishing.About(
        name,
        "text-to-image",
        "diffusers",
        data=f"captioned pictures of {metrics['data']}",
        seeds=[seed],
        commit=commit,
        measured={f"{key}, {arm}": arms[arm][key] for arm in arms for key in ("fd_data", "accuracy")},
        judge=metrics["judge"],
        held_out=f"{metrics['images']} held-out prompts of {metrics['data']}",
        base_model=metrics["teacher"],
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's pipeline to pretrained/`name` and its pictures and numbers to results/.

    Raises:
        UserError: the run is not finished.
    """
    config, metrics = publishing.read_run(run_dir, "comparison.png", "slam/pipeline/model_index.json")
    origin = publishing.origin([run_dir], "torch", "diffusers", "transformers")

    import torch
    from diffusers import LatentConsistencyModelPipeline

    from common.costs import parameter_count
    from common.pretrained import from_folder

    target = PRETRAINED / name
    publishing.copy_pipeline(run_dir / "slam" / "pipeline", target)
    for path in target.rglob("*.safetensors"):
        publishing.copy_half(path, path)
    opened = from_folder(LatentConsistencyModelPipeline, target, dtype=torch.float32)
    shutil.copyfile(run_dir / "comparison.png", target / "comparison.png")
    facts = {
        "teacher": f"`{config['teacher']}`, sha256 {metrics['teacher_sha256'][:16]}",
        "command": "`make slam-train` (slam/configs/small.yaml)",
        "steps": f"{config['trainer']['max_steps']} of {config['trainer']['batch_size']}",
        "guidance": f"{metrics['guidance']:g}, inside the weights: call it with guidance_scale 1",
        "steps to sample with": "1 to 8",
        "parameters of the U-Net": f"{parameter_count(opened.unet):,}, float16",
        "judge": f"{metrics['judge']}; {metrics['images']} images an arm",
        **origin,
    }
    call = f"num_inference_steps=4, guidance_scale=1.0, original_inference_steps={config['subpath']['solver_steps']}"
    text = publishing.model_card(
        about(name, config["seed"], metrics, origin["commit"]),
        f"A 1 to 8 step text-to-image model: `{config['teacher']}`, distilled by `slam` of this repository.",
        f"""```python
from diffusers import LatentConsistencyModelPipeline

pipe = LatentConsistencyModelPipeline.from_pretrained("slam/pretrained/{name}")
pipe("a red star", {call}).images[0].save("star.png")
```""",
        "![comparison](comparison.png)",
        publishing.facts_table(facts),
        (run_dir / "table.md").read_text(),
    )
    (target / "README.md").write_text(text)
    for picture, caption in (("comparison", CAPTION), ("errors", "Error along the sub-path after the default run.")):
        publishing.copy_picture(
            run_dir / f"{picture}.png", RESULTS / "figures" / "slam" / f"default_run_{picture}.png", caption
        )
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
