"""Every recorded case of the official EEEA-Net code and of its ImageNet networks, reproduced."""

from __future__ import annotations

from pathlib import Path

from tests.eeea_net.golden_cases import CHECKS
from tests.golden_case import run_matching_check


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, CHECKS)
