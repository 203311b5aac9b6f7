"""Every recorded case of the authors' networks, operators, selection, losses and scores, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

from tests.eagan.golden_cases import CHECKS
from tests.golden_case import run_matching_check


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, CHECKS)
