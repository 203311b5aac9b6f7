"""Put a finished run into the repository: `python hipa/publish.py --run_dir runs/hipa-small --name shapes32`.

Copies the adaptors in half precision to pretrained/, checks that stock diffusers loads them, writes their model card
from the run's own metrics, and brings its pictures to results/figures/hipa/. Its numbers come into results/ with
`python -m report.record_run hipa runs/hipa-small`.
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

PRETRAINED = WORKPLACE / "hipa" / "pretrained"
CAPTIONS = {
    "comparison": "Default run, same prompts and noises: teacher with 20 and 2 steps; one step: frozen, adapted by "
    "pixel loss, by the spatial loss, by HiPA.",
    "spectra": "Default run: power by frequency, agreement with the teacher's 20 steps by band, and FD after bands are "
    "exchanged between one and many steps.",
}


def about(name: str, seed: int, metrics: Mapping[str, Any], commit: str) -> publishing.About:
    """The front matter of the adaptors' card."""
    arm = metrics["arms"]["HiPA, 1 step"]
    return publishing.About(
        name,
        "text-to-image",
        "diffusers",
        data=f"pictures of the frozen teacher from prompts of {metrics['prompts']}",
        seeds=[seed],
        commit=commit,
        measured={key: arm[key] for key in ("fd_data", "fd_teacher", "perceptual", "hf_error", "accuracy")},
        judge=metrics["judge"],
        held_out=f"{metrics['images']} held-out prompts of {metrics['prompts']}",
        base_model=metrics["teacher"],
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's adaptors to pretrained/`name` and its pictures and numbers to results/.

    Raises:
        UserError: the run is not finished.
    """
    from common.adaptors import FILE

    config, metrics = publishing.read_run(run_dir, "comparison.png", "spectra.png", f"hipa/lora/{FILE}")
    origin = publishing.origin([run_dir], "torch", "diffusers", "peft")

    import torch
    from diffusers import StableDiffusionPipeline

    from common.pretrained import from_folder

    target = PRETRAINED / name
    publishing.copy_pipeline(run_dir / "hipa" / "lora", target)
    publishing.copy_half(run_dir / "hipa" / "lora" / FILE, target / FILE)
    opened = from_folder(StableDiffusionPipeline, Path(config["teacher"]), dtype=torch.float32)
    opened.load_lora_weights(target, weight_name=FILE)
    shutil.copyfile(run_dir / "comparison.png", target / "comparison.png")
    costs = metrics["costs"]
    trained = costs["trained_parameters"]["HiPA, 1 step"]
    facts = {
        "teacher": f"`{config['teacher']}`, sha256 {metrics['teacher_sha256'][:16]}",
        "command": "`make hipa-train` (hipa/configs/small.yaml)",
        "steps": f"{config['trainer']['max_steps']} of {config['trainer']['batch_size']}",
        "pairs": f"{config['pairs']['count']:,} of {config['pairs']['steps']} steps",
        "guidance": f"{metrics['guidance']:g}, inside the weights: call it with guidance_scale 1",
        "steps to sample with": "1, at the last training step (`scheduler/`)",
        "parameters": f"{trained:,} of the U-Net's {costs['unet_parameters']:,}",
        "judge": f"{metrics['judge']}; {metrics['images']} images an arm",
        **origin,
    }
    text = publishing.model_card(
        about(name, config["seed"], metrics, origin["commit"]),
        f"Low-rank adaptors that make `{config['teacher']}` draw in one step, by `hipa` of this repository.",
        f"""```python
from diffusers import DDIMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{config["teacher"]}")
pipe.load_lora_weights("hipa/pretrained/{name}")
pipe.scheduler = DDIMScheduler.from_pretrained("hipa/pretrained/{name}/scheduler")
pipe("a red star", num_inference_steps=1, guidance_scale=1.0).images[0].save("star.png")
```""",
        "![comparison](comparison.png)",
        publishing.facts_table(facts),
        (run_dir / "table.md").read_text(),
    )
    (target / "README.md").write_text(text)
    for picture, caption in CAPTIONS.items():
        place = RESULTS / "figures" / "hipa" / f"default_run_{picture}.png"
        publishing.copy_picture(run_dir / f"{picture}.png", place, caption)
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
