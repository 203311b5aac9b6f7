"""Drills of going on: programs that are killed in the middle with signal 9, started again, and must end alike.

As a program (`python -m tests.drills MODULE STAGE STEP ...`) it runs MODULE's `main` on the arguments that follow, and
the operating system kills it, without any warning, when the Trainer of the folder STAGE has made STEP steps.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.paths import REPOSITORY

# Of processes that wait for each other; only a test that hangs reaches it, on a busy machine too.
PATIENCE = timedelta(minutes=10)


def words(**options: Any) -> list[str]:
    """Options as a command line has them; `__` stands for the dot: `trainer__max_steps=6`."""
    return [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]


def start(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python program from the repository's root; pytest's own limit ends one that hangs."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )


def succeed(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`start` of a program that must end well."""
    done = start(*command, **variables)
    assert done.returncode == 0, done.stderr
    return done


def kill(module: str, stage: str, step: int, arguments: list[str]) -> None:
    """Run `python -m module` until the Trainer of the folder named `stage` has made `step` steps."""
    killed = start("-m", "tests.drills", module, stage, str(step), *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def same_weights(a: Path, b: Path) -> bool:
    """Whether two safetensors files hold the same tensors to the bit."""
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@contextlib.contextmanager
def running(command: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A silent process in the background, killed with all that it started when the context is left."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True, **quiet)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until the condition holds; fails if the process ends first."""
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it came so far"
        time.sleep(0.02)


def _main() -> None:
    module, stage, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.argv[1:] = sys.argv[4:]
    import pytorch_lightning as pl

    from common.data.sampling import generator_step

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if generator_step(trainer) == step and Path(trainer.default_root_dir).name == stage:
                os.kill(os.getpid(), signal.SIGKILL)

    made = pl.Trainer.__init__

    def with_kill(self: pl.Trainer, *, callbacks: Any = (), **options: Any) -> None:
        made(self, callbacks=[*callbacks, Kill()], **options)

    pl.Trainer.__init__ = with_kill  # type: ignore[method-assign]
    importlib.import_module(module).main()


if __name__ == "__main__":
    _main()
