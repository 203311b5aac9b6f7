"""What a user's mistake ends in: one sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.errors import UserError


def refused(sentence: str, call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The call ends in a UserError of one line that holds `sentence`, a regular expression; returns the line."""
    with pytest.raises(UserError, match=sentence) as failure:
        call(*arguments, **options)
    assert "\n" not in str(failure.value)
    return str(failure.value)
