"""Every recorded case of the SE-MoE goldens, reproduced in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.golden_case import Check, golden_files, run_matching_check
from tests.se_moe.golden_gating import CHECKS as GATING_CHECKS
from tests.se_moe.golden_parallel import CHECKS as PARALLEL_CHECKS

STORAGE_CHECKS: list[Check] = []
if importlib.util.find_spec("tests.se_moe.golden_storage"):
    from tests.se_moe.golden_storage import CHECKS as STORAGE_CHECKS  # type: ignore[no-redef]

ALL_CHECKS = [*GATING_CHECKS, *PARALLEL_CHECKS, *STORAGE_CHECKS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        files = golden_files("se_moe", metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_path", files, ids=[path.name for path in files])


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
