"""What the claims of `reproduce.py` are made of: searches by (name, seed) that share what they have trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from common.files import locked
from common.study import Study as CommonStudy
from eeea_net.comparison import random_search
from eeea_net.config import (
    DataConfig,
    ElasticOptions,
    EvolutionOptions,
    LargeOptions,
    ProxyOptions,
    RunConfig,
    SpaceOptions,
)
from eeea_net.proxy import Setting
from eeea_net.search import Evaluator, Scale, Search
from eeea_net.shrinking import OnceForAll
from eeea_net.space import Space
from eeea_net.table import SETS, compare

MEMBERS = 10  # of the elastic network, in E5
DRAWN = 1000  # random networks whose parameters give the percentiles
# What an arm differs in from the search without a filter; `percentile` stands for beta.
ARMS: dict[str, dict[str, Any]] = {
    "unfiltered": {},
    "beta30": {"percentile": 30},
    "beta50": {"percentile": 50},
    "beta70": {"percentile": 70},
    "beta30-children": {"percentile": 30, "filter_children": True},
    "official": {"selection": "official_compat"},
    "random": {},
}


@dataclass(frozen=True)
class Sizes:
    """Sizes and budget of a tier.

    Args:
        data, proxy: of every network that a search trains.
        population, generations, survivors: of every search; random search trains as many networks.
        steps: of training a network.
        elastic: the network of E5.
        table_population, table_generations: of the searches over a table.
    """

    data: DataConfig
    proxy: ProxyOptions
    population: int
    generations: int
    survivors: float
    steps: int
    elastic: ElasticOptions
    table_population: int
    table_generations: int


@cache
def percentile_beta(percent: float) -> float:
    """Parameters in millions that so many per cent of random networks stay below."""
    scale, random = Scale(Space.of(SpaceOptions()), LargeOptions()), np.random.default_rng(1)
    return float(np.percentile([scale.parameters(scale.space.draw(random)) for _ in range(DRAWN)], percent))


class Study(CommonStudy[Sizes]):
    """The searches of a tier; what is trained is kept."""

    @cached_property
    def scale(self) -> Scale:
        return Scale(Space.of(SpaceOptions()), LargeOptions())

    def options(self, name: str) -> EvolutionOptions:
        """The evolution of an arm."""
        sizes, change = self.sizes, dict(ARMS[name])
        options = EvolutionOptions(sizes.population, sizes.generations, sizes.survivors, beta=0.0)
        if "percentile" in change:
            change["beta"] = percentile_beta(change.pop("percentile"))
        return replace(options, **change)

    def search(self, name: str, seed: int) -> Search:
        """An arm, finished; random search trains as many networks as the search without a filter."""
        sizes = self.sizes
        options = self.options(name)
        if name == "random":
            options = random_search(options, int(self.search("unfiltered", seed).costs()["evaluations"]))
        with locked(self.folder / f"seed{seed}"):
            folder = self.workplace(f"seed{seed}", self.settings)
            setting = Setting(sizes.data, replace(sizes.proxy, steps=sizes.steps), seed)
            evaluator = Evaluator(setting, self.scale.space, folder / "evaluations.json")
            found = Search(options, self.scale, evaluator, folder / name, seed)
            with self.counted(folder / name):
                found.run()
        values = {"hypervolume": [g.hypervolume for g in found.generations], "best_error": found.best_error()}
        values["front"] = [member.objectives for member in found.front()]
        values |= {"accepted": found.generations[0].accepted, **found.costs()}
        self.note(name, seed, {**self.settings, "evolution": asdict(options)}, values)
        return found

    def recalibration(self, seed: int) -> dict[str, float]:
        """Mean validation error in per cent of an elastic network's random members, before and after re-calibration."""

        def measured() -> dict[str, float]:
            folder = self.workplace(f"elastic-seed{seed}", self.settings)
            config = RunConfig(run_dir=str(folder), seed=seed, space="once_for_all", progress=False, device="cpu")
            config.data, config.elastic = self.sizes.data, self.sizes.elastic
            parts = OnceForAll(config, torch.device("cpu"))
            parts.train()
            random = np.random.default_rng(seed)
            choices = [parts.elastic.draw(parts.supernet.stages, random) for _ in range(MEMBERS)]
            part = parts.data.validation
            before = [100 * parts.error(parts.supernet.extract(choice), choice, part) for choice in choices]
            after = [100 * parts.error(parts.member(choice), choice, part) for choice in choices]
            return {"before": float(np.mean(before)), "after": float(np.mean(after))}

        return self.values(f"recalibration-seed{seed}", measured, self.settings)

    def table(self, seed: int) -> dict[str, float]:
        """Searches over nas-bench-graph's sets (`table.compare`)."""
        sizes = self.sizes
        options = EvolutionOptions(sizes.table_population, sizes.table_generations, survivors=0.5, mutation=0.3)

        def measured() -> dict[str, float]:
            return {key: value for name in SETS for key, value in compare(name, options, 30, seed).items()}

        return self.values(f"table-seed{seed}", measured, self.settings)
