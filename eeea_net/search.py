"""A whole search on disk: generations, evaluations and the Pareto front, which a killed search goes on from exactly.

`evaluations.json` holds every network that was trained, by the key of its chromosome, and is written after each;
`generations/NNN.json` a finished generation. What a generation draws depends on its number and on those before it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.evolution import fronts as fronts_of
from common.evolution import generation_random, hypervolume, spread
from common.files import read_object, reading, write_json
from common.jobs import Engine, run_jobs
from common.stopping import Steps
from eeea_net.config import EvolutionOptions, LargeOptions, NetworkConfig
from eeea_net.counting import Counts, count
from eeea_net.evolution import Member, first_generation, is_small_enough, next_generation
from eeea_net.genotypes import Genotype
from eeea_net.proxy import Setting
from eeea_net.space import Chromosome, Space

NetworkMember = Member[Chromosome]
REFERENCE_DRAWS = 200  # random networks whose sizes bound the hypervolume


@dataclass
class Scale:
    """What chromosomes are measured by beside their error: the large network (objectives 2 and 3, and beta)."""

    space: Space
    large: LargeOptions

    def __post_init__(self) -> None:
        self.network = NetworkConfig(self.large.channels, self.large.layers, classes=self.large.classes)
        self._known: dict[Chromosome, Counts] = {}

    def counts(self, chromosome: Chromosome) -> Counts:
        if chromosome not in self._known:
            self._known[chromosome] = count(self.space.decode(chromosome), self.network, self.large.size)
        return self._known[chromosome]

    def parameters(self, chromosome: Chromosome, official: bool = False) -> float:
        """In millions; as the authors' program counts them where asked for."""
        counts = self.counts(chromosome)
        return (counts.official_parameters if official else counts.parameters) / 1e6

    def objectives(self, chromosome: Chromosome, error: float) -> tuple[float, float, float]:
        """(error, parameters in millions, MACs in millions)."""
        counts = self.counts(chromosome)
        return error, counts.parameters / 1e6, counts.macs / 1e6

    @cached_property
    def reference(self) -> tuple[float, float, float]:
        """The corner of the hypervolume: every error, and what 95 % of random networks stay below."""
        random = np.random.default_rng(0)
        drawn = [self.counts(self.space.draw(random)) for _ in range(REFERENCE_DRAWS)]
        parameters, macs = (np.quantile([getattr(c, name) for c in drawn], 0.95) for name in ("parameters", "macs"))
        return 1.0, float(parameters) / 1e6, float(macs) / 1e6

    def hypervolume(self, objectives: Sequence[Sequence[float]]) -> float:
        """Normalised, 0 to 1."""
        return hypervolume(np.reshape(objectives, (-1, 3)), self.reference, ideal=(0.0, 0.0, 0.0))


class Evaluator:
    """Trains networks that were not trained before, and keeps what came out.

    Args:
        path: of evaluations.json.
        engine, workers: of `common.jobs`.
        progress: show how many networks of a generation are trained.
    """

    def __init__(
        self,
        setting: Setting,
        space: Space,
        path: Path,
        engine: Engine = "here",
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        self.setting, self.space, self.path, self.engine, self.workers = setting, space, path, engine, workers
        self.progress = progress
        self.known: dict[str, dict[str, float]] = {}
        if path.is_file():
            with reading(path):
                found = read_object(path, kinds={"evaluations": dict})["evaluations"]
                self.known = {name: {k: _number(v) for k, v in values.items()} for name, values in found.items()}
                [(values["error"], values["cpu_seconds"]) for values in self.known.values()]

    def __call__(self, members: Sequence[NetworkMember]) -> list[float]:
        """Validation errors of members, 0..1; NaN for one that diverged.

        Raises:
            Stopped: between two networks, what is finished being saved.
        """
        new = [member for member in members if member.key not in self.known]
        jobs = [self.setting.job(self.space.decode(member.chromosome)) for member in new]
        show = self.progress and not os.environ.get("CI")
        with tqdm(total=len(jobs), desc="networks", unit="net", disable=not show) as bar, Steps() as steps:
            for number, values in run_jobs(jobs, self.engine, self.workers):
                self.known[new[number].key] = values
                write_json(self.path, {"evaluations": self.known})
                bar.update()
                steps.ended(lambda: f"the last of {len(self.known)} networks is saved in {self.path}")
        return [self.known[member.key]["error"] for member in members]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        members: measured.
        front: keys of the Pareto front over all generations so far.
        hypervolume, population_hypervolume: of that front, and of the generation alone; normalised.
        accepted: share of the random draws that early exit let in (the first generation).
        skipped: children that were given error 1 because they are above beta.
    """

    number: int
    members: list[NetworkMember]
    front: list[str]
    hypervolume: float
    population_hypervolume: float
    accepted: float | None = None
    draws: int | None = None
    skipped: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        members = [
            {"key": m.key, "chromosome": list(m.chromosome), "parents": list(m.parents), "objectives": m.objectives}
            for m in self.members
        ]
        write_json(path, {**self.__dict__, "members": members})

    @classmethod
    def load(cls, path: Path, number: int) -> Generation:
        """What `save` wrote.

        Raises:
            UserError: the file is damaged, or of another generation.
        """
        with reading(path):
            content = read_object(path, kinds={"members": list, "number": int})
            members = [
                Member(tuple(m["chromosome"]), m["key"], tuple(m["parents"]), tuple(map(_number, m["objectives"])))
                for m in content["members"]
            ]
            found = cls(**{**content, "members": members})
            if found.number != number:
                raise ValueError(f"generation {found.number}")
            return found


class Search:
    """An evolution, or as many random networks; `run` finishes it from wherever it was interrupted.

    Args:
        folder: of its generations.
        after: called with the finished generations after each (drawings, a line of progress).
    """

    def __init__(
        self,
        options: EvolutionOptions,
        scale: Scale,
        evaluator: Evaluator,
        folder: Path,
        seed: int,
        after: Callable[[list[Generation]], None] | None = None,
    ) -> None:
        self.options, self.scale, self.evaluate, self.folder, self.seed = options, scale, evaluator, folder, seed
        self.after = after
        self.generations: list[Generation] = []

    def _path(self, number: int) -> Path:
        return self.folder / "generations" / f"{number:03d}.json"

    def run(self) -> list[Generation]:
        """All generations."""
        for number in range(self.options.generations):
            path = self._path(number)
            if path.is_file():
                self.generations.append(Generation.load(path, number))
                continue
            self.generations.append(self._generation(number))
            if self.after is not None:
                self.after(self.generations)
            self.generations[-1].save(path)  # last: what has this file has its drawings too
        return self.generations

    def _generation(self, number: int) -> Generation:
        options, random = self.options, generation_random(self.seed, number)
        official = options.selection == "official_compat"
        accepted = draws = None
        kept: list[NetworkMember] = []
        if number == 0:
            seeds = [self.scale.space.encode(Genotype.load(name)) for name in options.seeds]
            size = lambda one: self.scale.parameters(one, official)  # noqa: E731
            first = first_generation(self.scale.space, options, random, size, seeds)
            new, accepted, draws = first.members, first.accepted, first.draws
        else:
            known = {member.key for generation in self.generations for member in generation.members}
            kept, new = next_generation(self.scale.space, self.generations[-1].members, options, random, known)
        skipped = [member.key for member in new if number and not self._fits(member, official)]
        errors = iter(self.evaluate([member for member in new if member.key not in skipped]))
        measured = [
            member.measured(self.scale.objectives(member.chromosome, 1.0 if member.key in skipped else next(errors)))
            for member in new
        ]
        members = [*kept, *measured]
        archive = self.archive(members)
        objectives = [member.objectives for member in archive]
        first_front = fronts_of(objectives)[0]
        return Generation(
            number,
            members,
            [archive[index].key for index in first_front],
            self.scale.hypervolume(objectives),
            self.scale.hypervolume([member.objectives for member in members]),
            accepted,
            draws,
            skipped,
        )

    def _fits(self, member: NetworkMember, official: bool) -> bool:
        """Whether a child is trained at all."""
        size = self.scale.parameters(member.chromosome, official)
        return not self.options.filter_children or is_small_enough(size, self.options.beta, official)

    def archive(self, more: Sequence[NetworkMember] = ()) -> list[NetworkMember]:
        """All members of all generations so far, in the order in which they came."""
        found = {member.key: member for generation in self.generations for member in generation.members}
        return list((found | {member.key: member for member in more}).values())

    def front(self) -> list[NetworkMember]:
        """The Pareto front over all generations, the most accurate first."""
        members = {member.key: member for member in self.archive()}
        front = [members[name] for name in self.generations[-1].front]
        return sorted(front, key=lambda member: member.objectives)

    def chosen(self) -> list[NetworkMember]:
        """`keep` members of the front that lie far apart, the most accurate first."""
        front = self.front()
        return [front[index] for index in spread([member.objectives for member in front], self.options.keep)]

    def costs(self) -> dict[str, float]:
        """What the search trained: networks, the sums of their large parameters and MACs in millions, CPU seconds."""
        skipped = {name for generation in self.generations for name in generation.skipped}
        trained = [member for member in self.archive() if member.key not in skipped]
        counts = [self.scale.counts(member.chromosome) for member in trained]
        return {
            "evaluations": len(trained),
            "parameters_m": sum(c.parameters for c in counts) / 1e6,
            "macs_m": sum(c.macs for c in counts) / 1e6,
            "cpu_seconds": sum(self.evaluate.known[member.key]["cpu_seconds"] for member in trained),
        }

    def best_error(self) -> float:
        """The lowest validation error of all networks, 0..1."""
        errors = [member.objectives[0] for member in self.archive()]
        return min((error for error in errors if not math.isnan(error)), default=1.0)
