"""Fixtures of the tests of kernels."""

from __future__ import annotations

from typing import Any

import pytest

from tests.common.kernel_process import findings


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the interpreted kernels of a test file say."""
    return findings(request.module.__name__, "interpret")
