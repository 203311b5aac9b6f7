"""The evolution (algorithm 1): warm-up by uniform sampling, then rounds of training, evaluation and selection.

One class plays all of the paper's parts, by what is searched:

    generator (stage 1)      many generators in one supernet against one discriminator: many-to-one
    discriminator (stage 2)  many discriminators in one supernet, each with its own copy of one generator: one-to-one
    both                     the coupled baseline of section 5.3: pairs from two supernets

Stage 2's bookkeeping: every pair has a generator and an optimiser of its own. The weights of a survivor move with it; a
child starts with a copy of its parent's; with weight resetting all take the best pair's weights and optimiser.

Shape suffixes: N individuals.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from common.data.sampling import derive_seed
from common.errors import UserError, stop_if_not_finite
from common.files import write_json
from common.jobs import Job, run_jobs
from common.options import RunOptions
from common.training import LAST_CHECKPOINT
from common.weights import save_weights
from eagan.config import EvaluationConfig, NetworkConfig, SearchOptions, StageOptions
from eagan.data import Real, RealBatches
from eagan.figures import draw_fronts, draw_rounds, draw_sheet
from eagan.genotypes import DISCRIMINATOR, GENERATOR, Genes, breed, fresh
from eagan.judge import open_judge
from eagan.measuring import Reference
from eagan.model import Discriminator, Generator, SimpleDiscriminator, inherit, sizes
from eagan.selection import FAILED, Fitness, best, select
from eagan.training import STREAMS, AnyDiscriminator, Diverged, Game, Loop, adam, flat_tensors, placed

Searched = Literal["generator", "discriminator", "both"]


@dataclass
class Individual:
    """A generator, a discriminator or a pair that lives in a population.

    Args:
        generator, discriminator: their genes; None for the one that is not searched.
        parent: position in the population before, of which it is a changed copy; None for a sample.
        failed: it diverged and is trained no more.
    """

    generator: Genes | None
    discriminator: Genes | None
    parent: int | None = None
    failed: bool = False

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Individual:
        """From `asdict`, whose tuples a file may have made lists."""

        def genes(name: str) -> Genes | None:
            return None if content[name] is None else tuple(tuple(cell) for cell in content[name])

        return cls(genes("generator"), genes("discriminator"), content["parent"], content["failed"])


@dataclass(frozen=True)
class Found:
    """What a stage hands on: the genes of the best individual, and the weights that it came to."""

    generator: Genes | None
    discriminator: Genes | None
    weights: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Judging:
    """Where the features of real pictures lie, and what judges."""

    judge: str
    reference: Path


class Search(Loop):
    """One stage; `run` finishes it, from wherever it was interrupted.

    Args:
        searched: which of the two networks (or both) is a supernet.
        generator, discriminator: the other one, with the weights that it starts with; a supernet for those searched.
    """

    kind = "search"

    def __init__(
        self,
        searched: Searched,
        stage: StageOptions,
        options: SearchOptions,
        network: NetworkConfig,
        evaluation: EvaluationConfig,
        judging: Judging,
        real: Real,
        folder: Path,
        generator: Generator,
        discriminator: AnyDiscriminator,
        seed: int,
        run: RunOptions,
        device: torch.device,
        bf16: bool = False,
    ) -> None:
        super().__init__(folder, stage.warmup_steps + stage.rounds * stage.round_steps, run, device)
        self.searched, self.stage, self.options, self.network = searched, stage, options, network
        self.evaluation, self.judging, self.seed = evaluation, judging, seed
        batches = RealBatches(real.train, stage.batch_real, self.total, derive_seed(seed, STREAMS["real"]))
        self.game = Game(stage, batches, network.latent_dim, seed, device, bf16)
        self.generator = placed(generator, device, bf16)
        self.discriminator = placed(discriminator, device, bf16)
        self.optimisers = {"generator": adam(generator, stage.lr_g), "discriminator": adam(discriminator, stage.lr_d)}
        self.population: list[Individual] = []
        # Stage 2: a generator and its optimiser for every individual.
        self.pairs: list[tuple[Generator, torch.optim.Adam]] = []
        self.seen: dict[str, set[Genes]] = {"generator": set(), "discriminator": set()}
        self.history: list[dict[str, Any]] = []

    # Steps ------------------------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """That the next step belongs to; -1 while warming up."""
        return (self.step - self.stage.warmup_steps) // self.stage.round_steps

    def _random(self, stream: str, number: int) -> Random:
        return Random(derive_seed(self.seed, STREAMS[stream], number))

    def _sampled(self, random: Random) -> Individual:
        """Architectures that were never drawn before."""
        made: dict[str, Genes | None] = {"generator": None, "discriminator": None}
        for name, space in (("generator", GENERATOR), ("discriminator", DISCRIMINATOR)):
            if self.searched in (name, "both"):
                made[name] = genes = fresh(space, random, self.seen[name])
                self.seen[name].add(genes)
        return Individual(made["generator"], made["discriminator"])

    def _one_step(self) -> None:
        random = self._random("individual", self.step)
        if self.step < self.stage.warmup_steps:
            individual, position = self._sampled(random), None
        else:
            if not self.population:
                self._begin()
            alive = [i for i, one in enumerate(self.population) if not one.failed]
            position = random.choice(alive)
            individual = self.population[position]
        generator, optimiser = self.generator, self.optimisers["generator"]
        if position is not None and self.pairs:
            generator, optimiser = self.pairs[position]
        genes = (individual.generator, individual.discriminator)
        row: dict[str, Any] = {"round": self.round, "individual": "" if position is None else position}
        try:
            d_optimiser = self.optimisers["discriminator"]
            row["d_loss"] = self.game.discriminator_step(self.step, generator, self.discriminator, d_optimiser, *genes)
            if (self.step + 1) % self.stage.d_steps == 0:
                found = self.game.generator_step(self.step, generator, self.discriminator, optimiser, *genes)
                row["g_loss"], row["g_norm"] = found
        except Diverged:
            # It alone dies: its step was not made, and the weights that it shares are as they were.
            if position is None:
                row["d_loss"] = float("nan")
            else:
                individual.failed = True
            if position is None or all(one.failed for one in self.population):
                last = self.folder / LAST_CHECKPOINT
                stop_if_not_finite(
                    float("nan"), self.step + 1, last, advice="lower rates", what=f"{self.folder.name} loss"
                )
        self.log(**row)

    def _begin(self) -> None:
        """The first population; in stage 2 every individual gets a copy of the generator, warmed up."""
        random = self._random("start", 0)
        self.population = [self._sampled(random) for _ in range(self.options.population)]
        if self.searched == "discriminator":
            self.pairs = [self._copied(self.generator, self.optimisers["generator"]) for _ in self.population]

    def _copied(self, generator: Generator, optimiser: torch.optim.Adam) -> tuple[Generator, torch.optim.Adam]:
        """A generator and its optimiser with memory of their own."""
        own = copy.deepcopy(generator)
        fresh_optimiser = adam(own, self.stage.lr_g)
        fresh_optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        return own, fresh_optimiser

    # Rounds -----------------------------------------------------------------------------------------------------------

    @property
    def _at_a_rounds_end(self) -> bool:
        done = self.step - self.stage.warmup_steps
        return done > 0 and done % self.stage.round_steps == 0

    def _after_step(self) -> None:
        if self._at_a_rounds_end:
            self.save()  # a process that is killed while it evaluates has not lost the round
            self._end_round(self.round - 1)
            self.save()

    def _open(self) -> None:
        super()._open()
        if self._at_a_rounds_end and all(row["round"] != self.round - 1 for row in self.history):
            self._end_round(self.round - 1)  # it was killed there
            self.save()

    def _end_round(self, number: int) -> None:
        """Evaluate everybody, keep half, and fill up with children."""
        found = self._evaluate()
        fitness = [self._fitness(one, scores) for one, scores in zip(self.population, found)]
        random = self._random("round", number)
        kept = select(fitness, max(1, len(fitness) // 2), self.options.selection, random)
        first = best(fitness)
        if fitness[first].failed:
            raise UserError(f"{self.folder.name}: every individual of round {number} has failed: try lower rates")
        self._record(number, found, fitness, kept, first)
        if number + 1 < self.stage.rounds:
            self._breed(kept, first, random)

    def _fitness(self, individual: Individual, scores: Mapping[str, Any]) -> Fitness:
        if "failed_because" in scores:
            return FAILED
        parameters = sizes(self.network, generator=individual.generator, discriminator=individual.discriminator)
        # A judge without classes has no IS: one number for everybody decides nothing.
        has_classes = scores["inception_score"] == scores["inception_score"]
        return Fitness(scores["inception_score"] if has_classes else 1.0, scores["fid"], parameters)

    def _evaluate(self) -> list[dict[str, Any]]:
        """The scores of every individual's generator, by independent jobs."""
        folder = (self.folder / "evaluated").absolute()
        weights = folder / "generators.safetensors"
        networks = [pair[0].state_dict() for pair in self.pairs] or [self.generator.state_dict()]
        save_weights(weights, flat_tensors({"g": networks}))
        evaluation = self.evaluation
        common = {
            "weights": str(weights),
            "supernet": self.generator.genotype is None,
            "network": asdict(self.network),
            "reference": str(self.judging.reference),
            "judge": self.judging.judge,
            "images": evaluation.images,
            "splits": evaluation.splits,
            "batch_norm": evaluation.batch_norm,
            "batch_size": evaluation.batch_size,
            "sheet": evaluation.sheet,
            "device": str(self.device),
        }
        jobs, numbers = [], [n for n, one in enumerate(self.population) if not one.failed]
        for n in numbers:
            own = {
                "prefix": f"g{n if self.pairs else 0}.",
                "genes": self.population[n].generator or self.generator.genotype,
                "strip": str(folder / f"{n}.png"),
            }
            jobs.append(Job("eagan.measuring.measure_individual", common | own))
        found: list[dict[str, Any]] = [{"failed_because": "a loss or gradient was not finite"} for _ in self.population]
        for number, scores in run_jobs(jobs, evaluation.engine, evaluation.workers):
            found[numbers[number]] = scores
        return found

    def _record(
        self,
        number: int,
        found: Sequence[Mapping[str, Any]],
        fitness: Sequence[Fitness],
        kept: Sequence[int],
        first: int,
    ) -> None:
        """Write down the round: everybody's genes, parents and scores, and a sheet of samples."""
        rows = [
            {**asdict(one), **scores, "size": f.parameters, "kept": i in kept, "best": i == first}
            for i, (one, scores, f) in enumerate(zip(self.population, found, fitness))
        ]
        alive = [f for f in fitness if not f.failed]
        self.history.append(
            {
                "round": number,
                "step": self.step,
                "fid_mean": fmean(f.fid for f in alive),
                "fid_best": fitness[first].fid,
                "inception_score_mean": fmean(f.inception_score for f in alive),
                "size_median": median(f.parameters for f in alive),
                "best": first,
                "failed": len(fitness) - len(alive),
                "seconds": self.clock.seconds,
                "cpu_seconds": self.clock.cpu_seconds,
            }
        )
        if self.run_options.progress:
            row = self.history[-1]
            print(
                f"{self.folder.name}, round {number}: mean FID {row['fid_mean']:.4g}, best {row['fid_best']:.4g}; "
                f"{row['failed']} failed; {row['seconds']:.0f} s",
                file=sys.stderr,
            )
        folder = self.folder / "rounds"
        write_json(folder / f"{number:02d}.json", {"round": number, "individuals": rows})
        draw_sheet(self.folder / "evaluated", rows, folder / f"{number:02d}.png")

    def _breed(self, kept: Sequence[int], first: int, random: Random) -> None:
        """The next population: the kept ones, then children that were never there before (section 4.3)."""
        before, pairs = self.population, self.pairs
        parents = [before[i] for i in kept]
        following = [Individual(one.generator, one.discriminator, i, one.failed) for i, one in zip(kept, parents)]
        while len(following) < self.options.population:
            made: dict[str, Genes | None] = {"generator": None, "discriminator": None}
            origin: int | None = None
            for name, space in (("generator", GENERATOR), ("discriminator", DISCRIMINATOR)):
                if self.searched not in (name, "both"):
                    continue
                genes = [getattr(one, name) for one in parents]
                chances = (self.options.crossover, self.options.mutation)
                child, parent = breed(space, genes, random, self.seen[name], *chances)
                self.seen[name].add(child)
                made[name] = child
                origin = kept[parent] if parent is not None else origin
            following.append(Individual(made["generator"], made["discriminator"], origin))
        self.population = following
        if pairs:
            reset = self.options.weight_resetting
            origins = [first if reset or one.parent is None else one.parent for one in following]
            self.pairs = [self._copied(*pairs[origin]) for origin in origins]
            if reset:
                for one in following:
                    one.failed = False
            self.history[-1]["spread"] = self._spread()

    def _spread(self) -> float:
        """How far apart the pairs' generators are: the largest difference of a weight from the first pair's."""
        first = dict(self.pairs[0][0].named_parameters())
        every = (pair for generator, _ in self.pairs for pair in generator.named_parameters())
        return max(float((parameter - first[name]).detach().abs().max()) for name, parameter in every)

    # Results ----------------------------------------------------------------------------------------------------------

    def run(self) -> Found:
        """Search to the end; the rounds stay in `rounds/` and `history.json`, with drawings."""
        self.train()
        position = int(self.history[-1]["best"])
        winner = self.population[position]
        generator = self.pairs[position][0] if self.pairs else self.generator
        weights: dict[str, dict[str, Tensor]] = {}
        for name, network, genes in (
            ("generator", generator, winner.generator),
            ("discriminator", self.discriminator, winner.discriminator),
        ):
            if genes is not None:
                alone = (Generator if name == "generator" else Discriminator)(self.network, genes)
                inherit(alone, network.state_dict())
                weights[name] = alone.state_dict()
            else:
                weights[name] = network.state_dict()
        if not (self.folder / "history.json").is_file():
            self._conclude()
        return Found(
            winner.generator or self.generator.genotype, winner.discriminator or self.discriminator.genotype, weights
        )

    def _conclude(self) -> None:
        """Draw the stage, and write its rounds beside the distance of real pictures to real ones; this ends it."""
        judge, evaluation = open_judge(self.judging.judge), self.evaluation
        floor = Reference(self.judging.reference).floor(judge, evaluation.splits, evaluation.images)
        draw_fronts(self.folder / "rounds", self.folder / "fronts.png")
        draw_rounds(self.history, floor.fid, self.folder / "rounds.png", self.folder.name)
        shutil.rmtree(self.folder / "evaluated", ignore_errors=True)
        write_json(self.folder / "history.json", {"rounds": self.history, "floor": asdict(floor)})

    def _state(self) -> dict[str, Any]:
        networks: dict[str, Any] = {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "pairs": [pair[0].state_dict() for pair in self.pairs],
        }
        return {
            "networks": networks,
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "pair_optimisers": [pair[1].state_dict() for pair in self.pairs],
            "population": [asdict(one) for one in self.population],
            "seen": {name: sorted(genes) for name, genes in self.seen.items()},
            "history": self.history,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.generator.load_state_dict(state["networks"]["generator"])
        self.discriminator.load_state_dict(state["networks"]["discriminator"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.population = [Individual.of(content) for content in state["population"]]
        self.pairs = []
        for weights, moments in zip(state["networks"]["pairs"], state["pair_optimisers"]):
            generator, optimiser = self._copied(self.generator, self.optimisers["generator"])
            generator.load_state_dict(weights)
            optimiser.load_state_dict(moments)
            self.pairs.append((generator, optimiser))
        self.seen = {name: {tuple(map(tuple, genes)) for genes in found} for name, found in state["seen"].items()}
        self.history = list(state["history"])


def new_discriminator(network: NetworkConfig, genes: Genes | None) -> AnyDiscriminator:
    """Alone with its genes, or the simple one."""
    return SimpleDiscriminator(network) if genes is None else Discriminator(network, genes)
