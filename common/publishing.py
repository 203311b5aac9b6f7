"""A finished run into the repository: complete folders only, half precision, a card from the run's own numbers.

The folders are what `huggingface_hub.upload_folder(folder_path=FOLDER, repo_id=USER/NAME)` takes as they are: nothing
in them points outside, and the card's front matter says the licence, the task, what it was measured to do and by what,
the base model, data, seeds and commit. Nothing here talks to the hub.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError
from common.figures import keep_captions
from common.files import read_object, read_yaml
from common.paths import WORKPLACE


def read_run(folder: Path, *needed: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A finished run's config.yaml and metrics.json.

    Raises:
        UserError: one of these, or of the files `needed`, is missing.
    """
    for file in ("metrics.json", "config.yaml", *needed):
        if not (folder / file).is_file():
            raise UserError(f"--run_dir {folder}: {file} is missing; expected a finished run of train.py")
    return read_yaml(folder / "config.yaml"), read_object(folder / "metrics.json")


def origin(folders: Sequence[Path], *packages: str) -> dict[str, str]:
    """Facts of every card: hardware, versions of `packages` and commit of the training in these folders.

    Raises:
        UserError: code differed from the commit, which the card would then name in vain.
    """
    from common.ledger import origin_of

    made = origin_of(*folders)
    if "-dirty" in made["commit"]:
        raise UserError(
            f"{folders[-1]}: the run's code had changes that were not committed, and a card names the commit of its "
            "code: commit them and train again"
        )
    found = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if name in packages)
    return {"hardware": made["hardware"], "versions": found, "commit": made["commit"]}


def copy_half(source: Path, target: Path) -> None:
    """Copy safetensors with every floating-point tensor in float16."""
    import torch

    from common.weights import read_weights, save_weights

    save_weights(target, read_weights(source)[0], {"format": "pt"}, torch.float16)


def copy_pipeline(source: Path, target: Path) -> None:
    """Put a diffusers directory where another may stand."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)


def copy_picture(source: Path, target: Path, caption: str) -> None:
    """Copy a picture into a folder of figures, with its caption."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    keep_captions(target.parent, {target.name: caption})


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table, without a newline at the end."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


@dataclass(frozen=True)
class About:
    """What a card's front matter says, for the hub and its tools.

    Args:
        task: the hub's pipeline_tag. library: the hub's library_name, None where no library of others loads the files.
        data: what it learnt from. seeds: of the run.
        measured: the numbers of the run by name. judge: what they were measured with. held_out: on what.
        base_model: the folder that it was made from.
    """

    name: str
    task: str
    library: str | None
    data: str
    seeds: Sequence[int]
    commit: str
    measured: Mapping[str, float]
    judge: str
    held_out: str
    base_model: str | Path | None = None


def model_card(about: About, *blocks: str) -> str:
    """A card in the hub's format: `blocks` are its paragraphs, code and tables.

    A base model in this repository is named as its folder is, which is also a name that the hub takes.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            about.task, "held-out", about.held_out, name, round(float(value), 6), metric_name=f"{name} ({about.judge})"
        )
        for name, value in about.measured.items()
    ]
    front = ModelCardData(
        license="apache-2.0",
        library_name=about.library,
        pipeline_tag=about.task,
        base_model=None if about.base_model is None else Path(about.base_model).name,
        tags=["less-compute"],
        metrics=list(about.measured),
        model_name=about.name,
        eval_results=results,
        training_data=about.data,
        seeds=list(about.seeds),
        commit=about.commit,
    )
    lines = ["---", front.to_yaml(), "---", f"# {about.name}", ""]
    return "\n".join([*lines, "\n\n".join(block.rstrip() for block in blocks)]) + "\n"


def facts_table(facts: Mapping[str, str]) -> str:
    return markdown_table(("", ""), facts.items())


def main(text: str | None, publish: Callable[[Path, str], Path], arguments: Sequence[str] | None = None) -> None:
    """The program: `--run_dir` and `--name`; says how large the published weights are."""
    parser = Parser(description=text)
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of a finished run of train.py")
    parser.add_argument("--name", required=True, help="of the folder below pretrained/")
    options = parser.parse_args(arguments)
    target = publish(options.run_dir, options.name)
    print(f"{target.relative_to(WORKPLACE)}: {weights_megabytes(target):.1f} MB")


def weights_megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
