"""Options and environment shared by every test: offline, CPU, one thread per worker, no order dependence.

TEST_THREADS sets another number of threads, for the tests and the programs that they start (`tests/machines.py`).
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = os.environ.setdefault("TEST_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("REPRO_ATTENTION", "unmeasured")  # runs that are compared to the bit take the same forms
os.environ.setdefault("REPRO_PRODUCTS", "unmeasured")

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.processes import say_once
from tests.golden_case import golden_files

THREADS = int(os.environ["TEST_THREADS"])
# Tests whose outcome hangs on the arithmetic of the machine; a new paper's files of these names are among them.
NUMERICAL = re.compile(
    r"test_(golden.*|train(ing)?|searching|streaming|checkpoint|zero|elastic|communication|prefetch|ring"  # and resume
    r"|kernel.*|moe.*|vocab_head|adaln_modulate|metrics.*|loss(es)?|optim.*|gating|embedding|inference|search_space"
    r"|model|autoencoder|classifier|controlnet|convert|student|objectives|adversarial|finetuning|diffusion|flow"
    r"|samplers|process|architect|augmentation)\.py"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=None,
        help="check every case of this folder instead of tests/golden/<paper> (and ../shared/golden/<paper>)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`golden_path`: every recorded case of the paper whose folder of tests asks for it."""
    if "golden_path" in metafunc.fixturenames:
        paper = metafunc.definition.path.parent.name
        files = golden_files(paper, metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_path", files, ids=[path.name for path in files])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NUMERICAL.fullmatch(item.path.name) and not item.get_closest_marker("smoke"):
            item.add_marker(pytest.mark.numerical)


@pytest.fixture(autouse=True, scope="module")
def _threads_of_a_module() -> None:
    """For what a module makes once, which comes before its first test."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the module's own for what programs prepare: latents, features, tokenizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _threads_and_seed() -> None:
    """Tests that no earlier one changes: a fixed number of threads, one seed, nothing said once already."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    say_once.cache_clear()
