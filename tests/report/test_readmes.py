"""What a visitor meets: a room's README begins with what one needs first, and its tables and pictures stay few."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.ledger import read_claims
from common.paths import REPOSITORY, papers
from report.readme_tables import MOST_FIGURES, MOST_ROWS

WIDEST = 130  # characters of a cell
LINE = 110  # of a claim in one line
PAPERS = papers()


def beginning(path: Path, words: int = 300) -> str:
    return " ".join(path.read_text(encoding="utf-8").split()[:words])


@pytest.mark.parametrize("paper", PAPERS)
def test_a_readme_begins_with_picture_install_train_use_and_own_data(paper: str) -> None:
    text = beginning(REPOSITORY / paper / "README.md")
    needed = ("![", "make setup", f"make {paper}-train", "docs/running.md")
    assert [text.find(word) for word in needed] == sorted(text.index(word) for word in needed)
    assert re.search(rf"\.venv/bin/python {paper}/(sample|evaluate|serve)\.py", text)
    assert re.search(r"--(data\.path|data\.corpus|data\.tasks|teacher) \S*[A-Z]{5,}", text), (
        "own data in the first words"
    )


@pytest.mark.parametrize("paper", PAPERS)
def test_a_readme_has_few_pictures_compact_tables_and_a_citation(paper: str) -> None:
    text = (REPOSITORY / paper / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert 0 < len(pictures) <= MOST_FIGURES and len(set(pictures)) == len(pictures)
    assert all((REPOSITORY / paper / picture).is_file() for picture in pictures)
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split(" | ")]
    assert max(map(len, cells)) <= WIDEST, max(cells, key=len)
    bench = text.partition(f"<!-- bench:{paper}")[2].partition("<!-- end -->")[0]
    assert sum(line.startswith("|") for line in bench.splitlines()) - 2 <= MOST_ROWS
    assert "```bibtex" in text


@pytest.mark.parametrize("paper", PAPERS)
def test_a_claim_fits_in_one_line(paper: str) -> None:
    assert max(len(claim.short) for claim in read_claims(paper, "small").values()) <= LINE


def test_the_front_page_begins_with_a_picture_and_what_to_type() -> None:
    text = beginning(REPOSITORY / "README.md")
    for word in ("![", "make setup", "sample.py", "-train", "--data.path"):
        assert word in text, word
