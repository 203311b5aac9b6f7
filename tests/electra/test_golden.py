"""Every recorded case of the official ELECTRA code and of transformers, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.electra.golden_finetuning import CHECKS as FINETUNING_CHECKS
from tests.electra.golden_pretraining import CHECKS as PRETRAINING_CHECKS
from tests.electra.golden_text import CHECKS as TEXT_CHECKS
from tests.golden_case import golden_files, run_matching_check

ALL_CHECKS = [*PRETRAINING_CHECKS, *TEXT_CHECKS, *FINETUNING_CHECKS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        files = golden_files("electra", metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_path", files, ids=[path.name for path in files])


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
