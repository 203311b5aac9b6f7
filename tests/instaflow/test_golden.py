"""Every recorded case of the official rectified-flow code and of the stated formulas, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_case import golden_files, run_matching_check
from tests.instaflow.golden_cases import CHECKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        files = golden_files("instaflow", metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_path", files, ids=[path.name for path in files])


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, CHECKS)
