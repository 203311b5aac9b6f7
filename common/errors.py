"""The one exception that stands for a mistake of the user: programs print it as one sentence, without traceback."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input. The message names the file, line or option, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its kind: libraries' messages run to pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop_if_not_finite(
    loss: float, step: int, last: Path | None = None, *, advice: str = "a lower rate", what: str = "loss"
) -> None:
    """End a loop whose loss is NaN or infinite, before its next checkpoint: every loop of the repository calls this.

    Args:
        last: where the loop's latest checkpoint is or would be; None for a loop that writes none.
        advice: what the user should try.

    Raises:
        UserError: it is not finite.
    """
    if math.isfinite(loss):
        return
    kept = ""
    if last is not None:
        kept = f"; the last good checkpoint is {last}" if last.exists() else "; no checkpoint had been written yet"
    raise UserError(f"the {what} became {loss} at step {step}: stopped{kept}. Try {advice}")


def run_main(main: Callable[[], Any]) -> None:
    """Run a program's `main`; a UserError becomes `error: ...` on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        # An error raised in a loader process arrives with that process's traceback in front of its message.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None
