"""Networks that a search trains per CPU-second, a generation of NSGA-II, counting a network, steps and measurements of
the elastic network, beside plain forms.

    python -m benchmarks.eeea_net               # writes results/bench_eeea_net.json; some minutes on 2 cores
    python -m benchmarks.eeea_net --sizes small --rounds 3

Evaluating networks: every arm is a process of its own that waits for its turn; a step builds, counts, trains and
compares one network, the same networks in every arm, from the same weights, on the same pictures. Ours is a worker of
the search, one thread. "plain" is the loop as the authors' program has it: torch's threads, batches augmented for each
network anew, SGD parameter by parameter, maps channel by channel, torch's convolutions, the large network built to be
counted; "plain with one thread" is the same without the second thread's waiting. "plain at its best" has one thread
too, counts on the meta device, steps with the fused optimiser and keeps channels last. Sums in another order round
otherwise, and steps of this size spread what rounds: no row is written unless the losses of the first steps agree to
1e-3 and the mean errors to 5 points.

A generation: sorting, crowding, survival, tournament, crossover and mutation of 40 networks under three objectives,
with errors that cost nothing; beside pymoo's NSGA2 on as many integer genes.

The elastic network's step: two members of the same draws from the same weights, the largest member's answers,
clipping, SGD. "plain" is once-for-all's program: layers cut to the active member, one backward pass a member, SGD
parameter by parameter. "compiled" is the same with every member's network compiled, all before the clock starts: a
process meets `MEMBERS` members, again and again, where training draws ever new ones and would compile each anew. The
losses of the first steps agree to 1e-3.

Members of a search: extracted, re-calibrated, asked about the validation pictures. "plain" takes one after the other as
once-for-all's program does, each batch norm with the mean and variance of all calibration pictures; equal accuracies,
or no row is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.arms import (
    Pace,
    Step,
    Turns,
    bench_parser,
    faster,
    leaner,
    measure,
    noted,
    parse,
    take_turns,
    where_of,
)
from benchmarks.torch_forms import torchs_convolutions
from common.errors import run_main
from common.ledger import bench_row

POPULATION, GENERATIONS = 40, 15
MOST_APART = 5.0  # points between the arms' mean errors


class Size(NamedTuple):
    channels: int
    layers: int
    side: int
    batch: int
    steps: int


SIZES = {
    "tiny": Size(4, 3, 8, 8, 2),
    "small": Size(8, 3, 16, 64, 40),  # of the claims, at twice their steps
    "medium": Size(16, 5, 32, 64, 20),
}


class ElasticSize(NamedTuple):
    side: int
    batch: int
    pictures: int  # that members are asked about, and half as many that they are calibrated on
    population: int  # members of a turn's measurement


ELASTIC_SIZES = {
    "tiny": ElasticSize(8, 8, 16, 3),
    "small": ElasticSize(16, 64, 600, 12),  # of the claims and the default run
    "medium": ElasticSize(32, 64, 600, 12),
}
MEMBERS = 4  # that a compiled process meets


@dataclass(frozen=True)
class Arm:
    """One process: `side` is "ours", "plain", "single" (plain with one thread) or "best" (the plain loop at its best).

    Of the elastic network it is "ours", "plain" or "compiled".

    Args:
        work: "networks" (evaluated by a search), "step" or "members" (of the elastic network).
    """

    side: str
    size: str
    device: str
    work: str = "networks"


def networks() -> Iterator[Any]:
    """The same random genotypes in every process."""
    from eeea_net.space import Space

    space, random = Space(), np.random.default_rng(0)
    while True:
        yield space.decode(space.draw(random))


def setting_of(size: str, device: str, steps: int = 0) -> Any:
    """What all networks of a size have in common; so many steps, or those of the size."""
    from eeea_net import proxy
    from eeea_net.config import DataConfig, ProxyOptions

    spec = SIZES[size]
    pictures = DataConfig(name="textures", size=spec.side, images=20 * spec.batch, padding=2, validation=0.2)
    shape: dict[str, Any] = {"channels": spec.channels, "layers": spec.layers, "batch_size": spec.batch}
    options = ProxyOptions(**shape, lr=0.1, cutout=4, auxiliary=0.0, steps=steps or spec.steps)
    return proxy.Setting(pictures, options, 0, device)


def check_the_same_beginning(size: str, device: str) -> None:
    """Our convolutions and torch's in both layouts of maps have the losses of the first steps in common.

    Raises:
        RuntimeError: they differ.
    """
    from eeea_net import model, proxy

    setting = setting_of(size, device, steps=2)
    lesson = proxy.Lesson(setting)
    for genotype, _ in zip(networks(), range(3)):
        arguments = (genotype, setting.proxy, lesson, 0, device, True)
        losses = [proxy.train_and_compare(*arguments)["training_loss"]]
        with torchs_convolutions(model):
            for layout in (torch.channels_last, torch.contiguous_format):
                losses.append(proxy.train_and_compare(*arguments, layout)["training_loss"])
        if max(losses) - min(losses) > 1e-3 * min(losses):
            raise RuntimeError(f"{size}: losses of the second step differ: {losses}")


def make_step(arm: Arm) -> Step:
    """Evaluates the next network; returns its validation error."""
    from common.cpu import tune_allocator
    from eeea_net import model, proxy
    from eeea_net.config import NetworkConfig
    from eeea_net.counting import build_on_meta, count, measured
    from eeea_net.data import open_data
    from eeea_net.model import Network

    setting, large = setting_of(arm.size, arm.device), NetworkConfig()
    pictures, options = setting.data, setting.proxy
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
        own, best = proxy.Lesson(setting, data), arm.side == "best"
        layout = torch.channels_last if best else torch.contiguous_format
        with torchs_convolutions(model):
            return torch.tensor(proxy.train_and_compare(genotype, options, own, 0, arm.device, best, layout)["error"])

    return step


def elastic_network(size: str, device: str) -> Any:
    """The elastic network of the default run, the same weights in every process."""
    from dataclasses import replace

    from eeea_net.once_for_all import DESIGNS
    from eeea_net.supernet import Elastic, Supernet

    side = ELASTIC_SIZES[size].side
    torch.manual_seed(0)
    elastic = Elastic((3, 5), (3, 4, 6), (1, 2), tuple(sorted({side - side // 4, side - side // 8, side})))
    return Supernet(elastic, replace(DESIGNS["small"], classes=9)).to(device)


class Sliced:
    """Once-for-all's way to run a member: layers of the largest network, each cut to the active member."""

    def __init__(self, supernet: Any) -> None:
        self.supernet = supernet

    def network(self, choice: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """The member's pass over pictures at its resolution; its gradients reach the elastic network."""
        from torch.nn import functional as F

        from eeea_net.once_for_all import divisible, subnet_blocks

        supernet, largest = self.supernet, self.supernet.largest
        blocks = subnet_blocks(choice.kernels, choice.expands, choice.depths, supernet.design)

        def norm(x: torch.Tensor, of: Any) -> torch.Tensor:
            n = x.shape[1]
            statistics, scale = (of.running_mean[:n], of.running_var[:n]), (of.weight[:n], of.bias[:n])
            return F.batch_norm(x, *statistics, *scale, of.training, of.momentum, of.eps)

        def gate(x: torch.Tensor, of: Any) -> torch.Tensor:
            reduce, expand = of.convolutions()
            n, narrow = x.shape[1], divisible(x.shape[1] // 4)
            y = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), reduce.weight[:narrow, :n], reduce.bias[:narrow]))
            return x * F.hardsigmoid(F.conv2d(y, expand.weight[:n, :narrow], expand.bias[:n]))

        def cut(x: torch.Tensor, layer: Any, place: int, outputs: int, kernel: int) -> torch.Tensor:
            groups = outputs if layer.conv.groups > 1 else 1
            weight = layer.conv.weight
            if groups > 1 and place:
                weight = supernet._kernel(weight, place, kernel)
            weight = weight[:outputs, : weight.shape[1] if groups > 1 else x.shape[1]].contiguous()
            x = F.conv2d(x, weight, None, layer.conv.stride, weight.shape[-1] // 2, groups=groups)
            x = norm(x, layer.bn)
            x = layer.act(x) if layer.act is not None else x
            return gate(x, layer.se) if layer.se is not None else x

        def run(x: torch.Tensor) -> torch.Tensor:
            x = largest.first_conv(x)
            for number, block in enumerate(blocks):
                place = supernet.place(choice, number)
                layers, y = largest.blocks[place].layers(), x
                for layer in layers:
                    last = layer is layers[-1]
                    y = cut(y, layer, place, block.out_channels if last else block.middle, block.kernel_size)
                x = x + y if block.shortcut else y
            return largest.answers(largest.final_expand_layer(x))

        return run


def elastic_step(arm: Arm) -> Step:
    """A step of the last phase of progressive shrinking; returns its loss."""
    from torch import nn
    from torch.nn import functional as F

    from common.cpu import tune_allocator
    from eeea_net.supernet import recalibrate, resized

    spec, members = ELASTIC_SIZES[arm.size], 2
    supernet = elastic_network(arm.size, arm.device).train()
    weights, random = list(supernet.parameters()), np.random.default_rng(0)
    choices = [supernet.elastic.draw(supernet.stages, random) for _ in range(MEMBERS)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(spec.batch, 3, spec.side, spec.side, generator=generator).to(arm.device)
    y = torch.randint(0, 9, (spec.batch,), generator=generator).to(arm.device)
    optimiser = torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=3e-4)
    teacher, ours = recalibrate(supernet.extract(supernet.full), [x]), arm.side == "ours"
    if ours:
        tune_allocator()
        passes: list[Callable[[torch.Tensor], torch.Tensor]] = [partial(supernet, choice=choice) for choice in choices]
    else:
        passes = [Sliced(supernet).network(choice) for choice in choices]
    ask: Callable[[torch.Tensor], torch.Tensor] = teacher
    if arm.side == "compiled":
        passes = [torch.compile(one, dynamic=False) for one in passes]
        ask = torch.compile(teacher, dynamic=False)

    def pictures(side: int) -> torch.Tensor:
        if ours or x.shape[-1] == side:
            return resized(x, side) if ours else x
        return F.interpolate(x, (side, side), mode="bilinear", antialias=True)

    def step(index: int) -> torch.Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            answers = ask(pictures(spec.side)).softmax(-1)
        total = torch.zeros((), device=arm.device)
        for number in range(members):
            chosen = (index * members + number) % MEMBERS
            logits = passes[chosen](x if ours else pictures(choices[chosen].resolution))
            loss = (F.cross_entropy(logits, y) + F.cross_entropy(logits, answers)) / members
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(weights, 5.0, foreach=ours)
        optimiser.step()
        return total

    return step


def members_step(arm: Arm) -> Step:
    """Measures `population` members; returns the sum of their errors, weighted by their numbers."""
    from torch import nn

    from common.cpu import tune_allocator
    from eeea_net.supernet import Population, resized

    spec = ELASTIC_SIZES[arm.size]
    supernet = elastic_network(arm.size, arm.device).eval()
    generator = torch.Generator().manual_seed(1)
    shape = (3, spec.side, spec.side)
    calibration = torch.randn(spec.pictures // 2, *shape, generator=generator).to(arm.device)
    asked = torch.randn(spec.pictures, *shape, generator=generator).to(arm.device).split(250)
    truth = torch.randint(0, 9, (spec.pictures,), generator=generator).to(arm.device)
    random = np.random.default_rng(2)
    if arm.side == "ours":
        tune_allocator()

    def plain(choice: Any) -> torch.Tensor:
        network = supernet.extract(choice).eval()

        def statistics(norm: nn.BatchNorm2d) -> Callable[[Any, tuple[torch.Tensor]], None]:
            def before(_: Any, given: tuple[torch.Tensor]) -> None:
                variance, mean = torch.var_mean(given[0], (0, 2, 3), correction=0)
                norm.running_mean.copy_(mean)  # type: ignore[union-attr]
                norm.running_var.copy_(variance)  # type: ignore[union-attr]

            return before

        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(statistics(norm)) for norm in norms]

        def at(x: torch.Tensor) -> torch.Tensor:
            return resized(x, choice.resolution).contiguous()

        network(at(calibration))
        for hook in hooks:
            hook.remove()
        return torch.cat([network(at(x)) for x in asked])

    @torch.no_grad()
    def step(index: int) -> torch.Tensor:
        choices = [supernet.elastic.draw(supernet.stages, random) for _ in range(spec.population)]
        errors = torch.zeros(len(choices))
        if arm.side == "ours":
            for number, logits in Population(supernet, calibration, list(asked)).logits(choices):
                errors[number] = (torch.cat(logits).argmax(1) != truth).float().mean()
        else:
            for number, choice in enumerate(choices):
                errors[number] = (plain(choice).argmax(1) != truth).float().mean()
        return (errors * torch.arange(1, len(choices) + 1)).sum()

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
    arms = {side: Arm(side, size, device) for side in ("ours", "plain", "single", "best")}
    check_the_same_beginning(size, device)
    found = take_turns("benchmarks.eeea_net", arms, pace, 1, folder)
    errors = {side: 100 * float(np.mean(timing.losses)) for side, timing in found.items()}
    if max(errors.values()) - min(errors.values()) > MOST_APART:
        raise RuntimeError(f"{size}: mean errors differ: {errors}")
    what = f"{size}: C={spec.channels}, {spec.layers} cells, {spec.side} px, {spec.steps} steps of {spec.batch}"
    where = where_of(device)
    peers = (
        ("plain", "the plain loop", 2.0),
        ("single", "the plain loop with one thread", 2.0),
        ("best", "the plain loop at its best", None),
    )
    for side, label, target in peers:
        name = f"{where}networks built, counted, trained and compared against {label} ({what})"
        row = bench_row(name, 1 / found["ours"].cpu, 1 / found[side].cpu, "networks/CPU-s", target=target)
        told = f"mean errors {errors['ours']:.1f} and {errors[side]:.1f} %"
        yield noted(row, f"the same networks, weights and pictures; {told}")
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


def elastic_rows(size: str, device: str, folder: Path, pace: Pace) -> Iterator[dict[str, Any]]:
    """The elastic network's rows of one size.

    Raises:
        RuntimeError: both sides' losses or errors differ.
    """
    spec, where = ELASTIC_SIZES[size], where_of(device)
    sides = ("ours", "plain", "compiled")
    # Both of a step's members, and the compiled passes of all, are met before the clock starts.
    pace = pace._replace(steps=MEMBERS * pace.steps)
    found = take_turns(
        "benchmarks.eeea_net", {side: Arm(side, size, device, "step") for side in sides}, pace, MEMBERS, folder
    )
    for side in sides[1:]:
        if not np.allclose(found["ours"].losses, found[side].losses, rtol=1e-3):
            raise RuntimeError(f"{size}: losses differ: {found['ours'].losses} and {side} {found[side].losses}")
    what = f"{size}: {spec.side} px, 2 members, batch {spec.batch}"
    for side, label in (("plain", "the plain loop"), ("compiled", "the plain loop compiled")):
        name = f"{where}training step of the elastic network against {label} ({what})"
        note = "float32 both; the same members, weights and pictures; equal losses"
        yield faster(name, found["ours"], found[side], spec.batch, 1.2, note)
        name = f"{where}memory of the elastic network's step against {label} ({what})"
        yield leaner(name, found["ours"], found[side], device)
    pace = pace._replace(steps=1)
    arms = {side: Arm(side, size, device, "members") for side in sides[:2]}
    found = take_turns("benchmarks.eeea_net", arms, pace, 1, folder)
    if found["ours"].losses != found["plain"].losses:
        raise RuntimeError(f"{size}: errors differ: {found['ours'].losses} and {found['plain'].losses}")
    members = spec.population
    name = f"{where}members re-calibrated and measured against one by one ({size}: {spec.pictures} pictures)"
    ours, plain = found["ours"].cpu, found["plain"].cpu
    row = bench_row(name, members / ours, members / plain, "members/CPU-s", target=1.5)
    yield noted(row, f"{members} random members at once; equal accuracies")


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """All rows of one size, written part by part."""
    yield list(rows_of(size, device, folder, pace))
    yield list(elastic_rows(size, device, folder, pace))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(bench_parser(__doc__, "bench_eeea_net.json", SIZES, ["small", "medium"], steps=2), argv)
    if options.arm:
        arm = Arm(**options.arm)
        if arm.work == "networks" and arm.side != "plain":
            torch.set_num_threads(1)
        made = {"networks": make_step, "step": elastic_step, "members": members_step}
        Turns(arm.device).serve(made[arm.work](arm))
        return []
    return measure(options, parts)


if __name__ == "__main__":
    run_main(main)
