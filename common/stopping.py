"""Stopping when asked to (SIGTERM, Ctrl-C): between two steps, with the last one saved, all processes at the same one.

Imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from common.processes import LAUNCHER, is_main_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = 3.0  # seconds; launchers send a signal that the terminal has sent already, a person is slower


class Stopped(BaseException):
    """The program was asked to stop, and has. No `Exception`: no handler of errors takes it for one.

    Args:
        number: of the signal.
        ranks: the processes that got it, where some of several did.
        saved: what is kept, for the message.

    `options` are those that the command needs to go on beside its own.
    """

    def __init__(self, number: int, ranks: Sequence[int] = (), saved: str = "") -> None:
        super().__init__(number)
        self.number, self.ranks, self.saved = number, ranks, saved
        self.options: Sequence[str] = ()

    @property
    def status(self) -> int:
        """The exit status that shells and schedulers expect: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number

    def __str__(self) -> str:
        """One sentence: what happened, what is kept, and the command that goes on."""
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        sent = f" sent to rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        kept = f"; {self.saved}" if self.saved else ""
        again = f". To go on: {command(self.options)}"
        return f"stopped by {name}{sent}{kept}{'' if LAUNCHER in os.environ else again}"


def command(options: Sequence[str] = ()) -> str:
    """This program as it was started, for a shell; it goes on with what is there (`--resume` is left out)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    given = list(sys.orig_argv)
    kept = [
        word
        for i, word in enumerate(given)
        if word != "--resume" and not word.startswith("--resume=") and (i == 0 or given[i - 1] != "--resume")
    ]
    return shlex.join([*kept, *options])


class _Listener:
    """The signals of this process: raised at once, or noted while `between_steps` lasts."""

    def __init__(self) -> None:
        self.process, self.holding, self.noted, self.since = 0, 0, 0, 0.0

    def hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a loader's process: as if nobody listened
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.holding or (self.noted and time.monotonic() - self.since > AGAIN):
            raise Stopped(self.noted or number)
        elif not self.noted:
            self.noted, self.since = number, time.monotonic()
            if is_main_process():
                os.write(2, b"\nstopping after this step; once more stops at once\n")  # print is not safe here


_listener = _Listener()


def listen() -> None:
    """Hear the signals from now on, whoever has taken them meanwhile (Lightning does)."""
    if threading.current_thread() is not threading.main_thread() or _listener.process != os.getpid():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and `&` of a script
            signal.signal(number, _listener.hear)


@contextmanager
def listening() -> Iterator[None]:
    """Signals end the block by `Stopped`; afterwards whoever had them has them again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _listener.process, _listener.noted = os.getpid(), 0
    listen()
    try:
        yield
    finally:
        _listener.process = 0
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class Steps:
    """A loop of steps that signals end between two of them: `with Steps() as steps`, and `steps.ended` after each.

    A second signal, seconds after the first, ends the loop at once.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._ranks = 0

    def __enter__(self) -> Self:
        listen()
        _listener.holding += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _listener.holding -= 1
        if kind is None and _listener.noted and not _listener.holding:
            raise Stopped(_listener.noted)

    def asked(self) -> list[int]:
        """The signal that each process has got, 0 for none; a collective call."""
        if not self._ranks:
            distributed = sys.modules.get("torch.distributed")
            together = distributed is not None and distributed.is_available() and distributed.is_initialized()
            self._ranks = distributed.get_world_size() if together else 1  # type: ignore[union-attr]
            if self._ranks > 1:  # a group of their own, on the CPU, so that no other collective is disturbed
                self._group = distributed.new_group(backend="gloo")  # type: ignore[union-attr]
        if self._ranks == 1:
            return [_listener.noted]
        import torch
        import torch.distributed as dist

        heard = torch.zeros(self._ranks, dtype=torch.int64)
        heard[dist.get_rank()] = _listener.noted
        dist.all_reduce(heard, group=self._group)
        return heard.tolist()

    def ended(self, save: Callable[[], str]) -> None:
        """A step has ended: stop here if any process was asked to. Every process calls it after every step.

        Args:
            save: keeps the present state; returns what the message says of it.

        Raises:
            Stopped: on all processes after the same step.
        """
        asked = self.asked()
        if any(asked):
            ranks = [rank for rank, number in enumerate(asked) if number]
            raise Stopped(max(asked), ranks if len(ranks) < len(asked) else [], save())
