"""Networks that a search trains per CPU-second, a generation of NSGA-II, and counting a network, beside plain forms.

    python -m benchmarks.eeea_net               # writes results/bench_eeea_net.json; some minutes on 2 cores
    python -m benchmarks.eeea_net --sizes small --rounds 3

Evaluating networks: every arm is a process of its own that waits for its turn; a step builds, counts, trains and
compares one network, the same networks in every arm, from the same weights, on the same pictures. "plain" is the loop
as the authors' program has it: batches augmented for each network anew, SGD parameter by parameter, the large network
built to be counted. "plain at its best" counts on the meta device and steps with the fused optimiser. All arms end with
the same errors, or no row is written.

A generation: sorting, crowding, survival, tournament, crossover and mutation of 40 networks under three objectives,
with errors that cost nothing; beside pymoo's NSGA2 on as many integer genes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.arms import Pace, Step, Turns, bench_parser, measure, noted, parse, take_turns, where_of
from common.errors import run_main
from common.ledger import bench_row

POPULATION, GENERATIONS = 40, 15


class Size(NamedTuple):
    channels: int
    layers: int
    side: int
    batch: int
    steps: int


SIZES = {
    "tiny": Size(4, 3, 8, 8, 2),
    "small": Size(8, 3, 16, 64, 40),  # of the claims
    "medium": Size(16, 5, 32, 64, 20),
}


@dataclass(frozen=True)
class Arm:
    """One process: `side` is "ours", "plain" or "best" (the plain loop at its best)."""

    side: str
    size: str
    device: str


def networks() -> Iterator[Any]:
    """The same random genotypes in every process."""
    from eeea_net.space import Space

    space, random = Space(), np.random.default_rng(0)
    while True:
        yield space.decode(space.draw(random))


def make_step(arm: Arm) -> Step:
    """Evaluates the next network; returns its validation error."""
    from common.cpu import tune_allocator
    from eeea_net import proxy
    from eeea_net.config import DataConfig, NetworkConfig, ProxyOptions
    from eeea_net.counting import build_on_meta, count, measured
    from eeea_net.data import open_data
    from eeea_net.model import Network

    spec, large = SIZES[arm.size], NetworkConfig()
    pictures = DataConfig(name="textures", size=spec.side, images=20 * spec.batch, padding=2, validation=0.2)
    shape: dict[str, Any] = {"channels": spec.channels, "layers": spec.layers, "batch_size": spec.batch}
    options = ProxyOptions(**shape, lr=0.1, cutout=4, auxiliary=0.0, steps=spec.steps)
    setting = proxy.Setting(pictures, options, 0, arm.device)
    data, drawn = open_data(pictures), networks()
    shared = proxy.Lesson(setting, data)
    if arm.side == "ours":
        tune_allocator()

    def step(index: int) -> torch.Tensor:
        genotype = next(drawn)
        if arm.side == "ours":
            count(genotype, large, 32)
            return torch.tensor(proxy.train_and_compare(genotype, options, shared, 0, arm.device)["error"])
        measured(build_on_meta(genotype, large) if arm.side == "best" else Network(genotype, large), 32)
        own, fused = proxy.Lesson(setting, data), arm.side == "best"
        return torch.tensor(proxy.train_and_compare(genotype, options, own, 0, arm.device, fused)["error"])

    return step


def cpu_seconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds of `work`, the first time left out."""
    taken = []
    for _ in range(rounds + 1):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return median(taken[1:])


def our_generations() -> None:
    """A search whose errors cost nothing, sizes counted before."""
    from common.evolution import generation_random
    from eeea_net.config import EvolutionOptions
    from eeea_net.evolution import first_generation, next_generation
    from eeea_net.space import Space

    space, options = Space(), EvolutionOptions(population=POPULATION, generations=GENERATIONS, beta=0.0)

    def objectives(chromosome: Any) -> tuple[float, float, float]:
        genes = np.array([gene for gene in chromosome[1::2]], dtype=float)
        return float(genes.sum()), float(np.abs(genes - 1).sum()), float((genes * genes).sum())

    members = first_generation(space, options, generation_random(0, 0), lambda one: 0.0).members
    population = [member.measured(objectives(member.chromosome)) for member in members]
    known: set[str] = set()
    for number in range(1, GENERATIONS):
        known |= {member.key for member in population}
        kept, children = next_generation(space, population, options, generation_random(0, number), known)
        population = [*kept, *(child.measured(objectives(child.chromosome)) for child in children)]


def pymoo_generations() -> None:
    """pymoo's NSGA2 on as many integer genes and generations, its own defaults."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    class Genes(ElementwiseProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=40, n_obj=3, xl=0, xu=9, vtype=int)

        def _evaluate(self, x: Any, out: dict[str, Any], *_: Any, **__: Any) -> None:
            genes = x[1::2].astype(float)
            out["F"] = [genes.sum(), np.abs(genes - 1).sum(), (genes * genes).sum()]

    algorithm = NSGA2(
        POPULATION,
        sampling=IntegerRandomSampling(),
        crossover=UniformCrossover(repair=RoundingRepair()),
        mutation=PM(repair=RoundingRepair()),
    )
    minimize(Genes(), algorithm, ("n_gen", GENERATIONS), seed=0, verbose=False)


def rows_of(size: str, device: str, folder: Path, pace: Pace) -> Iterator[dict[str, Any]]:
    """All rows of one size.

    Raises:
        RuntimeError: the arms' errors differ.
    """
    from eeea_net.config import NetworkConfig
    from eeea_net.counting import build_on_meta, count, measured
    from eeea_net.model import Network

    spec = SIZES[size]
    arms = {side: Arm(side, size, device) for side in ("ours", "plain", "best")}
    found = take_turns("benchmarks.eeea_net", arms, pace, 1, folder)
    if len({tuple(timing.losses) for timing in found.values()}) != 1:
        raise RuntimeError(f"{size}: errors differ: { {side: timing.losses for side, timing in found.items()} }")
    what = f"{size}: C={spec.channels}, {spec.layers} cells, {spec.side} px, {spec.steps} steps of {spec.batch}"
    where = where_of(device)
    for side, label, target in (("plain", "the plain loop", 2.0), ("best", "the plain loop at its best", None)):
        name = f"{where}networks built, counted, trained and compared against {label} ({what})"
        row = bench_row(name, 1 / found["ours"].cpu, 1 / found[side].cpu, "networks/CPU-s", target=target)
        yield noted(row, "the same networks, weights and pictures; equal errors")
    if device != "cpu" or size not in ("tiny", "small"):
        return
    ours, peer = cpu_seconds(our_generations, pace.rounds), cpu_seconds(pymoo_generations, pace.rounds)
    name = f"NSGA-II of {POPULATION} over {GENERATIONS} generations against pymoo's NSGA2"
    row = bench_row(name, GENERATIONS / ours, GENERATIONS / peer, "generations/CPU-s", target=1.0)
    yield noted(row, "errors that cost nothing; ours draws 36 new members a generation, pymoo 40")
    genotypes = [genotype for genotype, _ in zip(networks(), range(50))]
    large = NetworkConfig()
    formula = cpu_seconds(lambda: [count(genotype, large, 32) for genotype in genotypes], pace.rounds) / len(genotypes)
    for label, build in (("the network itself", Network), ("the network on the meta device", build_on_meta)):
        built = cpu_seconds(lambda: measured(build(genotypes[0], large), 32), 2)  # noqa: B023
        name = f"parameters and MACs of a network (36 channels, 20 cells) against {label}"
        row = bench_row(name, 1e3 * formula, 1e3 * built, "ms", target=1.0, higher_is_better=False)
        yield noted(row, "the same numbers; at most 1 ms was asked for")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(bench_parser(__doc__, "bench_eeea_net.json", SIZES, ["small", "medium"], steps=2), argv)
    if options.arm:
        arm = Arm(**options.arm)
        Turns(arm.device).serve(make_step(arm))
        return []
    return measure(options, lambda *given: iter([list(rows_of(*given))]))


if __name__ == "__main__":
    run_main(main)
