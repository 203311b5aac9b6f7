"""`less-compute PAPER PROGRAM ARGUMENTS`: every program by one installed command, beside make and `python FILE`.

less-compute                              lists the papers
less-compute ldm                          lists the programs of one
less-compute ldm train --seed 3           runs ldm/train.py with the rest of the words
less-compute ldm bench                    benchmarks/ldm.py
less-compute report build                 the other folders with programs: benchmarks, common, report
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.errors import UserError, run_main
from common.paths import REPOSITORY, papers

OTHERS = ("benchmarks", "common", "report")
HEAD = "less-compute PAPER PROGRAM [ARGUMENTS]"


def programs(room: str, root: Path = REPOSITORY) -> dict[str, str]:
    """The programs of a room: the words behind its name -> the module; `bench` of a paper is benchmarks/<paper>.py."""
    found = {}
    for file in sorted((root / room).rglob("*.py")):
        parts = file.relative_to(root / room).with_suffix("").parts
        text = file.read_text(encoding="utf-8")
        if "template" not in parts and '\nif __name__ == "__main__":' in text:
            found[".".join(parts).removesuffix(".__main__")] = ".".join((room, *parts))
    if room not in OTHERS and (root / "benchmarks" / f"{room}.py").is_file():
        found["bench"] = f"benchmarks.{room}"
    return found


def about(module: str) -> str:
    """The first sentence of a program's usage page."""
    text = ast.get_docstring(ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")))
    return (text or "").partition("\n")[0]


def listing(room: str | None) -> str:
    """What there is, for a person."""
    if room is None:
        lines = [f"usage: {HEAD}", "", f"papers:  {' '.join(papers())}", f"others:  {' '.join(OTHERS)}", ""]
        return "\n".join([*lines, "less-compute PAPER lists the programs of one; --help behind a program its options."])
    found = programs(room)
    width = max(map(len, found))
    lines = [f"usage: less-compute {room} PROGRAM [ARGUMENTS]", ""]
    return "\n".join([*lines, *(f"  {name:<{width}}  {about(module)}" for name, module in found.items())])


def chosen(words: Sequence[str]) -> str | tuple[str, list[str]]:
    """What the words ask for: a text to print, or a module with its arguments.

    Raises:
        UserError: no such paper or program.
    """
    if not words or words[0] in ("-h", "--help"):
        return listing(None)
    room, rest = words[0], list(words[1:])
    rooms = (*papers(), *OTHERS)
    if room not in rooms:
        raise UserError(f"{room}: no such paper{_near(room, rooms)}; expected one of {', '.join(rooms)}")
    if not rest or rest[0] in ("-h", "--help"):
        return listing(room)
    found = programs(room)
    if rest[0] not in found:
        raise UserError(f"{room} {rest[0]}: no such program{_near(rest[0], found)}; expected one of {', '.join(found)}")
    return found[rest[0]], rest[1:]


def _near(word: str, known: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def run(words: Sequence[str]) -> None:
    """Print what there is, or run the program as `python -m` would, so that its own processes find it again."""
    found = chosen(words)
    if isinstance(found, str):
        print(found)
        return
    module, arguments = found
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start() -> None:
    """The installed command."""
    run_main(partial(run, sys.argv[1:]))
