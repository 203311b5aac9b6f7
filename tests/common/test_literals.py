from __future__ import annotations

from pathlib import Path

import pytest

from common.literals import logged_call
from eeea_net.genotypes import Genotype as EeeaGenotype
from pc_darts.genotypes import Genotype as PcGenotype
from tests.refusals import refused


def test_literals_ranges_and_lists_are_read() -> None:
    text = "Genotype(a=[('sep', 1)], b=range(2, 6), c=list(range(3)), d=list((1, 2)), e=list(), f=None)"
    found = {"a": [("sep", 1)], "b": [2, 3, 4, 5], "c": [0, 1, 2], "d": [1, 2], "e": [], "f": None}
    assert logged_call(text) == found


WRONG = (
    *("range(2, 60000000)", "range(10**9)", "range()", "range('a')", "list(1, 2)", "list(1)", "open('x')", "x", "[x]"),
    *("__import__('os')", "(lambda: 1)()", "range(stop=3)", "(" * 300 + ")" * 300, "-" * 5000 + "1", "'\\ud800", "1 +"),
)


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_anything_else_is_refused_at_once(value: str, tmp_path: Path) -> None:
    text = f"Genotype(normal={value}, normal_concat={value}, reduce=[], reduce_concat=[])"
    with pytest.raises(ValueError):
        logged_call(text)
    assert len(refused("cannot be read", PcGenotype.parse, text)) < 400
    (tmp_path / "cell.txt").write_text(text)
    assert len(refused("expected JSON or a logged Genotype", EeeaGenotype.load, tmp_path / "cell.txt")) < 400
