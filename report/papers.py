"""The papers as the front table shows them: what each room's paper.yaml says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.paths import REPOSITORY, papers


@dataclass(frozen=True)
class Paper:
    """One paper.

    Args:
        key: the folder in the repository and the name of its results file. arxiv: its number there.
        idea: the claim in one sentence. start: what `make <key>-train` does.
        pictures: those of results/figures/<key> that a visitor sees first, the strongest first.
    """

    key: str
    title: str
    venue: str
    arxiv: str
    idea: str
    start: str
    pictures: tuple[str, ...] = ()


def _paper(key: str, content: Any, file: Path) -> Paper:
    names = {field.name for field in fields(Paper)} - {"key", "pictures"}
    if not isinstance(content, Mapping) or set(content) - {"pictures"} != names:
        raise UserError(f"{file}: expected the texts {', '.join(sorted(names))} of {key}")
    texts = {name: str(text) for name, text in content.items() if name != "pictures"}
    pictures = content.get("pictures", [])
    if not isinstance(pictures, list) or not all(isinstance(name, str) for name in pictures):
        raise UserError(f"{file}: pictures is {pictures!r}, expected a list of file names")
    return Paper(key, **texts, pictures=tuple(pictures))


@cache
def all_papers(root: Path = REPOSITORY) -> tuple[Paper, ...]:
    """The papers with a room below `root`, by name.

    Raises:
        UserError: a room without paper.yaml, or one that lacks a text.
    """
    found = []
    for key in papers(root):
        file = root / key / "paper.yaml"
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected the paper's title, venue, arxiv, idea and start")
        found.append(_paper(key, yaml.safe_load(file.read_text(encoding="utf-8")), file))
    return tuple(found)
