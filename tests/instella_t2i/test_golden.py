"""Every recorded case of the released tokenizer and generators and of the baseline quantizers, in float32."""

from __future__ import annotations

from pathlib import Path

from tests.golden_case import run_matching_check
from tests.instella_t2i import golden_cases, golden_generators


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, [*golden_cases.CHECKS, *golden_generators.CHECKS])
