"""NSGA-II with early-exit initialisation as a multi-trial strategy of nni 3.0 (optional: `make setup EXTRAS=dev,nas`).

nni has no strategy for several objectives. A user's space and evaluator stay as they are; the metric that the evaluator
reports is maximised, further objectives are functions of a sample and are minimised:

    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.execution import SequentialExecutionEngine
    from nni.nas.nn.pytorch import LayerChoice, ModelSpace
    from nni.nas.space import RawFormatModelSpace

    class Space(ModelSpace):
        def __init__(self):
            super().__init__()
            self.first = LayerChoice({"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 8)}, label="first")
            ...

    def train(model):                       # a user's own training, as for every strategy of nni
        ...
        nni.report_final_result(accuracy)

    def sizes(sample):                      # {"first": "wide", ...} -> millions of parameters, and what else is small
        return [parameters_of(Space().freeze(sample)) / 1e6]

    strategy = Nsga2(sizes, population=20, generations=10, beta=0.1)
    strategy(RawFormatModelSpace(Space(), FunctionalEvaluator(train)), SequentialExecutionEngine())
    for member in strategy.front():         # Pareto front, the most accurate first
        print(dict(member.chromosome), -member.objectives[0], member.objectives[1:])

Early exit compares the first of `sizes` with beta. The trials of a generation are submitted together, so an engine with
several workers runs them at the same time; the generations do not depend on that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import UserError

try:
    from nni.mutable import MutableAnnotation
    from nni.nas.strategy.base import Strategy
except Exception as error:  # nni fails in many ways where its own requirements do not fit
    raise UserError(
        f"eeea_net.nni_strategy needs nni 3.0, which cannot be imported here ({error}); install it with "
        "`make setup EXTRAS=dev,nas`, or use eeea_net/train.py, which does without"
    ) from None

from common.evolution import fronts, generation_random
from eeea_net.config import EvolutionOptions
from eeea_net.evolution import Member, first_generation, next_generation

Chromosome = tuple[tuple[str, Any], ...]  # label and choice, in the order of the space


class SampleSpace:
    """A space of nni as evolution wants it: samples of its choices by label."""

    def __init__(self, choices: dict[str, Any]) -> None:
        self.choices = {label: one for label, one in choices.items() if not isinstance(one, MutableAnnotation)}

    def _drawn(self, label: str, random: np.random.Generator) -> Any:
        found = self.choices[label].random(random_state=np.random.RandomState(int(random.integers(2**32))))
        return tuple(found) if isinstance(found, list) else found

    def draw(self, random: np.random.Generator) -> Chromosome:
        return tuple((label, self._drawn(label, random)) for label in self.choices)

    def key(self, chromosome: Chromosome) -> str:
        return json.dumps(chromosome, default=str)

    def breed(
        self,
        mother: Chromosome,
        father: Chromosome,
        random: np.random.Generator,
        mutation: float,
        inversion: float,
    ) -> Chromosome:
        """Uniform crossover, and one choice drawn anew; choices of any space have no neighbours to be swapped with."""
        child = [pair[side] for pair, side in zip(zip(mother, father), random.integers(2, size=len(mother)))]
        if random.random() < mutation:
            place = int(random.integers(len(child)))
            child[place] = (child[place][0], self._drawn(child[place][0], random))
        return tuple(child)


def sample_of(chromosome: Chromosome) -> dict[str, Any]:
    """As nni's spaces are frozen by it."""
    return {label: list(value) if isinstance(value, tuple) else value for label, value in chromosome}


class Nsga2(Strategy):  # type: ignore[misc]
    """See the module's text.

    Args:
        sizes: of a sample: objectives to be minimised beside the metric, the first one in beta's unit.
        population, generations, survivors, mutation, beta: `config.EvolutionOptions`.
        seed: of everything random.
    """

    def __init__(
        self,
        sizes: Callable[[dict[str, Any]], Sequence[float]],
        population: int = 20,
        generations: int = 10,
        survivors: float = 0.5,
        mutation: float = 0.3,
        beta: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sizes, self.seed = sizes, seed
        self.options = EvolutionOptions(population, generations, survivors, mutation, beta=beta)
        self.members: dict[str, Member[Chromosome]] = {}
        self._models: dict[str, Any] = {}

    def _run(self) -> None:
        space = SampleSpace(self.model_space.simplify())
        options = self.options
        first = first_generation(
            space, options, generation_random(self.seed, 0), lambda one: float(self.sizes(sample_of(one))[0])
        )
        population = self._measured(first.members)
        for number in range(1, options.generations):
            random = generation_random(self.seed, number)
            kept, children = next_generation(space, population, options, random, set(self.members))
            population = [*kept, *self._measured(children)]

    def _measured(self, members: Sequence[Member[Chromosome]]) -> list[Member[Chromosome]]:
        """Trials of members, all submitted before any is waited for; a failed one is the worst."""
        models = []
        for member in members:
            model = self.model_space.freeze(sample_of(member.chromosome))
            if not self.wait_for_resource():
                raise UserError(f"nni's budget ended after {len(self._models)} of the trials that NSGA-II needs")
            self.engine.submit_models(model)
            models.append(model)
            self._models[member.key] = model
        self.engine.wait_models(*models)
        found = []
        for member, model in zip(members, models):
            metric = math.nan if model.metrics.final is None else -float(model.metrics.final)
            found.append(member.measured((metric, *self.sizes(sample_of(member.chromosome)))))
        self.members |= {member.key: member for member in found}
        return found

    def front(self) -> list[Member[Chromosome]]:
        """The Pareto front over all trials, the best metric first; objectives begin with the negative metric."""
        members = list(self.members.values())
        if not members:
            return []
        chosen = [members[index] for index in fronts([member.objectives for member in members])[0]]
        return sorted(chosen, key=lambda member: member.objectives)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[Any]:
        """Models of the front, as nni's experiments export them."""
        chosen = self.front() if sort else list(self.members.values())
        yield from (self._models[member.key] for member in chosen[:limit])
