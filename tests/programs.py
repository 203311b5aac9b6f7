"""Every program of the repository, found by pattern, and the parser that it reads its command line with."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import jsonargparse
import pytest

from common.options import Range
from common.paths import REPOSITORY, papers

TOPS = (*papers(), "common", "benchmarks", "report")


class Seen(BaseException):
    """Raised in place of reading a command line; no program catches it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@functools.cache
def programs() -> tuple[str, ...]:
    """The modules with a `main` that are run as programs, by their dotted names."""
    files = (file for top in TOPS for file in sorted((REPOSITORY / top).rglob("*.py")) if "template" not in file.parts)
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if "\ndef main(" in text and 'if __name__ == "__main__":' in text:
            found.append(".".join(file.relative_to(REPOSITORY).with_suffix("").parts))
    return tuple(found)


def trainers() -> tuple[str, ...]:
    """The programs whose options are a dataclass and YAML files."""
    return tuple(f"{paper}.train" for paper in papers())


def call(program: str, arguments: Sequence[str]) -> Any:
    """Run a program's `main` in this process."""
    main = importlib.import_module(program).main
    if inspect.signature(main).parameters:
        return main(list(arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        return main()


def seen(program: str, arguments: Sequence[str], owner: Any, *methods: str) -> argparse.ArgumentParser:
    """The parser on which the program calls one of the methods."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Seen(parser)

    with pytest.MonkeyPatch.context() as patch:
        for method in methods:
            patch.setattr(owner, method, stop)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Seen) as found:
            call(program, arguments)
    return found.value.parser


@functools.cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """With which the program reads its command line; it does nothing else."""
    return seen(program, [], jsonargparse.ArgumentParser, "parse_args")


def parsers_of(program: str) -> Iterator[argparse.ArgumentParser]:
    """Its parser and those of its commands."""
    yield (parser := parser_of(program))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def help_of(program: str) -> str:
    """All that its `--help` says, in one line."""
    return " ".join(" ".join(parser.format_help() for parser in parsers_of(program)).split())


def options_of(program: str) -> Iterator[tuple[argparse.Action, Any]]:
    """Its options and arguments, those of its commands too, each with its type; help and hidden ones left out."""
    for parser in parsers_of(program):
        types = getattr(parser, "types", {})
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            if action.help != argparse.SUPPRESS and action.dest not in ("help", "print_config", "config"):
                yield action, types.get(action.dest, action.type)


def numbers_of(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """The numbers in a type, each as int or float with its range: of `list[Count] | None` one."""
    notes = get_args(hint)
    if hint in (int, float):
        yield hint, None
    elif notes and isinstance(notes[-1], Range):
        yield notes[0], notes[-1]
    elif get_origin(hint) is not None or notes:
        for part in notes:
            yield from numbers_of(part)


def name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def shown_defaults(program: str) -> dict[str, Any]:
    """The defaults that `--help` of a trainer shows, by dotted name."""
    parser: Any = seen(program, ["--help"], jsonargparse.ArgumentParser, "print_help")
    return {name: value for name, value in parser.get_defaults().items() if name in parser.types}


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))
