"""How programs end when something is wrong: one sentence and an exit status, without traceback."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.processes import LOST, die_with_launcher, is_launched, is_main_process, lost_the_others
from common.stopping import Stopped, command, listening

# What a disk or a folder refuses, as the system and the libraries that keep only its words say it.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_WORDS = (
    *(os.strerror(number) for number in sorted(_REFUSED - {errno.EPERM})),
    "PytorchStreamWriter failed",
    "No usable temporary directory",
    "shared memory",
)


class UserError(Exception):
    """Bad input. The message names the file, line or option, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its kind: libraries' messages run to pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refused_by_disk(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or that a folder must not be written or read."""
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return True
    return any(words in str(error) for words in _WORDS)


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
    """Run a program's `main`; what ends it is said in one sentence on stderr.

    Exit status 2: a UserError, a full disk, a folder that cannot be written; 143 and 130: SIGTERM and Ctrl-C; 75:
    another process of the run is gone. A process that a launcher started ends with it.
    """
    if is_launched():
        die_with_launcher()
    try:
        with listening():
            main()
    except UserError as error:
        # An error raised in a loader process arrives with that process's traceback in front of its message.
        _end(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", 2)
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        _end(str(stopped) if is_main_process() else "", stopped.status)
    except Exception as error:
        if lost_the_others(error):
            rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
            _end(f"error: rank {rank} lost another process of this run, which ended first", LOST)
        if not refused_by_disk(error):
            raise
        place = getattr(error, "filename", None) or "a file"
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        _end(
            f"error: cannot use {place}: {reason}. Free the disk or change the folder's permissions; --run_dir, "
            "REPRO_CACHE and TMPDIR move what the programs write. What was finished before is whole; to go on: "
            f"{command()}",
            2,
        )


def _end(sentence: str, status: int) -> NoReturn:
    if sentence:
        print(sentence, file=sys.stderr)
    if is_launched():  # at the interpreter's end the group's threads may wait for processes that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status) from None
