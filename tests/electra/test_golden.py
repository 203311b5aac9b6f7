"""Every recorded case of the official ELECTRA code and of transformers, reproduced in float32."""

from __future__ import annotations

from pathlib import Path

from tests.electra.golden_finetuning import CHECKS as FINETUNING_CHECKS
from tests.electra.golden_pretraining import CHECKS as PRETRAINING_CHECKS
from tests.electra.golden_text import CHECKS as TEXT_CHECKS
from tests.golden_case import run_matching_check

ALL_CHECKS = [*PRETRAINING_CHECKS, *TEXT_CHECKS, *FINETUNING_CHECKS]


def test_golden(golden_path: Path) -> None:
    run_matching_check(golden_path, ALL_CHECKS)
