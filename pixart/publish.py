"""Put a finished recipe into pretrained/: `python pixart/publish.py --run_dir runs/pixart-pretrained --name shapes`.

Copies the last stage's averaged weights in half precision, draws a fixed sheet of prompts with them and with the
weights that were there before, and writes the model card from the run's own metrics. The run's numbers go into
results/runs/, the sheet into results/figures/pixart/, and what the README says of both into
results/pretrained_pixart.md. The default run (runs/pixart-small) also leaves its sample grids and its table
(results/run_pixart.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import publishing
from common.errors import UserError, run_main
from common.files import read_object, write_atomically, write_json
from common.paths import RESULTS, WORKPLACE

PRETRAINED = WORKPLACE / "pixart" / "pretrained"
DEFAULT_RUN = "pixart-small"
COMMANDS = {
    DEFAULT_RUN: "`make pixart-train` (pixart/configs/small.yaml)",
    "pixart-pretrained": "`python pixart/train.py --config pixart/configs/pretrained.yaml`",
}
SHEET_PER_TASK, SHEET_SEED = 4, 3
TASKS = ("single", "two", "count", "color", "position", "attr", "mean")
SHEET = "samples.png"
CAPTIONS = {
    "stage1": "Default run, stage 1: single objects by class.",
    "stage2": "Default run, stage 2: held-out dense captions, 32 px, averaged weights.",
    "stage3a": "Default run, stage 3a: held-out captions of richer scenes, 32 px.",
    "stage3b": "Default run, stage 3b: the same kind at 64 px.",
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


def draw_sheet(weights: Path, data: Mapping[str, Any], sampling: Mapping[str, Any], picture: Path | None) -> list[bool]:
    """Draw the fixed sheet, four prompts of each task in a run's shapes and colours, and say which are right.

    Args:
        data, sampling: of a run's config.
        picture: where the sheet goes, each prompt with the verifier's word.
    """
    from common.data.shapes import prompts
    from common.data.shapes_verifier import verify
    from common.images import save_grid
    from pixart.config import SamplingConfig
    from pixart.sample import open_painter

    painter = open_painter(weights)
    specs = prompts(SHEET_PER_TASK, "test", TASKS[:-1], SHEET_SEED, data["shapes"], data["colours"], ("solid",))
    captions = [spec.caption for spec in specs]
    options = SamplingConfig(sampling["sampler"], sampling["steps"], sampling["guidance"])
    images = painter.captions(captions, painter.size, painter.size, options, SHEET_SEED)
    right = [bool(holds) for holds in verify(images.numpy(), specs)]
    if picture is not None:
        words = [f"{'right' if holds else 'wrong'}: {caption}" for caption, holds in zip(captions, right, strict=True)]
        save_grid(images, picture, columns=6, captions=words, tile=128)
    return right


def told_of_weights(last: dict[str, Any], sheet: str, facts: Mapping[str, str]) -> str:
    """What the README says of the published weights: their command, scores and time."""
    metrics = last["metrics"]
    rows = [
        ("trained by", facts["command"]),
        ("time", f"{facts['time']}; {facts['hardware']}, {last['config']['trainer']['threads']} thread(s)"),
        ("fixed sheet", sheet),
        ("Shapes score", f"{metrics['shapes_score']['mean']:.2f}"),
        ("held-out captions of its own kind", f"{metrics['own_captions']['mean']:.2f}"),
        ("held-out eps-MSE", f"{metrics['held_out']['mse']:.4f}"),
    ]
    return publishing.markdown_table((f"weights of {last['name']}", ""), rows) + "\n"


def card(name: str, last: dict[str, Any], table: str, facts: dict[str, str], sheet: str) -> str:
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
        f"![a fixed sheet of prompts]({SHEET})",
        f"{sheet} {sampling['steps']} {sampling['sampler']} steps, guidance {sampling['guidance']}.",
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
    asked, drawn = last["config"]["data"], last["config"]["sampling"]
    before = sum(draw_sheet(target, asked, drawn, None)) if (target / "config.json").is_file() else None
    publishing.copy_half(source / "model" / "model.safetensors", target / "model.safetensors")
    for file in ("config.json", "pixart.json"):
        shutil.copyfile(source / "model" / file, target / file)
    right = draw_sheet(target, asked, drawn, target / SHEET)
    sheet = f"{sum(right)} of {len(right)} fixed prompts are right by the exact verifier"
    sheet += "." if before is None else f" (with the weights that were here before {before})."
    caption = (
        f"The published weights: a fixed sheet of prompts, {sum(right)} of {len(right)} right by the exact verifier."
    )
    publishing.copy_picture(target / SHEET, RESULTS / "figures" / "pixart" / "pretrained_sheet.png", caption)
    facts = {
        "data": f"procedural scenes, {last['config']['data']['size']} px (common/README.md)",
        "command": COMMANDS.get(run_dir.name, "`python pixart/train.py`"),
        "parameters": f"{last['metrics']['parameters']:,}, float16",
        "hardware": origin["hardware"],
        "time": f"{minutes:.1f} minutes, features and evaluation included",
        **origin,
    }
    (target / "README.md").write_text(card(name, last, table, facts, sheet))
    told = told_of_weights(last, sheet, facts)
    write_atomically(RESULTS / "pretrained_pixart.md", lambda temporary: temporary.write_text(told))
    kept = ("task", "summary", "shapes_score", "own_captions", "held_out", "curve", "seconds")
    runs = {stage["name"]: {key: stage["metrics"][key] for key in kept if key in stage["metrics"]} for stage in stages}
    write_json(RESULTS / "runs" / f"{run_dir.name}.json", {"stages": runs, "facts": facts})
    if run_dir.name == DEFAULT_RUN:
        record(run_dir, stages, f"{table}\n{minutes:.1f} minutes in all on {origin['hardware']}.\n")
    return target


def record(run_dir: Path, stages: list[dict[str, Any]], text: str) -> None:
    """The default run's pictures and table, for the README."""
    write_atomically(RESULTS / "run_pixart.md", lambda temporary: temporary.write_text(text))
    for stage in stages:
        picture = RESULTS / "figures" / "pixart" / f"default_run_{stage['name']}.png"
        caption = CAPTIONS.get(stage["name"], f"Default run, {stage['name']}.")
        publishing.copy_picture(run_dir / stage["name"] / "samples.png", picture, caption)


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
