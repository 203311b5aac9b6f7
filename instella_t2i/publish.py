"""Put a finished tokenizer into the repository: `python instella_t2i/publish.py --run_dir RUN --name emoji64`.

Copies the run's last tokenizer in half precision to pretrained/, writes its card from the run's own metrics, and brings
its pictures to results/figures/instella_t2i/. Its numbers come into results/ with `python -m report.record_run`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import publishing
from common.errors import UserError, run_main
from common.paths import RESULTS, WORKPLACE

PRETRAINED = WORKPLACE / "instella_t2i" / "pretrained"
CAPTION = "Default run, held-out emoji: originals, what stage 1 keeps of them, what stage 2 does (32 tokens x 32 bits)."


def about(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any], commit: str) -> publishing.About:
    """The front matter of the tokenizer's card: the numbers of its last stage."""
    arms = metrics["arms"]
    return publishing.About(
        name,
        "image-feature-extraction",
        None,
        data=f"pictures of {metrics['data']}",
        seeds=[config["seed"]],
        commit=commit,
        measured=arms[next(arm for arm in ("decoder", "tokenizer", *arms) if arm in arms)],
        judge=f"{metrics['features']} and {metrics['lpips_trunk']}",
        held_out=f"{metrics['images']} held-out pictures of {metrics['data']}",
    )


def publish(run_dir: Path, name: str) -> Path:
    """Copy a run's tokenizer to pretrained/`name` and its pictures to results/.

    Raises:
        UserError: the run is not finished.
    """
    config, metrics = publishing.read_run(run_dir, "reconstructions.png", "table.md")
    origin = publishing.origin([run_dir], "torch")
    from instella_t2i.pack import label
    from instella_t2i.tokenizer import ABOUT, WEIGHTS, load_tokenizer

    stages = [stage for stage in ("decoder", "tokenizer") if (run_dir / stage / ABOUT).is_file()]
    if not stages:
        raise UserError(f"--run_dir {run_dir}: no finished tokenizer; expected the stages tokenizer or decoder")
    source, target = run_dir / stages[0], PRETRAINED / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / ABOUT, target / ABOUT)
    publishing.copy_half(source / WEIGHTS, target / WEIGHTS)
    shutil.copyfile(run_dir / "reconstructions.png", target / "reconstructions.png")
    tokenizer = load_tokenizer(target)
    facts = {
        "codes": f"{label(tokenizer)}, {tokenizer.config.tokens * tokenizer.config.bits // 8} bytes a picture",
        "pictures": f"{config['data']['name']}, {tokenizer.size} px; decodes at multiples of {tokenizer.multiple} px",
        "command": "`make instella_t2i-train` (instella_t2i/configs/small.yaml)",
        "steps": ", ".join(f"{stage} {config[stage]['steps']}" for stage in reversed(stages)),
        "parameters": f"{sum(p.numel() for p in tokenizer.parameters()):,}, float16",
        "measured on": f"{metrics['images']} held-out pictures",
        **origin,
    }
    text = publishing.model_card(
        about(name, config, metrics, origin["commit"]),
        "A one-dimensional binary tokenizer, trained by `instella_t2i` of this repository.",
        f"""```python
from instella_t2i.tokenizer import load_tokenizer

tokenizer = load_tokenizer("instella_t2i/pretrained/{name}")
codes = tokenizer.encode(pixels)  # [B, 3, H, W] in [-1, 1] to [B, {tokenizer.config.tokens}, {tokenizer.config.bits}]
again = tokenizer.decode(codes, {tokenizer.size})
```""",
        "![originals and reconstructions](reconstructions.png)",
        publishing.facts_table(facts),
        (run_dir / "table.md").read_text(),
    )
    (target / "README.md").write_text(text)
    place = RESULTS / "figures" / "instella_t2i" / "default_run_reconstructions.png"
    publishing.copy_picture(run_dir / "reconstructions.png", place, CAPTION)
    return target


if __name__ == "__main__":
    run_main(partial(publishing.main, __doc__, publish))
