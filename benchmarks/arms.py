"""Arms of a speed comparison: processes of their own that alternate (A B C A B C ...), and what is made of their times.

The one that compares starts a `Process` for each arm and lets them `alternate`; in that process `Turns` waits on stdin
for its turn, makes its steps and answers with one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from common.cli import Parser
from common.cpu import tune_allocator
from common.errors import UserError
from common.kernels.products import product
from common.ledger import bench_row, peak_memory, peak_resident, write_rows
from common.options import Count, Threads
from common.paths import REPOSITORY, RESULTS

A = TypeVar("A")
Step = Callable[[int], object]  # takes the number of the step


def mixed(device: str, enabled: bool) -> Any:
    return torch.autocast(device, torch.bfloat16) if enabled else nullcontext()


def matmul_side(device: str) -> int:
    return 2048 if device == "cpu" else 8192


def matmul(device: str, bf16: bool) -> Step:
    """The processor's own rate: one large square product a step, by the faster library."""
    dtype, side = torch.bfloat16 if bf16 else torch.float32, matmul_side(device)
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    if device == "cpu":
        return lambda index: product(a, b)
    out = torch.empty_like(a)
    return lambda index: torch.matmul(a, b, out=out)


class Turns:
    """An arm's side: waits for a turn ("12\\n" on stdin: twelve steps), takes it, answers with one line of JSON."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before, self.live = 0, 0
        self.left = 0
        self.losses: list[Any] = []

    def wait(self) -> bool:
        """Block until the next turn; False when there is none."""
        line = sys.stdin.readline()
        if not line.strip():
            return False
        self.steps = self.left = int(line)
        self.losses = []
        self._synchronise()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return True

    def done(self, loss: Any = None) -> bool:
        """One step was made; True when the turn is over (the answer is then out)."""
        self.left -= 1
        if isinstance(loss, Tensor) and loss.dim() == 0:
            self.losses.append(loss)
        if self.left:
            return False
        self._synchronise()
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        peak = peak_memory()
        self.answer(
            wall=wall / self.steps,
            cpu=cpu / self.steps,
            memory=max(self.before, peak),
            added=max(0, peak - self.live),
            losses=[float(loss) for loss in self.losses],
        )
        return True

    def answer(self, **content: Any) -> None:
        print(json.dumps(content), flush=True)

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def serve(self, step: Step) -> None:
        """Take turns with a plain step function; what lives when the first turn comes is none of the steps'."""
        self.before = peak_memory()
        self.live = live_memory(self.device)
        index = 0
        while self.wait():
            while True:
                result = step(index)
                index += 1
                if self.done(result):
                    break


def live_memory(device: str) -> int:
    """Bytes in use: of the CUDA allocator, or resident once what is free has gone back to the kernel.

    Peaks are counted anew from here on, where the kernel can do that.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


class Process:
    """The other side of `Turns`: an arm's process as seen from the one that takes turns."""

    def __init__(self, module: str, arm: Any, folder: Path, threads: int, *options: str) -> None:
        """Start `python -m module --arm JSON --folder FOLDER --threads N options`; `arm` is a frozen dataclass."""
        self.arm = arm
        self.log = (folder / f"{abs(hash(arm))}.log").open("w+")
        command = [sys.executable, "-m", module, "--arm", json.dumps(vars(arm)), "--folder", str(folder)]
        command += ["--threads", str(threads), *options]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CI": "1"},
        )

    def turn(self, steps: int) -> dict[str, Any]:
        """Let the arm make `steps` steps."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: `answer` says why
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print other lines before it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        last = "\n".join(self.log.read().splitlines()[-12:])
        raise RuntimeError(f"{self.arm} ended with status {self.process.wait()}:\n{last}")

    def end(self) -> None:
        self.process.communicate()
        self.log.close()


@dataclass
class Timing:
    """Medians over the rounds, in seconds a step; memory in bytes; the losses of the first turn."""

    wall: float
    cpu: float
    memory: int  # peak of the process
    losses: list[float]
    best: float  # fastest round, seconds a step
    added: int = 0  # peak over what lived before the first step: libraries, weights, inputs


def alternate(
    processes: Mapping[str, Process], steps: Mapping[str, int], warm_up: Mapping[str, int], rounds: int
) -> dict[str, Timing]:
    """Give every process its turn, `rounds` times, and summarise each; all of them are ended."""
    try:
        none: dict[str, Any] = {"losses": []}
        first = {n: process.turn(warm_up[n]) if warm_up[n] else none for n, process in processes.items()}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                answers[name].append(process.turn(steps[name]))
    finally:
        for process in processes.values():
            process.end()
    return {
        name: Timing(
            statistics.median(a["wall"] for a in given),
            statistics.median(a["cpu"] for a in given),
            max(a["memory"] for a in given),
            first[name]["losses"],
            min(a["wall"] for a in given),
            max(a.get("added", 0) for a in given),
        )
        for name, given in answers.items()
    }


class Pace(NamedTuple):
    """How long arms are measured."""

    rounds: int  # turns of each arm
    steps: int  # of a turn
    threads: int


def take_turns(
    module: str,
    arms: Mapping[str, Any],
    pace: Pace,
    warm_up: int | Mapping[str, int],
    folder: Path,
    *options: str,
    steps: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Start a process of `module` for each arm, let them alternate and summarise each; `steps` where arms differ."""
    processes = {name: Process(module, arm, folder, pace.threads, *options) for name, arm in arms.items()}
    first = dict.fromkeys(arms, warm_up) if isinstance(warm_up, int) else warm_up
    return alternate(processes, steps or dict.fromkeys(arms, pace.steps), first, pace.rounds)


PRECISIONS = ("bf16", "fp32")


def in_both_precisions(ours: A, compiled: Sequence[str], peak: bool) -> dict[str, A]:
    """The arms "ours bf16", "peer fp32" and so on of one that is ours, a frozen dataclass.

    Args:
        compiled: the sides that come compiled too, "peer bf16 compiled" and so on: the peer, and ours where a run of
            ours compiles (`--trainer.compile`).
        peak: with the processor's own rate, "peak bf16" and "peak fp32".
    """
    arm: Any = ours
    sides = ["ours", "peer", "peak"] if peak else ["ours", "peer"]
    arms = {f"{side} {p}": replace(arm, side=side, bf16=p == "bf16") for p in PRECISIONS for side in sides}
    more = {
        f"{side} {p} compiled": replace(arm, side=side, bf16=p == "bf16", compiled=True)
        for p in PRECISIONS
        for side in compiled
    }
    return arms | more


DEFAULTS = "default against default: ours {}, peer {}"


def taken_by_auto(bf16: Timing, fp32: Timing, device: str) -> str:
    """The precision that our trainers take by themselves: on a CPU bf16 only where it wins a tenth."""
    return "fp32" if device == "cpu" and 1.1 * bf16.wall > fp32.wall else "bf16"


class Targets(NamedTuple):
    """What our speed must reach against the better of the eager and the compiled peer, by precision; None: no bar."""

    bf16: float | None
    fp32: float | None


TRAINING, DRAWING = Targets(1.5, 1.15), Targets(1.2, 1.2)


def beside_the_peer(
    timings: Mapping[str, Timing],
    device: str,
    default: str,
    faster: Callable[[str, Timing, Timing, float | None], dict[str, Any]],
    asked: float | None,
    memory: str,
    what: str,
    targets: Targets = TRAINING,
) -> Iterator[dict[str, Any]]:
    """Rows of the speed and memory of such arms: default against default, equal precisions, the peer at its best.

    Args:
        default: the peer's precision as users run it; ours is the one that `--trainer.precision auto` would take.
        faster: a row of its label, both sides and the target.
        asked: the target of default against default.
        memory: what a row of memory is about; `what` ends its name.
        targets: for CPUs, where the compiled peer was measured.
    """
    own = taken_by_auto(timings["ours bf16"], timings["ours fp32"], device)
    label = DEFAULTS.format(own, default)
    yield faster(label, timings[f"ours {own}"], timings[f"peer {default}"], asked)
    for precision in PRECISIONS if default == "fp32" else ("fp32",):
        yield faster(f"both {precision}", timings[f"ours {precision}"], timings[f"peer {precision}"], None)
    for precision, target in zip(PRECISIONS, targets):
        if compiled := timings.get(f"peer {precision} compiled"):
            ours, eager = timings[f"ours {precision}"], timings[f"peer {precision}"]
            bar, also = target if device == "cpu" else None, timings.get(f"ours {precision} compiled")
            yield from at_its_best(precision, faster, bar, ours, eager, compiled, also)
    for ours_in, peer_in in (("bf16", default), ("fp32", "fp32")):
        label = f"ours {ours_in}, peer {peer_in}" if ours_in != peer_in else f"both {ours_in}"
        name = f"{where_of(device)}{memory}, {label} ({what})"
        yield leaner(name, timings[f"ours {ours_in}"], timings[f"peer {peer_in}"], device)
    if default == "fp32":  # equal precisions in bf16 as well
        name = f"{where_of(device)}{memory}, both bf16 ({what})"
        yield leaner(name, timings["ours bf16"], timings["peer bf16"], device)


def at_its_best(
    precision: str,
    faster: Callable[[str, Timing, Timing, float | None], dict[str, Any]],
    target: float | None,
    ours: Timing,
    eager: Timing,
    compiled: Timing,
    ours_compiled: Timing | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of ours against the compiled peer, and with the target the faster form of ours against the faster of its."""
    label = "bf16" if precision == "bf16" else "float32"
    yield faster(f"{label}, ours eager against peer compiled", ours, compiled, None)
    if ours_compiled is not None:
        yield faster(f"{label}, both compiled", ours_compiled, compiled, None)
    mine = min(filter(None, (ours, ours_compiled)), key=lambda timing: timing.wall)
    better = min(eager, compiled, key=lambda timing: timing.wall)
    row = faster(f"both {precision}, against the better peer", mine, better, target)
    note = f"{row.get('note', '')}; the better one is {'compiled' if better is compiled else 'eager'}"
    if ours_compiled is not None:
        note += f", ours is {'compiled' if mine is ours_compiled else 'eager'}"
        note += f" (compiled: {ours_compiled.memory / 2**20:.0f} MiB beside its {better.memory / 2**20:.0f})"
    yield noted(row, note)


def in_turns(arms: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of calls in this process that take turns; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            arm()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def training_step(
    network: nn.Module, loss_of: Callable[[int], Tensor], lr: float, weight_decay: float, fused: bool
) -> Step:
    """Forward, backward, clipping and AdamW; the step returns its loss. `fused`: the optimiser's fused form."""
    parameters = list(network.train().parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused or None)

    def step(index: int) -> Tensor:
        loss = loss_of(index)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def fill_zero_weights(network: nn.Module) -> None:
    """Give zero-initialised layers small weights: both sides would otherwise agree on an output of zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)


def keep(path: Path, result: Tensor) -> Tensor:
    """Keep an arm's first result for the comparison of both sides."""
    if not path.exists():
        torch.save(result.float().cpu(), path)
    return result


def noted(row: dict[str, Any], note: str) -> dict[str, Any]:
    return {**row, "note": note}


def faster(name: str, ours: Timing, peer: Timing, images: int, target: float | None, note: str) -> dict[str, Any]:
    """A row of images per second."""
    load = f"; load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    row = bench_row(name, images / ours.wall, images / peer.wall, "images/s", target=target)
    return noted(row, f"{note}; {torch.get_num_threads()} threads, CPU-time ratio {peer.cpu / ours.cpu:.2f}{load}")


def leaner(name: str, ours: Timing, peer: Timing, device: str, target: float | None = 1.0) -> dict[str, Any]:
    """A row of peak memory."""
    row = bench_row(name, ours.memory / 2**20, peer.memory / 2**20, "MiB", target=target, higher_is_better=False)
    return noted(
        row, "peak resident memory of a process of its own" if device == "cpu" else "peak of torch's allocator"
    )


def sparer(name: str, ours: Timing, peer: Timing, target: float | None = 1.0) -> dict[str, Any]:
    """A row of the memory that steps add to what lives before the first one."""
    row = bench_row(name, ours.added / 2**20, peer.added / 2**20, "MiB", target=target, higher_is_better=False)
    return noted(row, "peak less what libraries, weights and inputs take before the first step")


def of_the_peak(name: str, flop: float, ours: Timing, peak: Timing, device: str, rounds: int) -> dict[str, Any]:
    """A row of FLOP/s beside the best turn of `matmul`."""
    side = matmul_side(device)
    row = bench_row(name, flop / ours.wall / 1e9, 2 * side**3 / peak.best / 1e9, "GFLOP/s")
    return noted(row, f"peak: best of {rounds} turns of a {side}x{side} product in the same run")


@dataclass(frozen=True)
class Arm:
    """A process of a benchmark of training steps: `side` is "ours", "peer" or "peak" (a large product)."""

    side: str
    size: str
    device: str
    bf16: bool = True
    compiled: bool = False


def training_rows(
    module: str,
    size: str,
    device: str,
    folder: Path,
    pace: Pace,
    batch: int,
    label: str,
    target: float,
    flop: Callable[[], float] | None = None,
    work: str = "training step",
    compiled: Sequence[str] = ("ours", "peer"),
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Rows of a training step's speed, memory and share of the peak, with the timings that they are made of.

    Args:
        module: whose processes are the arms.
        batch: images of a step.
        label: what is compared with what, "training step against ...".
        target: of default against default.
        flop: counts those of a step, once all is timed; without it there are no rows of the peak.
        work: the step's name in the rows of memory and peak.
        compiled: the sides that are measured compiled too.
    """
    arms = in_both_precisions(Arm("ours", size, device), compiled, peak=flop is not None)
    steps = {name: 4 if arm.side == "peak" else pace.steps for name, arm in arms.items()}
    timings = take_turns(module, arms, pace, 2, folder, steps=steps)
    what = f"{size}, batch {batch}"

    def row(form: str, mine: Timing, theirs: Timing, bar: float | None) -> dict[str, Any]:
        name = f"{where_of(device)}{label}, {form} ({what})"
        return faster(name, mine, theirs, batch, bar, "one step of the same batch")

    rows = list(beside_the_peer(timings, device, "fp32", row, target, f"memory of a {work}", what))
    if flop is not None:
        rows += peak_rows(work, flop(), timings, device, what, pace)
    return rows, timings


def quality_rows(where: str, what: str, ours: Timing, peers: Mapping[str, Timing], steps: int, tail: int) -> list[Any]:
    """Rows of the training loss in bf16 beside others after the same `steps`, a mean over the last `tail`."""
    mean = {id(timing): statistics.fmean(timing.losses[-tail:]) for timing in (ours, *peers.values())}
    note = f"mean of the last {tail} of {steps} identical steps from identical weights"
    return [
        noted(
            bench_row(
                f"{where}quality: training loss of ours in bf16 against {label} ({what})",
                mean[id(ours)],
                mean[id(peer)],
                "MSE",
                target=0.98,
                higher_is_better=False,
            ),
            note,
        )
        for label, peer in peers.items()
    ]


def where_of(device: str) -> str:
    """What a row's name begins with."""
    return "" if device == "cpu" else f"{device} "


def record(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Print rows and write them into `output`."""
    for row in rows:
        bar = "" if row["target"] is None else f"  (at least {row['target']:.3g}: {'yes' if row['holds'] else 'NO'})"
        numbers = f"{row['ours']:.4g} against {row['peer']:.4g} {row['unit']}, {row['ratio']:.3g}x"
        print(f"{row['name']}: {numbers}{bar}", flush=True)
    # A row of the defaults takes the place of the one in which they were others.
    renamed = [row["name"].replace(f"ours {p},", f"ours {q},") for row in rows for p, q in permutations(PRECISIONS)]
    write_rows(output, rows, gone={name for name in renamed if "default against default" in name})


def serve(arm: Any, steps: Mapping[str, Callable[[Any], Step]]) -> None:
    """An arm's own process: "ours" and "peer" make the step that they do, "peak" is a large product."""
    tune_allocator()
    Turns(arm.device).serve(matmul(arm.device, arm.bf16) if arm.side == "peak" else steps[arm.side](arm))


def serve_or_measure(
    options: argparse.Namespace,
    steps: Mapping[str, Callable[[Arm], Step]],
    parts: Callable[[str, str, Path, Pace], Iterator[list[dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """The arm's process that the options name, or else the rows of `parts`."""
    if options.arm:
        serve(Arm(**options.arm), steps)
        return []
    return measure(options, parts)


def peak_rows(
    work: str, flop: float, timings: Mapping[str, Timing], device: str, what: str, pace: Pace
) -> Iterator[dict[str, Any]]:
    """Rows of `work`'s share of the processor's own rate in both precisions; `flop` of one step."""
    for p in PRECISIONS:
        name = f"{where_of(device)}share of the matmul peak, {work}, {p} ({what})"
        yield of_the_peak(name, flop, timings[f"ours {p}"], timings[f"peak {p}"], device, pace.rounds)


def bench_parser(text: str | None, output: str, sizes: Mapping[str, Any], default: Sequence[str], steps: int) -> Parser:
    """The options of a benchmark that compares arms; those of an arm's own process are not shown."""
    parser = Parser(description=text)
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=list(default), help="networks that are measured")
    parser.add_argument("--steps", type=Count, default=steps, help="steps of a turn")
    parser.add_argument("--arm", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return machine_options(parser, output, rounds=5)


def parse(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; torch takes the number of threads that they name."""
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return options


def machine_options(parser: Parser, output: str, rounds: int) -> Parser:
    """Where a benchmark runs, how often, and where its rows go."""
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="default: all there are")
    parser.add_argument("--rounds", type=Count, default=rounds, help="turns of each arm")
    parser.add_argument("--threads", type=Threads, default=torch.get_num_threads(), help="CPU threads of an arm")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="JSON file that the rows go to")
    return parser


def measure(
    options: argparse.Namespace, parts: Callable[[str, str, Path, Pace], Iterator[list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Measure the sizes one after the other on every device; rows are written as soon as a part is done.

    Args:
        parts: size, device, a folder of its own, pace -> rows, a list a part.
    """
    rows, pace = [], Pace(options.rounds, options.steps, options.threads)
    for device in chosen_devices(options):
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                for found in parts(size, device, Path(folder), pace):
                    record(found, options.output)
                    rows += found
    return rows


def chosen_devices(options: argparse.Namespace) -> list[str]:
    """The devices to measure on.

    Raises:
        UserError: cuda was asked for and is not there.
    """
    cuda = torch.cuda.is_available()
    devices = options.devices or (["cpu", "cuda"] if cuda else ["cpu"])
    if "cuda" in devices and not cuda:
        raise UserError("--devices cuda: this machine has no CUDA device, or torch was built without CUDA")
    return devices
