"""Every recorded case of the official PixArt-alpha code, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

from tests.golden_case import run_matching_check
from tests.pixart.golden_networks import CHECKS as NETWORK_CHECKS
from tests.pixart.golden_process import CHECKS as PROCESS_CHECKS

ALL_CHECKS = [*NETWORK_CHECKS, *PROCESS_CHECKS]


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
