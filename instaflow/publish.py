"""Put a finished run into the repository: `python instaflow/publish.py --run_dir runs/instaflow-small --name shapes32`.

Copies the one-step pipeline in half precision to pretrained/, checks that stock diffusers opens it, writes its model
card from the run's own metrics, and brings the comparison sheet (results/figures/instaflow/) and the numbers
(results/runs/, results/run_instaflow.md for the README) along.
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
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, arm in metrics["arms"].items():
        cells = [name, str(forwards.get(name, "-")), *(f"{round(arm[key], 6):.4g}" for key in shown)]
        lines.append("| " + " | ".join(cells) + " |")
    seconds = ", ".join(f"{part} {value:.0f}" for part, value in metrics["seconds"].items())
    return "\n".join([*lines, "", f"Wall seconds: {seconds}."]) + "\n"


def card(name: str, table: str, facts: dict[str, str]) -> str:
    """The model card's text; every number comes from the run."""
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            "---",
            f"# {name}",
            "",
            "A one-step text-to-image model: `ldm/pretrained/shapes32-v`, reflowed and distilled by "
            "[`instaflow`](../../README.md) of this repository.",
            "",
            "```python",
            "from diffusers import StableDiffusionPipeline",
            "",
            f'pipe = StableDiffusionPipeline.from_pretrained("instaflow/pretrained/{name}")',
            'pipe("a red star", num_inference_steps=1, guidance_scale=0.0).images[0].save("star.png")',
            "```",
            "",
            "![comparison](comparison.png)",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "",
            table,
        ]
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's pipeline to pretrained/`name` and its picture and numbers to results/.

    Raises:
        UserError: the run is not finished.
    """
    import torch
    import yaml
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file, save_file

    from common.ledger import commit, hardware, versions

    for needed in ("metrics.json", "comparison.png", "config.yaml", "pipeline/model_index.json"):
        if not (run_dir / needed).is_file():
            raise UserError(f"--run_dir {run_dir}: {needed} is missing; expected a finished run of train.py")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    pairs = config["pairs"]
    table = arms_table(metrics)
    target = PRETRAINED / name
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(run_dir / "pipeline", target)
    for path in target.rglob("*.safetensors"):
        state = load_file(path)
        half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        save_file(half, path, metadata={"format": "pt"})
    opened = StableDiffusionPipeline.from_pretrained(target, dtype=torch.float32)
    parameters = sum(p.numel() for p in opened.unet.parameters())
    shutil.copyfile(run_dir / "comparison.png", target / "comparison.png")
    facts = {
        "teacher": "`ldm/pretrained/shapes32-v`, sha256 " + str(metrics["teacher_sha256"])[:16],
        "command": "`make instaflow-train` (instaflow/configs/small.yaml)",
        "pairs": f"{pairs['count']}, {pairs['steps']} steps, guidance {pairs['guidance']}",
        "steps": f"reflow {config['reflow']['steps']}, distillation {config['distil']['steps']}, perceptual "
        f"{config['perceptual']['steps']}",
        "parameters of the U-Net": f"{parameters:,}, float16",
        "judge": f"{metrics['judge']}; {metrics['images']} images an arm",
        "hardware": f"{hardware()}; one thread, other programs were running beside it",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("torch", "diffusers", "transformers")),
        "commit": commit(),
    }
    (target / "README.md").write_text(card(name, table, facts))
    (RESULTS / "run_instaflow.md").write_text(table)
    (RESULTS / "runs" / "instaflow-small.json").write_text(json.dumps({**metrics, "facts": facts}, indent=1) + "\n")
    figures = RESULTS / "figures" / "instaflow"
    figures.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run_dir / "comparison.png", figures / "default_run.png")
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(argv)
    target = publish(options.run_dir, options.name)
    size = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
    print(f"{target.relative_to(REPOSITORY)}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
