"""What the claims of `reproduce.py` are made of: searches by (name, seed) that share what they have trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from common.files import locked
from common.study import Study as CommonStudy
from common.study import labelled
from eeea_net.backbones import Plan, plan_of
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
from eeea_net.once_for_all import Subnet, from_records
from eeea_net.proxy import Setting
from eeea_net.search import Evaluator, Scale, Search
from eeea_net.shrinking import OnceForAll
from eeea_net.space import Space
from eeea_net.table import SETS, compare
from eeea_net.transfer_config import FitOptions, HeadOptions, PretrainOptions, SceneConfig, Task, TransferConfig
from eeea_net.transferring import Transfer

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
class TransferSizes:
    """Of the claims about transfer.

    Args:
        initial, rounds, proposals: of the search over the elastic network's members.
        data, head: of all tasks. pretrain: of every backbone, on the pictures of the search.
        detection, segmentation, pose: how backbone and head are trained.
    """

    initial: int
    rounds: int
    proposals: int
    data: SceneConfig
    head: HeadOptions
    pretrain: PretrainOptions
    detection: FitOptions
    segmentation: FitOptions
    pose: FitOptions


@dataclass(frozen=True)
class Sizes:
    """Sizes and budget of a tier.

    Args:
        data, proxy: of every network that a search trains.
        population, generations, survivors: of every search; random search trains as many networks.
        steps: of training a network.
        elastic: the network of E5.
        transfer: of the claims about transfer.
        table_population, table_generations: of the searches over a table.
    """

    data: DataConfig
    proxy: ProxyOptions
    population: int
    generations: int
    survivors: float
    steps: int
    elastic: ElasticOptions
    transfer: TransferSizes
    table_population: int
    table_generations: int


@cache
def percentile_beta(percent: float) -> float:
    """Parameters in millions that so many per cent of random networks stay below."""
    scale, random = Scale(Space.of(SpaceOptions()), LargeOptions()), np.random.default_rng(1)
    return float(np.percentile([scale.parameters(scale.space.draw(random)) for _ in range(DRAWN)], percent))


class Study(CommonStudy[Sizes]):
    """The searches of a tier; what is trained is kept."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of all searches: nothing of the transfer decides what they find."""
        return {key: value for key, value in super().settings.items() if key != "transfer"}

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

    def _elastic(self, seed: int) -> OnceForAll:
        """The elastic network, trained."""
        folder = self.workplace(f"elastic-seed{seed}", self.settings)
        config = RunConfig(run_dir=str(folder), seed=seed, space="once_for_all", progress=False, device="cpu")
        sizes, config.data = self.sizes.transfer, self.sizes.data
        initial, rounds, proposals = sizes.initial, sizes.rounds, sizes.proposals
        config.elastic = replace(self.sizes.elastic, initial=initial, rounds=rounds, proposals=proposals)
        config.compare = replace(config.compare, random_search=False)
        parts = OnceForAll(config, torch.device("cpu"))
        parts.train()
        return parts

    def searched(self, seed: int) -> Plan:
        """The most accurate member that the search over the elastic network has measured."""

        def measured() -> dict[str, Any]:
            parts = self._elastic(seed)
            best = min(
                parts.search()["measured"], key=lambda member: (math.isnan(member.objectives[0]), member.objectives[0])
            )
            return {"choice": parts.space.decode(best.chromosome).__dict__, "design": parts.design.__dict__}

        found = self.values(f"searched-seed{seed}", measured, self._transfer_settings)
        choice, design = from_records(found["choice"], found["design"])
        return Plan("searched", lambda: Subnet.of(choice, design), design=design)

    @property
    def _transfer_settings(self) -> dict[str, Any]:
        return {**self.settings, "transfer": asdict(self.sizes.transfer)}

    def transfer(self, task: Task, seed: int) -> dict[str, float]:
        """Scores in per cent and MACs of the searched backbone and of MobileNetV3's blocks at its MACs: the same
        classification, then the same training with the task's head."""
        sizes = self.sizes.transfer

        def measured() -> dict[str, float]:
            folder = self.workplace(f"transfer-seed{seed}", self._transfer_settings)
            config = TransferConfig(run_dir=str(folder / task), seed=seed, task=task, progress=False, device="cpu")
            config.data, config.head, config.fit = sizes.data, sizes.head, getattr(sizes, task)
            config.pretrain = replace(sizes.pretrain, data=self.sizes.data)
            parts = Transfer(config, torch.device("cpu"), folder / "classifiers")
            searched = self.searched(seed)
            side, stride, classes = config.data.size, config.first_stride, len(parts.pictures.classes)
            beside = plan_of("mobilenetv3", classes, parts.pictures.channels, config.layers, searched, side, stride)
            found: dict[str, float] = {}
            for plan in (searched, beside):
                row = parts.one(plan)
                scores = {name: 100 * float("nan" if v is None else v) for name, v in row["scores"].items()}
                error = 100 * row["classification_error"]
                found |= labelled({**scores, "macs_m": row["macs"] / 1e6, "classification_error": error}, plan.name)
            return found

        found = self.values(f"transfer-{task}-seed{seed}", measured, self._transfer_settings)
        self.note(f"transfer-{task}", seed, self._transfer_settings, found)
        return found

    def recalibration(self, seed: int) -> dict[str, float]:
        """Mean validation error in per cent of an elastic network's random members, before and after re-calibration."""

        def measured() -> dict[str, float]:
            parts = self._elastic(seed)
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
