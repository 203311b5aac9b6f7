"""Put a finished recipe into pretrained/: `python pixart/publish.py --run_dir runs/pixart-small --name shapes`.

Copies the last stage's averaged weights in half precision, writes the model card from the run's own metrics, and brings
the run's sample grids (results/figures/pixart/) and its numbers (results/runs/, results/run_pixart.md for the README)
into the repository.
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
TASKS = ("single", "two", "count", "color", "position", "attr", "mean")


def stage_table(stages: list[dict[str, Any]]) -> str:
    """A Markdown table, one line a stage: size, steps, CPU threads, wall seconds and the quality of its samples."""
    lines = [
        "| stage | pixels | steps x batch | threads | s training | s features, evaluation | held-out eps-MSE "
        "| wrong-caption penalty | FID | own captions | Shapes score |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in stages:
        config, metrics = stage["config"], stage["metrics"]
        seconds, held_out = metrics["seconds"], metrics.get("held_out", {})
        cells = [
            stage["name"],
            str(config["data"]["size"]),
            f"{config['trainer']['max_steps']} x {config['trainer']['batch_size']}",
            str(config["trainer"]["threads"]),
            f"{seconds['training']:.0f}",
            f"{seconds['features'] + seconds['evaluation']:.0f}",
            f"{held_out['mse']:.4f}" if held_out else "-",
            f"{held_out['penalty']:.2f}" if held_out else "-",
            f"{metrics['summary']['fid_lite0']:.0f}" if "summary" in metrics else "-",
            f"{metrics['own_captions']['mean']:.2f}" if "own_captions" in metrics else "-",
            f"{metrics['shapes_score']['mean']:.2f}" if "shapes_score" in metrics else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def card(name: str, last: dict[str, Any], table: str, facts: dict[str, str]) -> str:
    """The model card's text; every number comes from the run."""
    metrics = last["metrics"]
    judge, summary = metrics["judge"], metrics["summary"]
    score, own = metrics["shapes_score"], metrics["own_captions"]
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "pipeline_tag: text-to-image",
            "---",
            f"# {name}",
            "",
            "A small PixArt-alpha network, trained from scratch in the paper's stages by [`pixart`](../../README.md) "
            "of this repository.",
            "",
            "```",
            '.venv/bin/python pixart/sample.py --prompt "a red circle left of a blue square"',
            "```",
            "",
            "![samples](samples.png)",
            "",
            "Held-out captions of the last stage, "
            f"{metrics['sampling']['steps']} {metrics['sampling']['sampler']} steps, "
            f"guidance {metrics['sampling']['guidance']}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "",
            f"KID x 1000 {1000 * summary['kid_lite0']:.0f} (floor {1000 * summary['floor/kid_lite0']:.0f}), FID "
            f"{summary['metrics_at_floor_n/fid_lite0']:.0f} (floor {summary['floor/fid_lite0']:.0f}); "
            f"{judge['n_fake']} samples against {judge['n_real']} held-out pictures, EfficientNet-Lite0 at 112 px, not "
            "comparable with Inception FID.",
            "",
            "Accuracy by the exact verifier, on prompts of each task and on held-out captions of the stage's own kind:",
            "",
            "| task | prompts | own captions |",
            "|---|---|---|",
            *(f"| {task} | {score[task]:.3f} | {own[task]:.3f} |" for task in TASKS if task in score and task in own),
            "",
            "The stages of the run:",
            "",
            table,
        ]
    )


def read_stages(run_dir: Path) -> list[dict[str, Any]]:
    """Config and metrics of every stage that the run's metrics.json lists, and the whole recipe's wall seconds.

    Raises:
        UserError: a file of a finished recipe is missing.
    """
    import yaml

    top = run_dir / "metrics.json"
    if not top.is_file():
        raise UserError(f"--run_dir {run_dir}: metrics.json is missing; expected a finished recipe of train.py")
    stages = []
    recipe = json.loads(top.read_text())
    for name in recipe["stages"]:
        folder = run_dir / name
        for needed in ("config.yaml", "metrics.json", "model/model.safetensors"):
            if not (folder / needed).is_file():
                raise UserError(f"{folder / needed} is missing; expected a finished stage of train.py")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
        stages.append({"name": name, "config": config, "metrics": metrics, "total_seconds": recipe["seconds"]["total"]})
    return stages


def publish(run_dir: Path, name: str) -> Path:
    """Copy the run's last stage to pretrained/`name` and its pictures and numbers to results/."""
    from safetensors.torch import load_file, save_file

    from common.ledger import commit, hardware, versions

    stages = read_stages(run_dir)
    last = stages[-1]
    source, target = run_dir / last["name"], PRETRAINED / name
    table = stage_table(stages)
    state = load_file(source / "model" / "model.safetensors")
    target.mkdir(parents=True, exist_ok=True)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(half, target / "model.safetensors")
    for file in ("config.json", "pixart.json"):
        shutil.copyfile(source / "model" / file, target / file)
    shutil.copyfile(source / "samples.png", target / "samples.png")
    facts = {
        "data": f"procedural scenes, {last['config']['data']['size']} px (common/README.md)",
        "command": "`make pixart-train` (pixart/configs/small.yaml)",
        "parameters": f"{last['metrics']['parameters']:,}, float16",
        "hardware": hardware(),
        "time": f"{last['total_seconds'] / 60:.1f} minutes, features and evaluation included",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("torch", "transformers")),
        "commit": commit(),
    }
    (target / "README.md").write_text(card(name, last, table, facts))
    total = f"\n{last['total_seconds'] / 60:.1f} minutes in all on {hardware()}.\n"
    (RESULTS / "run_pixart.md").write_text(table + total)
    kept = ("task", "summary", "shapes_score", "own_captions", "held_out", "curve", "seconds")
    runs = {stage["name"]: {key: stage["metrics"][key] for key in kept if key in stage["metrics"]} for stage in stages}
    (RESULTS / "runs" / "pixart-small.json").write_text(json.dumps({"stages": runs, "facts": facts}, indent=1) + "\n")
    figures = RESULTS / "figures" / "pixart"
    figures.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        shutil.copyfile(run_dir / stage["name"] / "samples.png", figures / f"default_run_{stage['name']}.png")
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args(argv)
    target = publish(options.run_dir, options.name)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target.relative_to(REPOSITORY)}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
