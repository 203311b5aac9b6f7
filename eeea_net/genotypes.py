"""A cell as data: blocks that add two operations; published cells; files that pc_darts and the authors' code read too.

States: 0 and 1 are the outputs of the two cells before, 2, 3, ... those of the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_yaml, text_of, write_json
from common.literals import logged_call

Pair = tuple[str, int]  # an operation and the state that it reads

# In the order of the authors' code (table 2 of the paper has all but the 7x1-1x7 convolution).
SHORT_NAMES = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
    "conv7": "conv_7x1_1x7",
    "inv3": "inv_res_3x3",
    "inv5": "inv_res_5x5",
}
OPERATIONS = tuple(SHORT_NAMES.values())
# Of cells that others published or searched; no chromosome has them.
SHORT_NAMES |= {"sep7": "sep_conv_7x7", "none": "none"}
KNOWN = tuple(SHORT_NAMES.values())
FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")


@dataclass(frozen=True)
class Cell:
    """Two (operation, state) pairs a block, and the states that are concatenated at its end.

    Raises:
        UserError: an operation or state that there is not, or an odd number of pairs.
    """

    pairs: tuple[Pair, ...]
    concat: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.pairs or len(self.pairs) % 2:
            raise UserError(f"a cell of {len(self.pairs)} pairs: expected two for every block")
        for place, (name, state) in enumerate(self.pairs):
            if name not in KNOWN:
                raise UserError(f"operation {name!r} is unknown; expected one of {', '.join(KNOWN)}")
            if not 0 <= state < 2 + place // 2:
                raise UserError(f"block {place // 2} of a cell reads state {state}, which does not come before it")
        if not self.concat or not all(0 <= state < 2 + self.blocks for state in self.concat):
            raise UserError(f"the output of a cell names the states {list(self.concat)}, which it does not have")

    @classmethod
    def of(cls, pairs: Sequence[Sequence[Any]], concat: Sequence[int]) -> Cell:
        """From lists, as JSON has them."""
        return cls(tuple((str(name), int(state)) for name, state in pairs), tuple(int(state) for state in concat))

    @property
    def blocks(self) -> int:
        return len(self.pairs) // 2

    def unread(self) -> tuple[int, ...]:
        """The blocks that no later block reads: what every published cell concatenates (NSGA-Net's rule)."""
        read = {state for _, state in self.pairs}
        return tuple(state for state in range(2, 2 + self.blocks) if state not in read)


@dataclass(frozen=True)
class Genotype:
    """A network's two kinds of cells."""

    normal: Cell
    reduce: Cell

    def cell(self, reduction: bool) -> Cell:
        return self.reduce if reduction else self.normal

    def fields(self) -> dict[str, Any]:
        """As the authors' code and pc_darts write it: normal, normal_concat, reduce, reduce_concat."""
        cells = (self.normal, self.reduce)
        values = [value for cell in cells for value in ([list(pair) for pair in cell.pairs], list(cell.concat))]
        return dict(zip(FIELDS, values))

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, self.fields())

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Genotype:
        """From `fields`.

        Raises:
            UserError: one is missing or no list, or a cell cannot be.
        """
        try:
            normal, normal_concat, reduce, reduce_concat = (fields[name] for name in FIELDS)
            return cls(Cell.of(normal, normal_concat), Cell.of(reduce, reduce_concat))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"a genotype needs the lists {', '.join(FIELDS)}") from None

    @classmethod
    def load(cls, name: str | Path) -> Genotype:
        """A published name, or a file: JSON, or a logged `Genotype(normal=[...], ...)`.

        Raises:
            UserError: neither, or the file holds no genotype.
        """
        if str(name) in published():
            return published()[str(name)]
        path = Path(name)
        if not path.is_file():
            raise UserError(f"genotype {str(name)!r}: neither a file nor one of {', '.join(published())}")
        text = text_of(path, "expected a genotype").strip()
        try:
            return cls.of(logged_call(text) if text.startswith("Genotype(") else json.loads(text))
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"genotype {path}: expected JSON or a logged Genotype(...)") from None
        except UserError as error:
            raise UserError(f"genotype {path}: {error}") from None


@cache
def published() -> dict[str, Genotype]:
    """The cells of genotypes.yaml by name."""

    def cell(text: str, concat: Sequence[int]) -> Cell:
        pairs = (word.split(":") for word in text.split())
        return Cell.of([(SHORT_NAMES[name], state) for name, state in pairs], concat)

    listed = read_yaml(Path(__file__).with_name("genotypes.yaml"))
    return {
        name: Genotype(cell(of["normal"], of["normal_concat"]), cell(of["reduce"], of["reduce_concat"]))
        for name, of in listed.items()
    }
