"""Every recorded case of the released code, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

from tests.golden_case import run_matching_check
from tests.scenesplat.golden_cases import CHECKS


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, CHECKS)
