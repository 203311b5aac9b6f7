"""Put a finished run into the repository: `python lightgen/publish.py --run_dir runs/lightgen-small --name shapes32`.

Copies the model in half precision to pretrained/, opens it, writes its card from the run's own metrics, and brings
its pictures to results/figures/lightgen/. Its numbers come into results/ with
`python -m report.record_run lightgen runs/lightgen-small`.
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
from lightgen.geneval import COLUMNS

PRETRAINED = WORKPLACE / "lightgen" / "pretrained"
CAPTION = "Default run, same prompts and noises: before preferences, after as many steps on the winners, after DPO."
COURSE = "DPO in the default run: implicit accuracy, margin, and both raw errors against the reference's."


def about(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any], commit: str) -> publishing.About:
    """The front matter of the model's card: the numbers of the last stage that was trained."""
    arms = metrics["arms"]
    last = next(arm for arm in ("dpo", "base", *arms) if arm in arms)
    return publishing.About(
        name,
        "text-to-image",
        None,
        data=f"{config['data']['images']} pictures of {metrics['data']}, drawn by {config['teacher']}",
        seeds=[config["seed"]],
        commit=commit,
        measured={key: arms[last][key] for key in COLUMNS if key in arms[last]} or arms[last],
        judge=metrics["judge"],
        held_out=f"{metrics['prompts']} held-out prompts of {metrics['data']}",
        base_model=config["teacher"],
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's model to pretrained/`name` and its pictures to results/.

    Raises:
        UserError: the run is not finished.
    """
    config, metrics = publishing.read_run(run_dir, "comparison.png", "model/config.json")
    origin = publishing.origin([run_dir], "torch", "diffusers", "transformers")

    from common.costs import parameter_count
    from lightgen.painter import Painter

    target = PRETRAINED / name
    publishing.copy_pipeline(run_dir / "model", target)
    for path in target.rglob("*.safetensors"):
        publishing.copy_half(path, path)
    opened = Painter.load(target)
    shutil.copyfile(run_dir / "comparison.png", target / "comparison.png")
    stages = config["stages"]
    facts = {
        "command": "`make lightgen-train` (lightgen/configs/small.yaml)",
        "teacher": f"`{config['teacher']}`, {config['data']['images']} pictures",
        "stages": ", ".join(f"{n} steps at {s} px" for s, n in zip(stages["sizes"], stages["steps"])),
        "preferences": f"{config['preferences']['steps']} steps of DPO",
        "parameters": f"{parameter_count(opened.model):,}, float16",
        "judge": f"{metrics['judge']}; {metrics['prompts']} prompts",
        **origin,
    }
    text = publishing.model_card(
        about(name, config, metrics, origin["commit"]),
        "A small masked autoregressive text-to-image model, trained by `lightgen` of this repository.",
        f"""```bash
.venv/bin/python lightgen/sample.py --model lightgen/pretrained/{name} --prompt "a red star"
```""",
        "![comparison](comparison.png)",
        publishing.facts_table(facts),
        (run_dir / "table.md").read_text(encoding="utf-8"),
    )
    (target / "README.md").write_text(text, encoding="utf-8")
    for picture, caption in (("comparison", CAPTION), ("preferences", COURSE)):
        if (run_dir / f"{picture}.png").is_file():
            publishing.copy_picture(
                run_dir / f"{picture}.png", RESULTS / "figures" / "lightgen" / f"default_run_{picture}.png", caption
            )
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
