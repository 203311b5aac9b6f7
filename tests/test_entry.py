"""The installed command, the wheel that plain pip installs, and the ways in from Python."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from common import entry
from common.errors import UserError
from common.paths import REPOSITORY, papers, shipped
from tests.programs import programs

BREAKS = {"torchvision", "torch-fidelity"}  # beside a CPU build of torch


def test_every_program_can_be_named() -> None:
    named = {module for room in (*papers(), *entry.OTHERS) for module in entry.programs(room).values()}
    assert {*programs()} <= named
    assert entry.chosen(["ldm", "train", "--seed", "3"]) == ("ldm.train", ["--seed", "3"])
    assert entry.chosen(["ldm", "bench"]) == ("benchmarks.ldm", [])
    assert entry.chosen(["benchmarks", "acceleration", "--list"]) == ("benchmarks.acceleration.__main__", ["--list"])
    assert entry.chosen(["common", "metrics.evaluate"]) == ("common.metrics.evaluate", [])


def test_what_there_is_is_listed_with_the_first_sentence_of_each_program() -> None:
    whole, room = entry.chosen([]), entry.chosen(["ldm", "--help"])
    assert isinstance(whole, str) and isinstance(room, str)
    assert all(paper in whole for paper in papers())
    assert re.search(r"^  sample +Draw images: ", room, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lmd", "train"], "lmd: no such paper, did you mean ldm.*expected one of .*se_moe"),
        (["ldm", "trian"], "ldm trian: no such program, did you mean train.*expected one of .*sample"),
    ],
)
def test_a_misspelt_word_is_a_sentence(words: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        entry.chosen(words)


def test_a_program_runs_as_if_python_had_been_given_its_module(capfd: pytest.CaptureFixture[str]) -> None:
    """Launchers start the other processes of a run by the name of the main module."""
    done = subprocess.run(
        [sys.executable, "-c", "from common.entry import start; start()", "ldm", "sample", "--no_such"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "--no_such" in done.stderr


def test_the_command_and_its_requirements_are_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["less-compute"].partition(":")
    assert getattr(importlib.import_module(module), function) is entry.start
    names = {re.split(r"[=<>\[; ]", line)[0] for line in project["dependencies"]}
    assert not names & {*BREAKS, "clean-fid", "wandb"}, "plain pip would install what breaks CPU torch"
    assert "wandb==0.31.0" in project["optional-dependencies"]["wandb"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, as pip would put it into site-packages."""
    place = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no git checkout")
    for name in tracked.stdout.splitlines():
        if name.split("/")[0] not in ("tests", "results", "docs", ".github") and (REPOSITORY / name).is_file():
            (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, place / "source" / name)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(place)], cwd=place / "source", capture_output=True, check=True, timeout=300
    )
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place / "site")
    return place / "site"


def test_the_wheel_holds_all_that_programs_read(site: Path) -> None:
    source = site.parent / "source"
    wanted = {
        path.relative_to(source)
        for top in (*papers(), *entry.OTHERS)
        for path in (source / top).rglob("*")
        if path.is_file() and path.suffix != ".md" and "template" not in path.parts
    }
    missing = sorted(str(path) for path in wanted if not (site / path).is_file())
    assert not missing, missing[:5]


def test_an_installed_program_draws_and_writes_nothing_beside_the_packages(site: Path, tmp_path: Path) -> None:
    """From any folder, with the published weights; cache and results are the user's own."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    before = sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts)
    environment = {key: value for key, value in os.environ.items() if key not in ("REPRO_CACHE", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(site), "HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        start = "from common.entry import start; start()"
        done = subprocess.run(
            [sys.executable, "-c", start, *words],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    places = "from common.paths import RESULTS, cache_dir; from common.ledger import commit; "
    told = subprocess.run(
        [sys.executable, "-c", places + "print(RESULTS); print(cache_dir('emoji')); print(commit())"],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert told == [str(here / "results"), str(home / ".cache" / "less-compute" / "emoji"), "unknown"]
    run("instaflow", "sample", "--model", "instaflow/pretrained/shapes32", "--prompt", "a red star", "--count", "1")
    assert (here / "samples.png").is_file()
    assert sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts) == before


def test_only_what_comes_with_a_paper_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped("ldm/configs/smoke.yaml") == REPOSITORY / "ldm" / "configs" / "smoke.yaml"
    assert shipped("README.md") == Path("README.md"), "a file to write must not lead into the repository"
    assert shipped("ldm/configs/none.yaml") == Path("ldm/configs/none.yaml")


# What a notebook imports: (paper, function, published weights that it opens without an argument).
WAYS = [
    ("eagan", "load_generator", False),
    ("eeea_net", "load_model", False),
    ("eeea_net", "load_genotype", True),
    ("electra", "load_discriminator", False),
    ("electra", "load_tokenizer", False),
    ("hipa", "load_pipeline", True),
    ("instaflow", "load_pipeline", True),
    ("instella_t2i", "load_tokenizer", False),
    ("instella_t2i", "load_painter", False),
    ("ldm", "load_pipeline", True),
    ("lightgen", "load_painter", False),
    ("pc_darts", "load_genotype", True),
    ("pc_darts", "load_model", False),
    ("pixart", "load_painter", True),
    ("scenesplat", "load_model", True),
    ("se_moe", "load_server", False),
    ("slam", "load_pipeline", False),
]


def test_every_paper_has_a_way_in_which_the_page_on_running_shows() -> None:
    page = (REPOSITORY / "docs" / "running.md").read_text(encoding="utf-8")
    assert {paper for paper, *_ in WAYS} == set(papers())
    for paper, function, _ in WAYS:
        assert re.search(rf"from {paper} import (\w+, )*{function}\b", page), f"{paper}.{function}"


@pytest.mark.parametrize(("paper", "function", "published"), WAYS)
def test_a_way_in_opens_what_is_published_and_refuses_a_folder_without_it(
    paper: str, function: str, published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load = getattr(importlib.import_module(paper), function)
    if published:
        assert load() is not None
    with pytest.raises(UserError) as failure:
        load(tmp_path / "empty")
    assert "empty" in str(failure.value) and "\n" not in str(failure.value)
