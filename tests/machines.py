"""The numerical tests as other machines would run them: `make test-machines`.

    python tests/machines.py                              # every setting, some minutes each
    python tests/machines.py --settings aten-default,busy
    python tests/machines.py tests/pixart -k golden       # what follows goes to pytest

Goldens, resume, kernels, metrics: tests/conftest.py says by their files' names which tests these are, in every paper.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Setting:
    """Environment variables that make a machine of another kind of this one, or a process that keeps it busy."""

    what: str
    variables: dict[str, str] = field(default_factory=dict)
    busy: bool = False


RESTING = {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave the core to those that work
SETTINGS = {
    "as-it-is": Setting("this machine, one thread a process"),
    "aten-default": Setting("no vector units that torch knows (ARM among them)", {"ATEN_CPU_CAPABILITY": "default"}),
    "aten-avx2": Setting("torch's own operators with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "onednn-avx2": Setting("oneDNN with AVX2: no bf16 instructions, no AMX", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "threads-2": Setting("two threads a process: sums in other parts", {"TEST_THREADS": "2", **RESTING}),
    "products-onednn": Setting("float32 products by oneDNN, as on AMD's CPUs", {"REPRO_PRODUCTS": "onednn"}),
    "busy": Setting("every core already at work", busy=True),
}


@dataclass(frozen=True)
class Outcome:
    """What pytest counted; `failed` are the names of the tests that failed or could not run."""

    passed: int
    skipped: int
    failed: list[str]
    seconds: float
    status: int

    @property
    def good(self) -> bool:
        return self.status == 0 and self.passed > 0 and not self.failed


@contextlib.contextmanager
def load(busy: bool) -> Iterator[None]:
    """A process a core that never rests, while the context lasts."""
    count = (os.cpu_count() or 1) if busy else 0
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def read_report(file: Path, status: int) -> Outcome:
    """A JUnit report of pytest; without one nothing has passed."""
    if not file.is_file():
        return Outcome(0, 0, ["pytest ended before it could say what"], 0.0, status)
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    names = {case: f"{case.get('classname', '')}::{case.get('name')}" for case in cases}
    failed = [names[case] for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = sum(float(suite.get("time", 0)) for suite in ElementTree.parse(file).getroot().iter("testsuite"))
    return Outcome(len(cases) - skipped - len(failed), skipped, failed, seconds, status)


def run(setting: Setting, jobs: int, arguments: Sequence[str]) -> Outcome:
    """Pytest under a setting, on `jobs` processes."""
    jobs = max(1, jobs // int(setting.variables.get("TEST_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder, load(setting.busy):
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "numerical and not slow and not gpu", f"--junitxml={report}"]
        if jobs > 1:
            command += ["-n", str(jobs), "--dist", "loadfile"]
        environment = {**os.environ, **setting.variables}
        # The limit is there for tests that hang: beside busy processes the slowest take several times as long.
        done = subprocess.run([*command, "-o", "timeout=3000", *arguments], cwd=REPOSITORY, env=environment)
        return read_report(report, done.returncode)


def table(outcomes: dict[str, Outcome]) -> str:
    """A line a setting, then the tests that failed."""
    lines = [f"{'setting':<16}{'passed':>8}{'skipped':>9}{'failed':>8}{'minutes':>9}"]
    for name, outcome in outcomes.items():
        counts = f"{outcome.passed:>8}{outcome.skipped:>9}{len(outcome.failed):>8}{outcome.seconds / 60:>9.1f}"
        lines.append(f"{name:<16}{counts}  {SETTINGS[name].what}")
    lines += [f"{name}: {test}" for name, outcome in outcomes.items() for test in outcome.failed]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen settings one after the other; 0 if every test passed under each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"some of {', '.join(SETTINGS)}, with commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of pytest (default: cores)")
    options, arguments = parser.parse_known_args(argv)
    chosen = options.settings.split(",")
    if unknown := [name for name in chosen if name not in SETTINGS]:
        parser.error(f"--settings {unknown[0]}: expected some of {', '.join(SETTINGS)}")
    outcomes: dict[str, Outcome] = {}
    for name in chosen:
        print(f"== {name}: {SETTINGS[name].what}", flush=True)
        outcomes[name] = run(SETTINGS[name], options.jobs, arguments)
    print(table(outcomes))
    return 0 if all(outcome.good for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
