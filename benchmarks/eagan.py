"""EAGAN's steps and evaluations beside the plain form and a library's metrics.

    python -m benchmarks.eagan                         # writes results/bench_eagan.json; some ten minutes on 2 cores
    python -m benchmarks.eagan --sizes tiny --rounds 2
    python -m benchmarks.eagan --sizes cifar --devices cuda

Every arm is a process of its own that waits for its turn, so that arms alternate and each has its own peak memory. A
step is one of the discriminator and one of the generator, on the same weights, genotypes, pictures and z; images are
the real ones of a step. "ours" is what the search and the training do: a resize after the 1x1 convolution that commutes
with it, one 4x4 convolution for the first 3x3 one and its mean of 2x2, generated pictures without a graph in the
discriminator's step, no gradients of the discriminator's weights in the generator's. "peer" is the form that is written
in the paper and its code, on the same modules; "peer compiled" is that through torch.compile. Losses are compared
before the clock counts.

A population is evaluated in this process: ours keeps the real features and takes generated ones once for both scores;
torchmetrics takes them once for each of its metrics, with the same classifier, one generator after the other.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.arms import (
    Pace,
    Step,
    Timing,
    Turns,
    bench_parser,
    faster,
    in_both_precisions,
    leaner,
    measure,
    mixed,
    noted,
    parse,
    take_turns,
    where_of,
)
from common.cpu import tune_allocator
from common.errors import run_main
from common.ledger import bench_row
from common.weights import save_weights
from eagan.config import GameOptions, NetworkConfig
from eagan.genotypes import GENERATOR, PUBLISHED
from eagan.judge import Classifier, ClassJudge
from eagan.losses import discriminator_loss, generator_loss
from eagan.measuring import draw, latents, score_features
from eagan.model import Discriminator, Generator, inherit, write_out
from eagan.training import Game, adam, placed

STEP_SPEEDUP, EVALUATION_SPEEDUP = 1.3, 1.5
LOSSES_AGREE, SCORES_AGREE = 1e-3, 1e-4  # relative; losses after steps of float32
LR = 2e-4


class Size(NamedTuple):
    network: NetworkConfig
    real: int  # pictures of a discriminator step
    fake: int  # of a generator step
    population: int
    images: int  # of each individual


SIZES = {
    "tiny": Size(NetworkConfig(8, 8, 12, 2), 4, 4, 2, 40),
    "small": Size(NetworkConfig(24, 24, 60, 4), 32, 32, 6, 200),
    "cifar": Size(NetworkConfig(), 40, 80, 8, 1000),
}


@dataclass(frozen=True)
class Arm:
    """One process: `side` is "ours" or "peer", `what` a step of the search or of the full training.

    Args:
        last: the peer's maps have channels last, as ours always have.
    """

    side: str
    size: str
    what: str
    device: str
    bf16: bool = False
    compiled: bool = False
    last: bool = False


class Pictures:
    """The same random pictures for both sides, in place of a data set."""

    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(1)
        side = size.network.side
        self.images = torch.rand(size.real, 3, side, side, generator=generator) * 2 - 1

    def batch(self, step: int) -> Tensor:
        return self.images


def networks(arm: Arm) -> tuple[Generator, Discriminator, list[Any]]:
    """(generator, discriminator, the genotypes of the first steps): supernets for a step of the search."""
    torch.manual_seed(0)
    config, search = SIZES[arm.size].network, arm.what == "search"
    generator = Generator(config, None if search else PUBLISHED["best_G"])
    discriminator = Discriminator(config, PUBLISHED["base_D"])
    random = Random(0)
    genes = [GENERATOR.sample(random) if search else None for _ in range(16)]
    return generator, discriminator, genes


def ours(arm: Arm) -> Step:
    """What `eagan.searching` and `eagan.retraining` do in a step."""
    size, device = SIZES[arm.size], torch.device(arm.device)
    generator, discriminator, genes = networks(arm)
    generator, discriminator = placed(generator, device, arm.bf16), placed(discriminator, device, arm.bf16)
    options = GameOptions(size.real, size.fake)
    game = Game(options, Pictures(size), size.network.latent_dim, 0, device, arm.bf16)  # type: ignore[arg-type]
    g_optimiser, d_optimiser = adam(generator, LR), adam(discriminator, LR)

    def step(index: int) -> Tensor:
        own = genes[index % len(genes)]
        loss = game.discriminator_step(index, generator, discriminator, d_optimiser, own)
        game.generator_step(index, generator, discriminator, g_optimiser, own)
        return torch.tensor(loss)

    return step


def peer(arm: Arm) -> Step:
    """The same step as the paper and its code write it."""
    size, device = SIZES[arm.size], torch.device(arm.device)
    generator, discriminator, genes = networks(arm)
    layout = torch.channels_last if arm.last else torch.contiguous_format
    for network in (generator, discriminator):
        write_out(network).to(device, memory_format=layout)  # type: ignore[call-overload]
    g: Any = torch.compile(generator) if arm.compiled else generator
    d: Any = torch.compile(discriminator) if arm.compiled else discriminator
    options = GameOptions(size.real, size.fake)
    game = Game(options, Pictures(size), size.network.latent_dim, 0, device, arm.bf16)  # type: ignore[arg-type]
    optimisers = adam(generator, LR), adam(discriminator, LR)

    def step(index: int) -> Tensor:
        own = genes[index % len(genes)]
        real, z_d, z_g = game.drawn(index)
        generator.train()
        discriminator.train()
        optimisers[1].zero_grad()
        with mixed(arm.device, arm.bf16):
            fake = g(z_d, own).detach()
            # Compiled, the spectral norm's vectors must not move again before the backward pass: one call for both.
            scores = d(torch.cat([real, fake])).split(len(real)) if arm.compiled else (d(real), d(fake))
            loss = discriminator_loss(scores[0].float(), scores[1].float())
        loss.backward()
        optimisers[1].step()
        optimisers[0].zero_grad()
        with mixed(arm.device, arm.bf16):
            g_loss = generator_loss(d(g(z_g, own)).float())
        g_loss.backward()
        optimisers[0].step()
        return loss.detach()

    return step


def agree(found: dict[str, Timing]) -> None:
    """Both sides computed the same.

    Raises:
        RuntimeError: their first losses in float32 differ.
    """
    a, b = found["ours fp32"].losses[0], found["peer fp32"].losses[0]
    if not abs(a - b) <= LOSSES_AGREE * max(1.0, abs(b)):
        raise RuntimeError(f"the first losses differ: {a} and {b}")


def step_rows(size: str, device: str, folder: Path, pace: Pace) -> Iterator[dict[str, Any]]:
    """Speed and memory of a step of the search and of the full training."""
    spec, where = SIZES[size], where_of(device)
    for what in ("search", "training"):
        arms = {
            name: arm
            for name, arm in in_both_precisions(Arm("ours", size, what, device), compiled=(), peak=False).items()
            if not arm.bf16 or device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        }
        arms["peer last"] = replace(arms["peer fp32"], last=True)
        if what == "training" and size != "tiny":  # a compiled supernet would be compiled for every genotype
            arms["peer compiled"] = replace(arms["peer last"], compiled=True)
        found = take_turns("benchmarks.eagan", arms, pace, 2, folder)
        agree(found)
        config = spec.network
        about = f"{size}: {config.gf_dim}/{config.df_dim} channels, {config.side} px, batch {spec.real}/{spec.fake}"
        label = "search step of the supernet" if what == "search" else "full-training step of the published pair"
        note = "one discriminator and one generator step; same weights, genotypes, pictures and z"
        for precision in ("fp32", "bf16"):
            if f"ours {precision}" not in found:
                continue
            name = f"{where}{label}, both {precision} ({about})"
            yield faster(name, found[f"ours {precision}"], found[f"peer {precision}"], spec.real, STEP_SPEEDUP, note)
        for peer, told in (("peer last", "peer with channels last"), ("peer compiled", "peer compiled, channels last")):
            if peer in found:
                name = f"{where}{label}, fp32, ours eager against {told} ({about})"
                yield faster(name, found["ours fp32"], found[peer], spec.real, None, note)
        yield leaner(
            f"{where}memory of the {label}, both fp32 ({about})", found["ours fp32"], found["peer fp32"], device
        )


def evaluation_row(size: str, device: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A population's pictures, features, IS and FID: ours at once, torchmetrics one generator after the other.

    Raises:
        RuntimeError: their numbers differ.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore

    spec = SIZES[size]
    torch.manual_seed(0)
    net = Classifier(9)
    path = folder / "judge.safetensors"
    notes = {"classes": json.dumps([str(k) for k in range(9)]), "side": str(spec.network.side), "accuracy": "0"}
    save_weights(path, net.state_dict(), notes)
    judge = ClassJudge(path, device)
    generators = []
    supernet = Generator(spec.network).state_dict()
    for seed in range(spec.population):
        generators.append(Generator(spec.network, GENERATOR.sample(Random(seed))))
        inherit(generators[-1], supernet)
        generators[-1].to(device)
    ours = [placed(copy.deepcopy(generator), torch.device(device)) for generator in generators]
    z_NZ = latents(spec.images, spec.network.latent_dim)
    real = torch.randint(0, 256, (spec.images, 3, spec.network.side, spec.network.side), dtype=torch.uint8)
    real_ND = judge(real)

    class Features(nn.Module):
        """What torchmetrics wants of a feature network."""

        num_features = judge.dim

        def __init__(self, logits: bool) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, images: Tensor) -> Tensor:
            found = judge(images)
            return judge.logits(found) if self.logits else found

    def at_once() -> list[tuple[float, float]]:
        found = []
        for generator in ours:
            features_ND = judge(draw(generator, z_NZ, "genotype", 100))
            scores = score_features(features_ND, real_ND, judge, 1, "genotype")
            found.append((scores.inception_score, scores.fid))
        return found

    def one_by_one() -> list[tuple[float, float]]:
        found = []
        for generator in generators:
            fid = FrechetInceptionDistance(feature=Features(logits=False)).set_dtype(torch.float64)
            score = InceptionScore(feature=Features(logits=True), splits=1)
            images = draw(generator, z_NZ, "genotype", 100)
            for part in real.split(100):
                fid.update(part, real=True)
            for part in images.split(100):
                fid.update(part, real=False)
                score.update(part)
            found.append((float(score.compute()[0]), float(fid.compute())))
        return found

    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _, (name, work) in itertools.product(range(rounds + 1), {"ours": at_once, "peer": one_by_one}.items()):
        started = time.perf_counter()
        found = work()
        times[name].append(time.perf_counter() - started)
        if name == "ours":
            first = found
    for ours_pair, peer_pair in zip(first, found):
        for mine, theirs in zip(ours_pair, peer_pair):
            if not abs(mine - theirs) <= SCORES_AGREE * max(1.0, abs(theirs)):
                raise RuntimeError(f"scores differ: {first} and {found}")
    ours_s, peer_s = (statistics.median(times[name][1:]) for name in ("ours", "peer"))
    name = f"{where_of(device)}evaluation of {spec.population} generators, {spec.images} pictures each ({size})"
    row = bench_row(name, spec.population / ours_s, spec.population / peer_s, "generators/s", target=EVALUATION_SPEEDUP)
    return noted(row, "IS and FID equal to 1e-4; against torchmetrics with the same classifier")


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a size."""
    yield list(step_rows(size, device, folder, pace))
    yield [evaluation_row(size, device, folder, pace.rounds)]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(bench_parser(__doc__, "bench_eagan.json", SIZES, ["small"], steps=3), argv)
    if options.arm:
        arm = Arm(**options.arm)
        tune_allocator()
        Turns(arm.device).serve(ours(arm) if arm.side == "ours" else peer(arm))
        return []
    return measure(options, parts)


if __name__ == "__main__":
    run_main(main)
