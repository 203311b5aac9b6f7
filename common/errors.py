"""The one exception that stands for a mistake of the user: programs print it as one sentence, without traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Bad input. The message names the file, line or option, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its kind: libraries' messages run to pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
