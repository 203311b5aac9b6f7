"""Put a finished run into the repository: `python scenesplat/publish.py --run_dir runs/scenesplat-small --name rooms`.

Copies the model in half precision to pretrained/, where query.py finds it, writes its model card from the run's own
metrics, and brings its picture to results/figures/scenesplat/. Its numbers come into results/ with
`python -m report.record_run scenesplat runs/scenesplat-small`.
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

PRETRAINED = WORKPLACE / "scenesplat" / "pretrained"
CAPTION = "Default run: a room that was never seen, its true and predicted classes, and what three queries find."


def about(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any], commit: str) -> publishing.About:
    """The front matter of the encoder's card."""
    return publishing.About(
        name,
        "image-segmentation",
        "pytorch",
        data=f"{config['data']['rooms']} furnished rooms of 3D Gaussians, 2D labels lifted",
        seeds=[config["seed"]],
        commit=commit,
        measured=metrics["arms"]["network"],
        judge="labels of the rooms",
        held_out=f"{metrics['scenes']} unseen rooms",
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's model to pretrained/`name` and its picture to results/.

    Raises:
        UserError: the run is not finished.
    """
    config, metrics = publishing.read_run(run_dir, "room.png", "model/config.json")
    origin = publishing.origin([run_dir], "torch", "transformers")

    from common.costs import parameter_count
    from scenesplat.export import SceneModel

    model = SceneModel.load(run_dir / "model", "--run_dir")
    target = model.save(PRETRAINED / name, half=True)
    shutil.copyfile(run_dir / "room.png", target / "room.png")
    facts = {
        "command": "`make scenesplat-train` (scenesplat/configs/small.yaml)",
        "rooms": f"{config['data']['rooms']} for training, {metrics['scenes']} unseen ones measured",
        "steps": f"{config['trainer']['max_steps']} of {config['trainer']['batch_size']} rooms",
        "voxel": f"{model.voxel:g} m",
        "texts": f"packaged MiniLM, {model.text.width} directions of centred names",
        "classes": ", ".join(model.classes),
        "parameters": f"{parameter_count(model.network):,}, float16",
        **origin,
    }
    text = publishing.model_card(
        about(name, config, metrics, origin["commit"]),
        "An encoder of 3D Gaussians that answers in the space of a text encoder, trained by `scenesplat` of this "
        "repository on furnished rooms with simulated 2D labels.",
        f"""```bash
python scenesplat/query.py ROOM.ply "a chair" --model scenesplat/pretrained/{name}
```""",
        "![an unseen room](room.png)",
        publishing.facts_table(facts),
        (run_dir / "table.md").read_text(),
    )
    (target / "README.md").write_text(text)
    publishing.copy_picture(run_dir / "room.png", RESULTS / "figures" / "scenesplat" / "default_run_room.png", CAPTION)
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
