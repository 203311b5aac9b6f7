"""Every recorded case of the official LDM code, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_case import golden_files, run_matching_check
from tests.ldm.golden_diffusion import CHECKS as DIFFUSION_CHECKS
from tests.ldm.golden_first_stage import CHECKS as FIRST_STAGE_CHECKS
from tests.ldm.golden_networks import CHECKS as NETWORK_CHECKS

ALL_CHECKS = [*FIRST_STAGE_CHECKS, *NETWORK_CHECKS, *DIFFUSION_CHECKS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        files = golden_files("ldm", metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_path", files, ids=[path.name for path in files])


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
