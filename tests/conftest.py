"""Options and environment shared by every test: offline, CPU, one thread per worker, no order dependence."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("REPRO_ATTENTION", "unmeasured")  # runs that are compared to the bit take the same forms

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=None,
        help="check every case of this folder instead of tests/golden/<paper> (and ../shared/golden/<paper>)",
    )


@pytest.fixture(autouse=True)
def _single_thread_and_seed() -> None:
    """Bit-reproducible tests: one thread, one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
