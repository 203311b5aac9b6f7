"""A finished run into the repository: complete folders only, half precision, a card from the run's own numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def origin(*packages: str) -> dict[str, str]:
    """Facts of every card: hardware, versions of `packages`, commit. Ask before the published files change the tree."""
    from common.ledger import commit, hardware, versions

    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name in packages)
    return {"hardware": hardware(), "versions": found, "commit": commit()}


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


def model_card(name: str, library: str | None, *blocks: str) -> str:
    """A card in the hub's format: `blocks` are its paragraphs, code and tables."""
    fields = ["license: apache-2.0", *([f"library_name: {library}"] if library else []), "pipeline_tag: text-to-image"]
    return "\n".join(["---", *fields, "---", f"# {name}", "", "\n\n".join(block.rstrip() for block in blocks)]) + "\n"


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
