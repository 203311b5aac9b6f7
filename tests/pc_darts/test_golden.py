"""Every recorded case of the official PC-DARTS code, reproduced; the search networks by both implementations."""

from __future__ import annotations

from pathlib import Path

from tests.golden_case import run_matching_check
from tests.pc_darts.golden_networks import CHECKS as NETWORK_CHECKS
from tests.pc_darts.golden_training import CHECKS as TRAINING_CHECKS

ALL_CHECKS = [*NETWORK_CHECKS, *TRAINING_CHECKS]


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
