"""Fixtures that the tests of several kernels share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.common.kernel_process import findings


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the kernels of a test file do under Triton's interpreter."""
    return findings(request.module.__name__, "interpret")
