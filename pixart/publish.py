"""Put a finished recipe into pretrained/: `python pixart/publish.py --run_dir runs/pixart-small --name shapes`.

Copies the last stage's averaged weights in half precision, writes the model card from the run's own metrics, and brings
the run's sample grids (results/figures/pixart/) and its numbers (results/runs/, results/run_pixart.md for the README)
into the repository.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from common import publishing
from common.errors import UserError, run_main
from common.files import read_object, write_atomically, write_json
from common.paths import RESULTS, WORKPLACE

PRETRAINED = WORKPLACE / "pixart" / "pretrained"
TASKS = ("single", "two", "count", "color", "position", "attr", "mean")
CAPTIONS = {
    "stage1": "Default run, stage 1: single objects by class.",
    "stage2": "Default run, stage 2: held-out dense captions, 32 px, averaged weights.",
    "stage3a": "Default run, stage 3a: held-out captions of richer scenes, 32 px.",
    "stage3b": "Default run, stage 3b: the same kind at 64 px (the weights of pretrained/shapes).",
}


def stage_table(stages: list[dict[str, Any]]) -> str:
    """A Markdown table, one line a stage: size, steps, CPU threads, wall seconds and the quality of its samples."""
    head = (
        "stage|pixels|steps x batch|threads|s training|s features, evaluation|held-out eps-MSE|wrong-caption penalty|"
        "FID|own captions|Shapes score"
    )
    rows = []
    for stage in stages:
        config, metrics = stage["config"], stage["metrics"]
        seconds, held_out = metrics["seconds"], metrics.get("held_out", {})
        rows.append(
            [
                stage["name"],
                str(config["data"]["size"]),
                f"{config['trainer']['max_steps']} x {config['trainer']['batch_size']}",
                str(config["trainer"]["threads"]),
                f"{seconds['training']:.0f}",
                f"{seconds['features'] + seconds['evaluation']:.0f}",
                f"{held_out['mse']:.4f}" if held_out else "-",
                f"{held_out['penalty']:.2f}" if held_out else "-",
                f"{metrics['summary']['fid_lite0']:.0f}" if "summary" in metrics else "-",
                *(f"{metrics[k]['mean']:.2f}" if k in metrics else "-" for k in ("own_captions", "shapes_score")),
            ]
        )
    return publishing.markdown_table(head.split("|"), rows) + "\n"


def card(name: str, last: dict[str, Any], table: str, facts: dict[str, str]) -> str:
    """The model card's text; every number comes from the run."""
    metrics, config = last["metrics"], last["config"]
    judge, summary, sampling = metrics["judge"], metrics["summary"], metrics["sampling"]
    score, own = metrics["shapes_score"], metrics["own_captions"]
    accuracy = [(task, f"{score[task]:.3f}", f"{own[task]:.3f}") for task in TASKS if task in score and task in own]
    about = publishing.About(
        name,
        "text-to-image",
        None,
        data=facts["data"],
        seeds=[config["seed"]],
        commit=facts["commit"],
        measured={
            "kid_lite0": summary["kid_lite0"],
            "fid_lite0": summary["fid_lite0"],
            "shapes_score": score["mean"],
            "own_captions": own["mean"],
        },
        judge="EfficientNet-Lite0 at 112 px; the exact verifier of Shapes",
        held_out=f"{judge['n_real']} held-out pictures of the last stage's kind",
    )
    return publishing.model_card(
        about,
        "A small PixArt-alpha network, trained from scratch in the paper's stages by `pixart` of this repository.",
        '```\n.venv/bin/python pixart/sample.py --prompt "a red circle left of a blue square"\n```',
        "![samples](samples.png)",
        f"Held-out captions of the last stage, {sampling['steps']} {sampling['sampler']} steps, guidance "
        f"{sampling['guidance']}.",
        publishing.facts_table(facts),
        f"KID x 1000 {1000 * summary['kid_lite0']:.0f} (floor {1000 * summary['floor/kid_lite0']:.0f}), FID "
        f"{summary['metrics_at_floor_n/fid_lite0']:.0f} (floor {summary['floor/fid_lite0']:.0f}); "
        f"{judge['n_fake']} samples against {judge['n_real']} held-out pictures, EfficientNet-Lite0 at 112 px, not "
        "comparable with Inception FID.",
        "Accuracy by the exact verifier, on prompts of each task and on held-out captions of the stage's own kind:",
        publishing.markdown_table(("task", "prompts", "own captions"), accuracy),
        "The stages of the run:",
        table,
    )


def read_stages(run_dir: Path) -> list[dict[str, Any]]:
    """Config and metrics of every stage that the run's metrics.json lists, and the whole recipe's wall seconds.

    Raises:
        UserError: a file of a finished recipe is missing.
    """
    top = run_dir / "metrics.json"
    if not top.is_file():
        raise UserError(f"--run_dir {run_dir}: metrics.json is missing; expected a finished recipe of train.py")
    recipe = read_object(top, kinds={"stages": dict, "seconds": dict})
    stages = []
    for name in recipe["stages"]:
        config, metrics = publishing.read_run(run_dir / name, "model/model.safetensors")
        stages.append({"name": name, "config": config, "metrics": metrics, "total_seconds": recipe["seconds"]["total"]})
    return stages


def publish(run_dir: Path, name: str) -> Path:
    """Copy the run's last stage to pretrained/`name` and its pictures and numbers to results/."""
    stages = read_stages(run_dir)
    origin = publishing.origin([run_dir / stage["name"] for stage in stages], "torch", "transformers")
    last = stages[-1]
    source, target = run_dir / last["name"], PRETRAINED / name
    table, minutes = stage_table(stages), last["total_seconds"] / 60
    publishing.copy_half(source / "model" / "model.safetensors", target / "model.safetensors")
    for file in ("config.json", "pixart.json"):
        shutil.copyfile(source / "model" / file, target / file)
    shutil.copyfile(source / "samples.png", target / "samples.png")
    facts = {
        "data": f"procedural scenes, {last['config']['data']['size']} px (common/README.md)",
        "command": "`make pixart-train` (pixart/configs/small.yaml)",
        "parameters": f"{last['metrics']['parameters']:,}, float16",
        "hardware": origin["hardware"],
        "time": f"{minutes:.1f} minutes, features and evaluation included",
        **origin,
    }
    (target / "README.md").write_text(card(name, last, table, facts))
    text = f"{table}\n{minutes:.1f} minutes in all on {origin['hardware']}.\n"
    write_atomically(RESULTS / "run_pixart.md", lambda temporary: temporary.write_text(text))
    kept = ("task", "summary", "shapes_score", "own_captions", "held_out", "curve", "seconds")
    runs = {stage["name"]: {key: stage["metrics"][key] for key in kept if key in stage["metrics"]} for stage in stages}
    write_json(RESULTS / "runs" / "pixart-small.json", {"stages": runs, "facts": facts})
    for stage in stages:
        picture = RESULTS / "figures" / "pixart" / f"default_run_{stage['name']}.png"
        caption = CAPTIONS.get(stage["name"], f"Default run, {stage['name']}.")
        publishing.copy_picture(run_dir / stage["name"] / "samples.png", picture, caption)
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
