"""Who may know whom, imports inside functions included, and that a paper is added in one place."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from common.paths import REPOSITORY, papers

OURS = (*papers(), "common", "benchmarks", "report")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project below `root` by its dotted name."""
    files = (file for top in OURS for file in (root / top).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path) -> set[str]:
    """Dotted names that a file imports anywhere, each as far as it is written: `from a import b` gives a and a.b."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # these are for type checkers and never run
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def graph_of(root: Path) -> dict[str, set[str]]:
    """module -> modules of the project that it imports."""
    files = modules(root)
    return {name: {i for i in imports(name, file) if i in files and i != name} for name, file in files.items()}


@functools.cache
def graph() -> dict[str, set[str]]:
    return graph_of(REPOSITORY)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, none if there is no circle."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room(module: str) -> str:
    return module.partition(".")[0]


def crossings(starts: list[str], forbidden: set[str]) -> list[str]:
    return [f"{name} imports {i}" for name in starts for i in sorted(graph()[name]) if room(i) in forbidden]


def test_no_module_imports_itself_through_others() -> None:
    assert circle(graph()) == []


def test_a_circle_through_a_function_is_seen(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    (tmp_path / "common" / "a.py").write_text("from common.b import x\n")
    (tmp_path / "common" / "b.py").write_text("def f():\n    from . import a\n    return a\n")
    assert set(circle(graph_of(tmp_path))) == {"common.a", "common.b"}
    (tmp_path / "common" / "b.py").write_text("if TYPE_CHECKING:\n    import common.a\n")
    assert circle(graph_of(tmp_path)) == []


@pytest.mark.parametrize("paper", papers())
def test_a_paper_imports_no_other_paper_and_nothing_above_it(paper: str) -> None:
    own = [name for name in graph() if room(name) == paper]
    assert crossings(own, {*OURS} - {paper, "common"}) == []


def test_common_knows_no_paper_and_nothing_above_it() -> None:
    assert crossings([name for name in graph() if room(name) == "common"], {*OURS} - {"common"}) == []


def test_the_benchmark_of_accelerators_stands_on_no_contestant() -> None:
    top = "benchmarks.acceleration"
    own = [name for name in graph() if name.startswith(top) and not name.startswith(f"{top}.methods.")]
    assert own
    assert crossings(own, set(papers())) == []


def test_a_contestant_is_one_paper() -> None:
    for name in graph():
        if name.startswith("benchmarks.acceleration.methods."):
            assert len({room(i) for i in graph()[name]} & set(papers())) <= 1, name


def test_make_the_packages_and_the_report_find_the_papers_by_pattern() -> None:
    assert len(papers()) >= 6
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    assert sorted(listed.partition(": ")[2].split()) == list(papers())
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["packages"] == {
        "find": {"exclude": ["tests", "tests.*"], "namespaces": False}
    }
    assert {file.parent.name for file in REPOSITORY.glob("*/__init__.py")} == {*OURS, "tests"}
    text = (REPOSITORY / "Makefile").read_text() + (REPOSITORY / "pyproject.toml").read_text()
    named = [paper for paper in papers() if paper in text.replace("ldm-train", "")]
    assert named == ["electra", "scenesplat"]  # make data-text, make data-furniture


def test_no_file_of_ours_hides_a_library() -> None:
    """`python ldm/train.py` puts ldm/ first on the path: a module there would be imported in place of a library's."""
    libraries = {
        name
        for name, distributions in packages_distributions().items()
        if set(distributions) != {"less-compute-reproductions"}
    } | set(sys.stdlib_module_names)
    rooms = {file.stem for paper in papers() for file in (REPOSITORY / paper).glob("*.py")} - {"__init__"}
    assert (rooms | set(OURS)) & libraries == set()


def test_no_program_changes_the_path() -> None:
    for file in modules(REPOSITORY).values():
        assert "sys.path" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("paper", papers())
def test_no_paper_passes_over_that_its_network_should_be_compiled(paper: str) -> None:
    config = REPOSITORY / paper / "config.py"
    if not config.is_file() or "(TrainerOptions)" not in config.read_text(encoding="utf-8"):
        pytest.skip("its runs have no such option")
    code = "".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / paper).glob("*.py"))
    assert "trainer.compile" in code or "networks=" in code
