"""A room made from the template, in a copy of what it needs: its training, claim, plan and tests work at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.new_paper import TEMPLATE, new_paper
from common.paths import REPOSITORY, papers


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    return tmp_path


def run(root: Path, *command: str, folder: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder or root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_room_works_at_once_and_is_found_as_a_paper(copy: Path) -> None:
    made = run(copy, "-m", "common.new_paper", "two_words").split()
    assert papers(copy) == ("two_words",)
    files = [copy / name for name in made]
    assert not any("newpaper" in file.read_text().lower() for file in files)
    assert sum(len(file.read_text().splitlines()) for file in files if file.suffix != ".md") < 330
    run(copy, "-m", "ruff", "check", "--quiet", "--fix", "two_words", "tests")  # a name changes the order of imports
    run(copy, "-m", "ruff", "format", "--quiet", "two_words", "tests")
    run(copy, "-m", "ruff", "check", "two_words", "tests")
    assert "GPU" in run(copy, "plan.py", "--help", folder=copy / "two_words")
    # Its tests run train.py, the smoke tier of reproduce.py, and plan.py.
    assert "3 passed" in run(copy, "-m", "pytest", "-o", "addopts=", "tests/two_words")
    shutil.rmtree(copy / "two_words")
    assert papers(copy) == ()


@pytest.mark.slow
def test_a_new_room_is_drilled_like_every_paper(copy: Path) -> None:
    run(copy, "-m", "common.new_paper", "two_words")
    shutil.copy(REPOSITORY / "tests" / "drills.py", copy / "tests")
    said = run(copy, "-m", "tests.drills", "--kinds", "kill,term,interrupt,full,readonly,records,hostile")
    assert "two_words term: held" in said and said.endswith("all held\n")


def test_the_template_itself_is_no_paper_and_says_its_name_in_one_word() -> None:
    assert TEMPLATE.name not in papers() and (TEMPLATE / "train.py").is_file() and (TEMPLATE / "config.py").is_file()


@pytest.mark.parametrize("name", ["", "Toy", "2d", "a-b", "ldm", "common", "json", "torch", "tests"])
def test_names_that_cannot_be_a_package_or_are_taken_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"NAME=.*: (expected small letters|there is already)"):
        new_paper(name, tmp_path)
    assert not list(tmp_path.iterdir())
