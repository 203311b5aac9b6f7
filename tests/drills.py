"""Drills of every trainer: it is killed, stopped, starved and fed damaged files, and must end as if nothing had been.

    make drills                                            # every paper, every kind: some minutes a paper
    make drills ARGS="--papers ldm --kinds kill,term"      # --seed draws other moments and bits

A paper takes part by `command(folder)` in tests/<paper>/tiny_run.py: the arguments with which its train.py makes a run
in `folder` in seconds, from inputs that lie beside it; FIRST_CHECKPOINT there is the step by which the run has a
checkpoint, if not the third. The programs run in forked processes, so that none of them has to import torch and
Lightning again; these use one thread: a forked process hangs in its parent's pool of threads.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from common.errors import run_main
from common.paths import REPOSITORY, papers
from common.stopping import Steps

# Of processes that wait for each other; only a test that hangs reaches it, on a busy machine too.
PATIENCE = timedelta(minutes=10)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.2"]
HELD = Path(__file__).parent / "held"
SECONDS = 60.0  # within which a run whose rank has died is over: seconds, on a busy machine too
# What differs between two runs of the same numbers, at the end of a key of JSON.
MEASURED = (
    *("seconds", "per_second", "cpu_seconds_per_1000_tokens", "peak_bytes", "resident_bytes", "peak_memory_bytes"),
    *("bytes_read", "bytes_written", "hidden_fraction", "predicted", "missed", "unused", "cache_hit_rate"),
    *("hardware", "commit", "path", "pids"),
)


# Programs that the tests start.


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


@contextlib.contextmanager
def running(command: list[str], said: Path | None = None, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the background, killed with all that it started when the context is left; `said` gets its words."""
    with (said or Path(os.devnull)).open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            cwd=REPOSITORY,
            start_new_session=True,
            stdout=output,
            stderr=output,
        )
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


def held(step: int, folder: Path) -> dict[str, str]:
    """Variables with which a program waits ten seconds after each step from this one on, and says so in a folder."""
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(HELD), str(REPOSITORY)])
    return {"HELD_AFTER": str(step), "HELD_IN": str(folder), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def two_ranks(launcher: subprocess.Popen[bytes], folder: Path) -> list[psutil.Process]:
    """The processes of a `held` run of two ranks, as soon as both wait."""
    wait_for(lambda: len(list(folder.iterdir())) == 2, launcher)
    return [psutil.Process(int(file.name.partition("-")[2])) for file in sorted(folder.iterdir())]


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child process and wait: its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# One start of a program, and what befalls it.


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit status (negative: the signal that ended it) and what it said on stderr."""

    status: int
    said: str

    def well(self) -> None:
        """Nothing was wrong."""
        assert self.status == 0, self.said

    def refused(self, *named: str) -> None:
        """It ended in one sentence, which holds one of these."""
        assert self.status == 2 and "Traceback" not in self.said, self.said
        sentence = self.said.strip().splitlines()[-1]
        assert sentence.startswith("error: ") and (not named or any(name in sentence for name in named)), self.said


def run(module: str, arguments: Sequence[str]) -> None:
    """`python -m module arguments` in this process."""
    sys.orig_argv[:] = [sys.executable, "-m", module, *arguments]
    sys.argv[:] = [module, *arguments]
    run_main(lambda: importlib.import_module(module).main(list(arguments)))


Fault = Callable[[], object]  # changes the forked process before its program starts


def once(module: str, arguments: Sequence[str], fault: Fault | None = None, **variables: str) -> Ended:
    """`python -m module arguments` in a forked process, with these variables of the environment."""
    with tempfile.TemporaryFile("w+") as said:

        def work() -> None:
            os.dup2(said.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.update(variables)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
            if fault is not None:
                fault()
            run(module, arguments)

        status = forked(work)
        said.seek(0)
        return Ended(status, said.read())


def at_step(number: int, step: int) -> Fault:
    """The signal `number` comes at the end of the process' step `step`, counted over all its stages."""

    def fault() -> None:
        original, done = Steps.ended, 0

        def ended(self: Steps, save: Callable[[], str]) -> None:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), number)
            original(self, save)

        Steps.ended = ended  # type: ignore[method-assign]

    return fault


def at_file(number: int, target: Path | None = None, log: Path | None = None) -> Fault:
    """The signal comes when `target`, a file or a folder, is complete but lacks its name; `log` lists them all."""

    def fault() -> None:
        original = os.replace

        def replace(source: Any, place: Any, **options: Any) -> None:
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{place}\n")
            if Path(place) == target:
                os.kill(os.getpid(), number)
            original(source, place, **options)

        os.replace = replace

    return fault


def kill(module: str, step: int, arguments: Sequence[str]) -> None:
    """Run a program until signal 9 ends it at the end of a step.

    With several threads it has an interpreter of its own, since a forked process has one, whose sums round otherwise.
    """
    if int(os.environ.get("TEST_THREADS", "1")) == 1:
        ended = once(module, arguments, at_step(signal.SIGKILL, step))
    else:
        call = (
            f"import tests.drills as d; d.at_step({int(signal.SIGKILL)}, {step})(); d.run({module!r}, {[*arguments]!r})"
        )
        done = subprocess.run([sys.executable, "-c", call], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        ended = Ended(done.returncode, done.stderr)
    assert ended.status == -signal.SIGKILL, ended.said


def no_file_above(size: int) -> Fault:
    """A disk that is full: files cannot grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(*folders: Path) -> Fault:
    """Nothing below these folders can be made or changed, by the superuser neither."""
    places = [str(folder.resolve()) for folder in folders]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes and isinstance(arguments[0], (str, os.PathLike)):
            path = os.path.realpath(arguments[0])
            if any(path == place or path.startswith(place + os.sep) for place in places):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    return lambda: sys.addaudithook(hook)


# What a run left behind.


def same_weights(a: Path, b: Path) -> bool:
    """Whether two safetensors files hold the same tensors to the bit."""
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def plain(value: Any) -> Any:
    """JSON without what depends on the machine and the moment."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not k.endswith(MEASURED)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def differences(run: Path, whole: Path) -> list[str]:
    """Weights and results that one run folder has and the other lacks or has otherwise; and litter."""
    skipped = {"tiers", "checkpoints", "tokenizer"}  # what a tokenizer's files say depends on who read it last
    found = [f"{path} was left" for path in run.rglob(".*") if path.name.endswith(".part")]
    for pattern in ("*.safetensors", "*.json", "*.png", "*.svg"):
        files = {path.relative_to(folder) for folder in (run, whole) for path in folder.rglob(pattern)}
        for file in sorted(file for file in files if not skipped & set(file.parts)):
            if not ((run / file).is_file() and (whole / file).is_file()):
                found.append(f"{file} is in one of the two only")
            elif pattern == "*.safetensors" and not same_weights(run / file, whole / file):
                found.append(f"{file} differs")
            elif pattern == "*.json" and file.name != "choices.json":
                contents = [plain(json.loads((folder / file).read_text())) for folder in (run, whole)]
                if contents[0] != contents[1]:
                    found.append(f"{file} differs: {contents[0]} {contents[1]}")
    return found


class Drill:
    """The drills of a paper's trainer, in a folder of its own.

    Args:
        folder: gets inputs and runs. seed: of the moments and bits.
    """

    def __init__(self, paper: str, folder: Path, seed: int = 0) -> None:
        self.module, self.folder, self.random = f"{paper}.train", folder, random.Random(seed)
        self.tiny = importlib.import_module(f"tests.{paper}.tiny_run")
        folder.mkdir(parents=True, exist_ok=True)
        self.whole = folder / "whole"
        began, log = time.monotonic(), folder / "files.txt"
        with pytest.MonkeyPatch.context() as patch:  # in this process: what it imports is there for all that are forked
            for name, value in getattr(self.tiny, "VARIABLES", {}).items():
                patch.setenv(name, value)
            patch.setattr(os, "replace", os.replace)
            at_file(0, log=log)()
            importlib.import_module(self.module).main(self.arguments("whole"))
        self.seconds = time.monotonic() - began
        written = [Path(line) for line in log.read_text().splitlines() if ".part" not in line]
        # In the order in which the run wrote them.
        self.files = list(dict.fromkeys(f.relative_to(self.whole) for f in written if f.is_relative_to(self.whole)))
        self.product = [f for f in self.files if f.suffix not in (".json", ".png", ".svg", ".md", ".yaml", ".ckpt")][-1]

    def arguments(self, name: str) -> list[str]:
        return self.tiny.command(self.folder / name)

    def once(self, name: str, fault: Fault | None = None) -> Ended:
        """The trainer's command for the run `name`."""
        return once(self.module, self.arguments(name), fault, **getattr(self.tiny, "VARIABLES", {}))

    def equal(self, name: str) -> None:
        """The same command ends the run as the one that nothing befell."""
        self.once(name).well()
        assert not (found := differences(self.folder / name, self.whole)), found

    def stopped(self, name: str, number: int, step: int) -> None:
        """A signal ends the run after this step with its status and the command that goes on."""
        ended = self.once(name, at_step(number, step))
        assert ended.status == 128 + number, ended.said
        assert "Traceback" not in ended.said and "is saved in" in ended.said, ended.said
        assert f"To go on: {sys.executable} -m {self.module} {self.arguments(name)[0]}" in ended.said, ended.said

    def killed(self, name: str, file: Path) -> None:
        """Signal 9 ends the run when it has made `file` all but its name."""
        ended = self.once(name, at_file(signal.SIGKILL, self.folder / name / file))
        assert ended.status == -signal.SIGKILL, f"{file}: {ended.said}"

    def damaged(self, file: Path, damage: Callable[[Path], object]) -> None:
        """A file of the finished run is damaged: the same command names it, or ends well without it."""
        run = self.folder / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.whole, run)
        damage(run / file)
        ended = self.once("damaged")
        assert ended.status == 0 or ended.refused(file.name, "another configuration") is None, f"{file}: {ended.said}"

    # The kinds.

    def kill(self, moments: int = 4) -> None:
        """Signal 9 before files get their names, and at any time; then the same command."""
        others = [file for file in self.files[1:] if file != self.product]
        for file in [self.product, *self.random.sample(others, min(moments, len(others)))]:
            name = f"kill-{'-'.join(file.parts)}"  # of two stages each has a file of some name
            self.killed(name, file)
            self.equal(name)
        for number in range(moments):
            name, delay = f"kill-{number}", self.random.uniform(0, self.seconds)
            ended = self.once(name, lambda delay=delay: signal.setitimer(signal.ITIMER_REAL, delay))  # type: ignore[misc]
            assert ended.status in (0, -signal.SIGALRM), ended.said
            self.equal(name)

    def writes(self) -> None:
        """Signal 9 before each file of the run gets its name."""
        found = []
        for file in self.files[1:]:
            name = f"file-{'-'.join(file.parts)}"
            self.killed(name, file)
            self.once(name).well()
            found += differences(self.folder / name, self.whole)
            shutil.rmtree(self.folder / name)
        assert not found, found

    def term(self, number: int = signal.SIGTERM) -> None:
        """A signal at two steps: status 143 or 130, the command that goes on, and the same result."""
        name = f"signal-{number}"
        for step in (2, self.random.randint(1, 3)):
            self.stopped(name, number, step)
        self.equal(name)

    def interrupt(self) -> None:
        self.term(signal.SIGINT)

    def rank(self) -> None:
        """One of two ranks is killed, or asked to stop: all end within seconds, in a sentence that names it."""
        for number in (signal.SIGKILL, signal.SIGTERM):
            name = f"rank-{int(number)}"
            said, command = self.folder / f"{name}.txt", self.ranks(name)
            with running(command, said, **held(3, self.folder / f"{name}-held")) as launcher:
                both = two_ranks(launcher, self.folder / f"{name}-held")
                both[1].send_signal(number)
                status = launcher.wait(SECONDS)
                assert not psutil.wait_procs(both, timeout=SECONDS)[1]
            text = said.read_text()
            assert status > 0, f"{status} {text}"
            if TORCHRUN[1] not in command:
                assert "rank 1" in text and "Traceback" not in text and "To go on: " in text, text
            succeed(*command[1:])

    def orphans(self) -> None:
        """The process that started two ranks is killed: they end with it, and the same command ends well."""
        command = self.ranks("orphans")
        with running(command, **held(3, self.folder / "orphans-held")) as launcher:
            both = two_ranks(launcher, self.folder / "orphans-held")
            started = [process for process in both if process.pid != launcher.pid]
            launcher.kill()
            assert not psutil.wait_procs(started, timeout=SECONDS)[1]
        succeed(*command[1:])

    def restart(self) -> None:
        """torchrun starts both ranks again when one was killed, and the run ends well."""
        said, command = self.folder / "restart.txt", self.ranks("restart", "--max-restarts", "1")
        with running(command, said, **held(3, self.folder / "restart-held")) as launcher:
            two_ranks(launcher, self.folder / "restart-held")[1].kill()
            assert launcher.wait(10 * SECONDS) == 0, said.read_text()

    def ranks(self, name: str, *torchrun: str) -> list[str]:
        """The command of the run `name` on two ranks; with options of torchrun, or without an own way, by that."""
        options = getattr(self.tiny, "TWO_RANKS", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])
        program = str(REPOSITORY / f"{self.module.replace('.', os.sep)}.py")
        launch = [*TORCHRUN, *torchrun] if torchrun or not options else []
        return [sys.executable, *launch, program, *self.arguments(name), *options]

    def full(self) -> None:
        """Files of more than 20 kB do not fit: a sentence, and nothing is lost."""
        for cache in (False, True):
            name = f"full-{cache}"
            fault = no_file_above(20_000)
            with self.own_cache(cache):
                self.once(name, fault).refused()
                self.equal(name)

    def readonly(self) -> None:
        """A run folder, and a cache, that cannot be written."""
        run = self.folder / "readonly"
        self.once("readonly", at_step(signal.SIGKILL, 3))
        self.once("readonly", read_only(run)).refused(str(run))
        self.equal("readonly")
        with self.own_cache(True) as cache:
            ended = self.once("readonly-2", read_only(cache))
            assert ended.status == 0 or ended.refused(str(cache), "REPRO_CACHE") is None

    @contextlib.contextmanager
    def own_cache(self, own: bool) -> Iterator[Path]:
        before = os.environ.get("REPRO_CACHE")
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            if own:
                os.environ["REPRO_CACHE"] = name
            yield Path(name)
            if before is not None:
                os.environ["REPRO_CACHE"] = before
            else:
                os.environ.pop("REPRO_CACHE", None)

    def bits(self) -> None:
        """One bit of a checkpoint that the run goes on from is another: refused by name."""
        self.once("bits", at_step(signal.SIGTERM, getattr(self.tiny, "FIRST_CHECKPOINT", 3)))
        found = [*(self.folder / "bits").rglob("last.ckpt"), *(self.folder / "bits").rglob("dense.safetensors")]
        for file in found:
            content = bytearray(file.read_bytes())
            content[self.random.randrange(len(content) // 2, len(content) * 3 // 4)] ^= 1
            file.write_bytes(content)
        self.once("bits").refused(*map(str, found), *(str(file.parent) for file in found))

    def records(self) -> None:
        """Damaged records of a run."""
        for file in records(self.whole):
            for damage in DAMAGES.values():
                self.damaged(file, damage)

    def hostile(self) -> None:
        """Pickles in the place of every file, and YAML that names code: nothing is executed."""
        marker = self.folder / "executed"
        for file in sorted(path.relative_to(self.whole) for path in self.whole.rglob("*") if path.is_file()):
            self.damaged(file, lambda place: place.write_bytes(pickle.dumps(Payload(marker))))
            assert not marker.exists(), f"{file} was executed"
        config = self.folder / "hostile.yaml"
        config.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{marker}']\n")
        once(self.module, ["--config", str(config)]).refused(str(config))
        assert not marker.exists()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def records(run: Path) -> list[Path]:
    """What a run wrote down: its configuration, results and logs, without what libraries write."""
    kinds = (".json", ".yaml", ".jsonl", ".csv")
    others = {"pipeline", "reflowed", "tokenizer", "logs", "tensorboard", "wandb"}
    mine = (path.relative_to(run) for path in run.rglob("*") if path.suffix in kinds)
    return sorted(file for file in mine if not others & set(file.parts))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: max(1, file.stat().st_size // 2)]),
    "binary": lambda file: file.write_bytes(b"\x00\xff\xfe\x80" * 64),
    "of another shape": lambda file: file.write_text("[1, 2]\n"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "empty": lambda file: file.write_text(""),
}
KINDS = (
    *("kill", "writes", "term", "interrupt", "rank", "orphans", "restart"),
    *("full", "readonly", "bits", "records", "hostile"),
)
OF_RANKS = ("rank", "orphans", "restart")  # left out where a paper's tiny_run.py says TWO_RANKS = None


def drilled() -> list[str]:
    """The papers that take part."""
    return [paper for paper in papers() if (REPOSITORY / "tests" / paper / "tiny_run.py").is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen drills one after the other; 0 if all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--papers", default=",".join(drilled()), help="some of %(default)s, with commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of %(default)s, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits (default: %(default)s)")
    options = parser.parse_args(argv)
    chosen, kinds = options.papers.split(","), options.kinds.split(",")
    for option, given, known in (("--papers", chosen, drilled()), ("--kinds", kinds, KINDS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option} {unknown[0]}: expected some of {', '.join(known)}")
    for choice in ("REPRO_ATTENTION", "REPRO_PRODUCTS"):  # runs that are compared to the bit take the same forms
        os.environ.setdefault(choice, "unmeasured")
    torch.set_num_threads(1)
    failed = []
    for paper in chosen:
        with tempfile.TemporaryDirectory() as folder:
            drill = Drill(paper, Path(folder) / paper, options.seed)
            for kind in kinds:
                if kind in OF_RANKS and getattr(drill.tiny, "TWO_RANKS", []) is None:
                    print(f"{paper} {kind}: it trains in one process", flush=True)
                    continue
                began = time.monotonic()
                try:
                    getattr(drill, kind)()
                    outcome = "held"
                except AssertionError as error:
                    traceback.print_exc()
                    outcome = f"FAILED: {error}"
                    failed.append(f"{paper} {kind}")
                print(f"{paper} {kind}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all held")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
