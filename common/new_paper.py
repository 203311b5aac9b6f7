"""A new paper's room from `common/template/`: `make new-paper NAME=toy`.

The room is small and complete: Noise2Noise on handwritten digits, with training, a claim, a plan and tests that pass.
Its files are then replaced one by one by the paper's own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_main
from common.paths import REPOSITORY, need_checkout

TEMPLATE = Path(__file__).parent / "template"
PLACEHOLDER = "newpaper"  # in names and texts of the template; with a capital in the names of classes


def new_paper(name: str, root: Path = REPOSITORY) -> list[Path]:
    """Write `name`/ and tests/`name`/ below `root`; returns the files.

    Raises:
        UserError: no name for a package, or one that is taken.
    """
    if not (name.isidentifier() and name.islower() and name.isascii()):
        raise UserError(f"NAME={name}: expected small letters, digits and _, beginning with a letter")
    room, tests = root / name, root / "tests" / name
    if room.exists() or tests.exists() or name in sys.stdlib_module_names or find_spec(name) is not None:
        raise UserError(f"NAME={name}: there is already a folder or a Python package of this name; choose another")
    made = []
    for source in sorted(path for path in TEMPLATE.rglob("*") if path.suffix in (".py", ".yaml", ".md")):
        inside = source.relative_to(TEMPLATE)
        target = tests / inside.name if inside.parts[0] == "tests" else room / inside
        target = target.with_name(target.name.replace(PLACEHOLDER, name))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8").replace(PLACEHOLDER, name)
        words = "".join(word.capitalize() for word in name.split("_"))
        target.write_text(text.replace(PLACEHOLDER.capitalize(), words), encoding="utf-8")
        made.append(target)
    for folder in (room, tests):
        (folder / "__init__.py").touch()
    return made


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="of the package: small letters, digits and _")
    name = parser.parse_args().name
    need_checkout("a new paper's room")
    for path in new_paper(name):
        print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    run_main(main)
