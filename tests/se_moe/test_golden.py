"""Every recorded case of the SE-MoE goldens, reproduced in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.golden_case import Check, run_matching_check
from tests.se_moe.golden_gating import CHECKS as GATING_CHECKS
from tests.se_moe.golden_parallel import CHECKS as PARALLEL_CHECKS

STORAGE_CHECKS: list[Check] = []
if importlib.util.find_spec("tests.se_moe.golden_storage"):
    from tests.se_moe.golden_storage import CHECKS as STORAGE_CHECKS  # type: ignore[no-redef]

ALL_CHECKS = [*GATING_CHECKS, *PARALLEL_CHECKS, *STORAGE_CHECKS]


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
