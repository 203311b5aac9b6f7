"""Every recorded case of the official LDM code, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

from tests.golden_case import run_matching_check
from tests.ldm.golden_diffusion import CHECKS as DIFFUSION_CHECKS
from tests.ldm.golden_first_stage import CHECKS as FIRST_STAGE_CHECKS
from tests.ldm.golden_networks import CHECKS as NETWORK_CHECKS

ALL_CHECKS = [*FIRST_STAGE_CHECKS, *NETWORK_CHECKS, *DIFFUSION_CHECKS]


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
