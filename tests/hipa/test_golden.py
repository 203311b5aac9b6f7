"""Every recorded case of the formulas, of DISTS, peft and diffusers' one-step sampling, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

from tests.golden_case import run_matching_check
from tests.hipa.golden_cases import CHECKS


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, CHECKS)
