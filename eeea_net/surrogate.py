"""Searching the once-for-all space with a model of the error (section 4.2; NSGANetV2, Lu et al. 2020).

Some members are measured; a regression that ranks the others best in cross-validation is fitted; NSGA-II runs on its
predictions and on exact MACs; what it proposes, spread along its front, is measured next.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import KFold
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

from common.errors import UserError
from common.evolution import generation_random, spread
from eeea_net.config import EvolutionOptions
from eeea_net.evolution import Member, next_generation
from eeea_net.once_for_all import Design, SubnetChoice, subnet_cost
from eeea_net.supernet import Elastic

Genes = tuple[int, ...]
FOLDS = 4


@dataclass(frozen=True)
class ChoiceSpace:
    """Members as genes: depth of each stage, kernel and expansion of each block that there may be, resolution."""

    elastic: Elastic
    design: Design

    @property
    def stages(self) -> int:
        return len(self.design.widths)

    def _choices(self) -> list[tuple[int, ...]]:
        places = self.stages * max(self.elastic.depths)
        elastic = self.elastic
        kernels, expands = [elastic.kernels] * places, [elastic.expands] * places
        return [*[elastic.depths] * self.stages, *kernels, *expands, elastic.resolutions]

    def draw(self, random: np.random.Generator) -> Genes:
        return tuple(int(random.choice(values)) for values in self._choices())

    def decode(self, genes: Genes) -> SubnetChoice:
        """The member; genes of blocks that it lacks say nothing."""
        most = max(self.elastic.depths)
        depths, places = genes[: self.stages], self.stages * most
        present = [stage * most + block for stage, depth in enumerate(depths) for block in range(depth)]
        kernels, expands = genes[self.stages :], genes[self.stages + places :]
        chosen = (tuple(kernels[place] for place in present), tuple(expands[place] for place in present))
        return SubnetChoice(*chosen, tuple(depths), genes[-1])

    def key(self, genes: Genes) -> str:
        """Two genes of one member have one name."""
        return hashlib.md5(str(self.decode(genes)).encode(), usedforsecurity=False).hexdigest()

    def breed(
        self, mother: Genes, father: Genes, random: np.random.Generator, mutation: float, inversion: float
    ) -> Genes:
        """Uniform crossover; one gene drawn anew with `mutation`, two neighbouring blocks swapped with `inversion`."""
        child = [pair[side] for pair, side in zip(zip(mother, father), random.integers(2, size=len(mother)))]
        choices = self._choices()
        if random.random() < mutation:
            gene = int(random.integers(len(child)))
            child[gene] = int(random.choice(choices[gene]))
        if random.random() < inversion:
            places = self.stages * max(self.elastic.depths)
            if places > 1:
                gene = self.stages + int(random.integers(places - 1))
                for first in (gene, gene + places):
                    child[first], child[first + 1] = child[first + 1], child[first]
        return tuple(child)

    def features(self, genes: Genes) -> list[float]:
        """What a surrogate sees: genes of blocks that there are, 0 for the others, and the member's size."""
        most, places = max(self.elastic.depths), self.stages * max(self.elastic.depths)
        present = [block < genes[stage] for stage in range(self.stages) for block in range(most)]
        values = [
            float(value) if here else 0.0
            for value, here in zip(genes[self.stages :], [*present, *present][: 2 * places])
        ]
        parameters, macs = subnet_cost(self.decode(genes), self.design)
        return [*map(float, genes[: self.stages]), *values, float(genes[-1]), parameters / 1e6, macs / 1e6]


def models() -> dict[str, Any]:
    """The regressions that compete: a multilayer perceptron, a tree, radial basis functions, a Gaussian process."""
    return {
        "MLP": make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(64,), max_iter=600, random_state=0)),
        "CART": DecisionTreeRegressor(min_samples_leaf=2, random_state=0),
        "RBF": make_pipeline(StandardScaler(), KernelRidge(kernel="rbf", alpha=0.1, gamma=0.02)),
        "GP": make_pipeline(
            StandardScaler(),
            GaussianProcessRegressor(Matern(3.0) + WhiteKernel(0.1), normalize_y=True, random_state=0),
        ),
    }


def fit_surrogate(x_NF: NDArray[np.float64], y_N: NDArray[np.float64]) -> tuple[Any, str, float]:
    """The regression that orders left-out members best (Kendall's tau, mean over folds), fitted on all.

    Returns:
        (model, its name, its tau).
    """
    best: tuple[float, str] = (-np.inf, "CART")
    centred = y_N - y_N.mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, model in models().items():
            taus = []
            for fitted, left_out in KFold(min(FOLDS, len(y_N)), shuffle=True, random_state=0).split(x_NF):
                guess = clone(model).fit(x_NF[fitted], centred[fitted]).predict(x_NF[left_out])
                tau = kendalltau(guess, centred[left_out]).statistic if len(left_out) > 1 else 0.0
                taus.append(0.0 if np.isnan(tau) else float(tau))
            best = max(best, (float(np.mean(taus)), name), key=lambda pair: pair[0])
        return models()[best[1]].fit(x_NF, centred), best[1], best[0]


def propose(
    space: ChoiceSpace,
    measured: Sequence[Member[Genes]],
    count: int,
    seed: int,
    round_number: int,
    generations: int = 20,
) -> tuple[list[Genes], str, float]:
    """Members to be measured next: NSGA-II on a surrogate of the error, spread along its front.

    Args:
        measured: members with objectives (error, parameters in millions, MACs in millions).

    Returns:
        (genes that are new, the surrogate's name, its tau in cross-validation).
    """
    finite = [member for member in measured if np.isfinite(member.objectives[0])]
    features = np.array([space.features(member.chromosome) for member in finite])
    model, name, tau = fit_surrogate(features, np.array([member.objectives[0] for member in finite]))
    offset = float(np.mean([member.objectives[0] for member in finite]))

    def predicted(members: Sequence[Member[Genes]]) -> list[Member[Genes]]:
        guesses = model.predict(np.array([space.features(member.chromosome) for member in members])) + offset
        return [
            member.measured((float(guess), space.features(member.chromosome)[-1]))
            for member, guess in zip(members, guesses)
        ]

    known = {member.key for member in measured}
    population = predicted(finite)
    options = EvolutionOptions(population=max(8, len(population)), survivors=0.5, mutation=0.3, inversion=0.1)
    seen: dict[str, Member[Genes]] = {}
    for generation in range(generations):
        random = generation_random(seed, 10_000 * (round_number + 1) + generation)
        try:
            kept, children = next_generation(space, population, options, random, known | set(seen))
        except UserError:  # a small space has no more members; what was found is proposed
            if not seen:
                raise
            break
        found = predicted(children)
        seen |= {member.key: member for member in found}
        population = [*kept, *found]
    candidates = list(seen.values())
    chosen = spread([member.objectives for member in candidates], count)
    taken = {candidates[index].key for index in chosen}
    rest = sorted((member for member in candidates if member.key not in taken), key=lambda member: member.objectives)
    members = [*(candidates[index] for index in chosen), *rest][:count]
    return [member.chromosome for member in members], name, tau
