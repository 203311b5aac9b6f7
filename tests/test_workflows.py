"""The workflows of CI ask for what the Makefile has, on the Pythons that the project supports, for every paper."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.paths import REPOSITORY, papers

FOLDER = REPOSITORY / ".github" / "workflows"
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def made(command: str) -> bool:
    """Whether the Makefile has a rule for every target of `make TARGET NAME=value ...`."""
    targets = [word for word in shlex.split(command)[1:] if "=" not in word]
    rules = re.findall(r"^([\w%-]+):", MAKEFILE, re.MULTILINE)
    patterns = [re.escape(rule).replace("%", f"({'|'.join(papers())})") for rule in rules]
    return bool(targets) and all(any(re.fullmatch(p, target) for p in patterns) for target in targets)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yml")))
def test_every_make_target_of_a_workflow_exists(name: str) -> None:
    commands = [step["run"] for step in steps(name) if step.get("run", "").startswith("make ")]
    assert commands
    for command in commands:
        for paper in papers():
            assert made(re.sub(r"\$\{\{ *matrix\.paper *\}\}", paper, command)), command
    assert not made("make no-such-target") and not made("make no_such_paper-smoke")


def test_tests_run_on_every_supported_python() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, end = (int(minor) for minor in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups())  # type: ignore[union-attr]
    matrix = workflow("test")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in range(first, end)]
    triggers = workflow("test")[True]  # YAML reads `on` as true
    assert {"push", "pull_request"} <= set(triggers)


def test_smoke_reproductions_are_those_of_the_papers_found(tmp_path: Path) -> None:
    """The step that lists them is run as CI runs it."""
    jobs = workflow("smoke")["jobs"]
    assert jobs["smoke"]["strategy"]["matrix"]["paper"] == "${{ fromJSON(needs.papers.outputs.papers) }}"
    (listing,) = (step["run"] for step in jobs["papers"]["steps"] if step.get("id") == "list")
    here = tmp_path / "bin"
    here.mkdir()
    (here / "python3").symlink_to(sys.executable)
    environment = {"GITHUB_OUTPUT": str(tmp_path / "output"), "PATH": f"{here}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", listing], env=environment, cwd=REPOSITORY, check=True)
    key, _, value = (tmp_path / "output").read_text().strip().partition("=")
    assert key == "papers" and sorted(json.loads(value)) == sorted(papers()) and len(papers()) >= 6


def test_long_drills_run_every_week() -> None:
    drills = workflow("drills")
    assert drills[True]["schedule"]
    commands = " ".join(step.get("run", "") for step in steps("drills"))
    assert "make test-machines" in commands and "make drills" in commands and "-m slow" in commands
