"""Processes of one run: which this is, how they meet, and that none outlives the one that started it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from subprocess import Popen

LAUNCHER = "LAUNCHER_PID"  # names the process that started this one, for `die_with_launcher`
LOST = 75  # exit status of a process that ended because another one did (EX_TEMPFAIL)
_PR_SET_PDEATHSIG = 1


def is_main_process() -> bool:
    """Whether this process writes the shared files; known from the launcher's variables before any Trainer exists."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


@cache
def say_once(line: str) -> None:
    """A line on stderr, once and by one process."""
    if is_main_process():
        print(line, file=sys.stderr)


def process_place() -> tuple[int, int]:
    """(rank, processes) of this process: of the process group if there is one, else what the launcher says."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))), int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher (torchrun, Lightning, a trainer's own) started this process as one of several."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ or LAUNCHER in os.environ


def die_with_launcher() -> None:
    """The end of the process that started this one, by signal 9 too, is the end of this one."""
    parent = int(os.environ.get(LAUNCHER) or os.getppid())
    if LAUNCHER in os.environ:
        os.environ[LAUNCHER] = ""  # it is not that of this one's own children
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before this could be asked for
        os._exit(LOST)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(LOST)


def end_all(processes: Sequence[Popen[bytes]], patience: float = 30.0) -> None:
    """Ask the processes to stop, and end those that have not within `patience` seconds."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    last = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < last:
        time.sleep(0.02)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def first_failure(processes: Sequence[Popen[bytes]], patience: float = 0.0) -> int | None:
    """Which of the processes ended by itself with an error: not one that only lost the others; None if none did.

    Args:
        patience: seconds to wait for one.
    """
    last = time.monotonic() + patience
    while True:
        for number, process in enumerate(processes):
            if process.poll() not in (None, 0, LOST):
                return number
        if time.monotonic() >= last:
            return None
        time.sleep(0.02)


class Guard(threading.Thread):
    """Ends this process with a sentence when one that it started has failed, unless it does so by itself meanwhile.

    Lightning's own guard kills it without a word.

    Args:
        launcher: its `procs` gets the processes; they are taken from there.
        sentence: what is said of the one with this number.
    """

    processes: ClassVar[list[Popen[bytes]]] = []  # a later training has those that an earlier one started

    def __init__(self, launcher: Any, sentence: Callable[[int, str], str]) -> None:
        super().__init__(daemon=True)
        self.launcher, self.sentence = launcher, sentence
        self.over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def run(self) -> None:
        while not self.over.wait(0.1):
            started = getattr(self.launcher, "procs", [])
            self.processes.extend(started)
            started.clear()
            failed = first_failure(self.processes)
            if failed is None:
                continue
            asked = self.processes[failed].returncode > 128  # by a signal: this one ends at the same step
            if not self.over.wait(30 if asked else 3):
                os.write(2, f"error: {self.said(failed)}\n".encode())
                end_all(self.processes, patience=1)
                os._exit(2)

    def said(self, failed: int) -> str:
        return self.sentence(failed, how_it_ended(self.processes[failed].returncode))


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def lost_the_others(error: BaseException) -> bool:
    """Whether an error says that another process is gone: torch's own kinds, gloo's plain RuntimeError."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    return bool(names & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}) or (
        isinstance(error, RuntimeError) and ("gloo" in text.lower() or "Connection closed by peer" in text)
    )


def start_process_group(backend: str, seconds: float = 600.0, meeting: str | None = None) -> None:
    """Join the other processes, if there are any: RANK and WORLD_SIZE say so, as torchrun sets them.

    Workers that torchrun starts again meet under the number of their attempt: its store still holds the addresses of
    those that died.

    Args:
        meeting: a file through which processes of one machine meet without a port.
    """
    import torch.distributed as dist

    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank, ranks, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=seconds)
    if meeting:
        dist.init_process_group(backend, f"file://{meeting}", timeout=timeout, rank=rank, world_size=ranks)
        return
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not hosted,
        timeout=timeout,
        multi_tenant=not hosted,
    )
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, timeout=timeout, rank=rank, world_size=ranks)
