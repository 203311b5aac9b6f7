"""What the claims of `reproduce.py` are made of: the data and sizes of a tier, searches and trainings that the claims
share, and the measurements. Every finished search and training stays on disk.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.nn import functional as F

from common.costs import kept_bytes
from common.data.augmentation import Augmentation
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.files import locked, write_json
from common.study import Study as CommonStudy
from pc_darts.baselines import darts_options, random_genotype
from pc_darts.config import DataConfig, RetrainOptions, SearchConfig, SearchOptions
from pc_darts.data import augmentation, open_data, search_halves
from pc_darts.genotypes import Genotype
from pc_darts.retraining import RetrainResult, retrain
from pc_darts.search_space import SearchNetwork
from pc_darts.searching import Searcher, SearchResult, seconds_per_epoch

RANDOM_STREAM = 11
WEIGHT_FREE = ("skip_connect", "max_pool_3x3", "avg_pool_3x3")  # `none` is never chosen
PARTIALS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Sizes:
    """Sizes and budgets of a tier.

    Args:
        search, retrain: of every arm; an arm changes only what its claim compares.
        random_cells: that PC3 trains; trainings: of every cell with different seeds, averaged.
        darts_batch: of DARTS in PC6, where PC-DARTS has K times as much.
        memory_channels, memory_cells, memory_side: of PC1 (the paper's search network).
        time_channels, time_cells, time_side, time_batch, time_steps: of PC2.
    """

    data: DataConfig
    search: SearchOptions
    retrain: RetrainOptions
    random_cells: int
    trainings: int
    darts_batch: int
    memory_channels: int
    memory_cells: int
    memory_side: int
    time_channels: int
    time_cells: int
    time_side: int
    time_batch: int
    time_steps: int


class Study(CommonStudy[Sizes]):
    """The arms of a tier; an arm that is finished in the folder is read, not run.

    Args:
        drawn: the first PC-DARTS search leaves pictures of its epochs.
    """

    def __init__(self, sizes: Sizes, folder: Path, drawn: bool = False) -> None:
        super().__init__(sizes, folder)
        self.drawn = drawn

    @cached_property
    def data(self) -> ImageSet:
        return open_data(self.sizes.data)

    @cached_property
    def halves(self) -> tuple[Pictures, Pictures]:
        return search_halves(self.data.train, self.sizes.data.halves, 0)

    @cached_property
    def augment(self) -> Augmentation:
        return augmentation(self.sizes.data)

    def searcher(self, options: SearchOptions, name: str, seed: int, **more: Any) -> Searcher:
        """The search `name`-seed`seed`, in a folder of its own; it goes on from where it was."""
        settings = {"data": dataclasses.asdict(self.sizes.data), "options": dataclasses.asdict(options), **more}
        folder = self.workplace(f"searches/{name}-seed{seed}", settings)
        draw = self.drawn and (name, seed) == ("pc", 0)
        return Searcher(options, self.data, self.halves, self.augment, folder, seed, draw=draw, **more)

    def search(self, name: str, seed: int, initial_seed: int | None = None, **changes: Any) -> SearchResult:
        """The search arm `name`; `changes` replace options of the tier's search."""
        options = dataclasses.replace(self.sizes.search, **changes)
        return self._found(name, seed, options, initial_seed=initial_seed)

    def _found(self, name: str, seed: int, options: SearchOptions, **more: Any) -> SearchResult:
        """What a search comes to; only one process is at it."""
        with locked(self.folder / "searches" / f"{name}-seed{seed}"):
            searcher = self.searcher(options, name, seed, **more)
            with self.counted(searcher.folder):
                found = searcher.run()
        values = {key: getattr(found, key) for key in ("steps", "seconds", "cpu_seconds", "memory_bytes", "alphas")}
        values["genotype"] = json.loads(found.genotype.to_json())
        self.note(name, seed, {"options": dataclasses.asdict(options), **more}, values)
        return found

    def darts(self, seed: int) -> SearchResult:
        """DARTS of first order in the CPU seconds of the PC-DARTS arm of the same seed, at 1/K of its batch."""
        options = darts_options(self.sizes.search, self.sizes.darts_batch)

        def measured() -> dict[str, float]:
            budget = self.search("pc", seed).cpu_seconds
            taken = seconds_per_epoch(self.searcher(dataclasses.replace(options, epochs=1), "darts", seed))
            return {"budget": budget, "epoch": taken, "epochs": max(1, round(budget / taken))}

        epochs = self.values(f"searches/darts-seed{seed}-budget", measured, self.settings)["epochs"]
        return self._found("darts", seed, dataclasses.replace(options, epochs=int(epochs)))

    def train(self, name: str, genotype: Genotype, number: int) -> RetrainResult:
        """Training `number` of a cell, with a seed of its own."""
        sizes = self.sizes
        settings = {"genotype": genotype.to_json(), "data": dataclasses.asdict(sizes.data)}
        settings |= {"options": dataclasses.asdict(sizes.retrain)}
        with locked(self.folder / "trainings" / f"{name}-{number}"):
            folder = self.workplace(f"trainings/{name}-{number}", settings)
            with self.counted(folder):
                found = retrain(
                    genotype, sizes.retrain, self.data, self.augment, folder, seed=number, keep_weights=False
                )
        values = {key: getattr(found, key) for key in ("test_error", "parameters", "steps", "seconds", "cpu_seconds")}
        self.note(f"training-{name}", number, settings, values)
        return found

    def error(self, name: str, genotype: Genotype) -> float:
        """Test error of a cell in percent, mean over the tier's trainings."""
        runs = [self.train(name, genotype, number) for number in range(self.sizes.trainings)]
        return 100 * fmean(run.test_error for run in runs)

    def random_errors(self) -> list[float]:
        """Test errors of the random cells, the same ones for every seed of a claim."""
        cells = [random_genotype(derive_seed(RANDOM_STREAM, n)) for n in range(self.sizes.random_cells)]
        return [self.error(f"random{n}", cell) for n, cell in enumerate(cells)]


def search_network_bytes(sizes: Sizes, partial: int, seed: int) -> int:
    """Bytes per picture that the search network keeps for its backward pass, alphas included, at the paper's size."""
    torch.manual_seed(seed)
    network = SearchNetwork(
        SearchConfig(sizes.memory_channels, sizes.memory_cells, partial=partial, classes=10), fused=False
    )
    side = sizes.memory_side
    x_BCHW, y_B = torch.randn(2, 3, side, side), torch.tensor([0, 1])
    kept = kept_bytes(lambda: F.cross_entropy(network(x_BCHW), y_B), network.parameters())
    return kept // len(x_BCHW)


def step_seconds(sizes: Sizes, partial: int, seed: int) -> float:
    """Median CPU seconds of a forward and backward pass of the search network at equal batch."""
    torch.manual_seed(seed)
    network = SearchNetwork(SearchConfig(sizes.time_channels, sizes.time_cells, partial=partial))
    side = sizes.time_side
    x_BCHW, y_B = torch.randn(sizes.time_batch, 3, side, side), torch.randint(10, (sizes.time_batch,))
    taken = []
    for _ in range(sizes.time_steps + 1):
        network.zero_grad(set_to_none=True)
        started = time.process_time()
        F.cross_entropy(network(x_BCHW), y_B).backward()
        taken.append(time.process_time() - started)
    return median(taken[1:])  # the first one allocates


def edges(genotype: Genotype) -> set[tuple[str, int, int]]:
    """The edges that a cell keeps: (kind, node, state)."""
    return {
        (kind, place // 2, state)
        for kind, choices in (("normal", genotype.normal), ("reduce", genotype.reduce))
        for place, (_, state) in enumerate(choices)
    }


def jaccard(a: Genotype, b: Genotype) -> float:
    """Common edges over all edges of two cells."""
    first, second = edges(a), edges(b)
    return len(first & second) / len(first | second)


def mean_overlap(genotypes: dict[int, Genotype], seed: int) -> float:
    """Mean Jaccard overlap of one search's edges with those of the others."""
    return fmean(jaccard(genotypes[seed], other) for key, other in genotypes.items() if key != seed)


def weight_free_share(genotype: Genotype) -> float:
    """Share of the chosen operations that have no weights."""
    names = [name for name, _ in (*genotype.normal, *genotype.reduce)]
    return sum(name in WEIGHT_FREE for name in names) / len(names)


# Section 4.4 and figure 4 of the paper as commands (`reproduce.py --sweep NAME`); names of arms to changed options.
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "partial": {f"K{k}": {"partial": k} for k in PARTIALS if k < 8},
    "pc-en": {
        f"{'PC' if k > 1 else 'no PC'}, {'EN' if en else 'no EN'}": {"partial": k, "edge_normalisation": en}
        for k, en in itertools.product((1, 4), (False, True))
    },
    "sampling": {name: {"sampling": name} for name in ("shuffle", "shift", "random")},
    "order": {"first order": {"unrolled": False}, "second order": {"unrolled": True}},
    "warm-up": {f"warm-up {n}": {"warmup_epochs": n} for n in (0, 12, 24)},
    "epochs": {f"{n} epochs": {"epochs": n, "warmup_epochs": 3 * n // 10} for n in (20, 40, 80)},
    "nodes": {f"{n} nodes": {"nodes": n} for n in (3, 4, 5)},
}


def sweep(study: Study, name: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every arm of a sweep over the seeds: errors, cost and memory; rows are also written to `<folder>/sweeps/`."""
    rows = []
    for arm, changes in SWEEPS[name].items():
        label = f"sweep-{name}-{arm}".replace(" ", "_").replace(",", "")
        found = [study.search(label, seed, **changes) for seed in seeds]
        errors = [study.error(f"{label}-seed{seed}", result.genotype) for seed, result in zip(seeds, found)]
        rows.append(
            {
                "arm": arm,
                "errors": errors,
                "mean": fmean(errors),
                "cpu_seconds": fmean(result.cpu_seconds for result in found),
                "memory_bytes": found[0].memory_bytes,
                "parameters": fmean(
                    study.train(f"{label}-seed{seed}", result.genotype, 0).parameters
                    for seed, result in zip(seeds, found)
                ),
                "overlap": fmean(jaccard(a.genotype, b.genotype) for a, b in itertools.combinations(found, 2))
                if len(found) > 1
                else None,
            }
        )
        write_json(study.folder / "sweeps" / f"{name}.json", {"seeds": list(seeds), "rows": rows})
    return rows
