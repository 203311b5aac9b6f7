"""What `train.py` does: search, draw, retrain; DARTS, random search and random cells beside it, same budget."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch

from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import read_object, write_atomically, write_json
from common.ledger import commit, hardware, peak_memory, versions
from common.run_clock import clock_of
from pc_darts.baselines import RandomSearch, darts_options, random_genotype, random_search
from pc_darts.config import RunConfig, SearchOptions, SgdOptions
from pc_darts.counting import size_cap
from pc_darts.data import augmentation, open_data, search_halves
from pc_darts.drawing import cell_dot, draw_cell
from pc_darts.genotypes import Cap, Genotype
from pc_darts.retraining import Retraining, RetrainResult, retrain
from pc_darts.searching import Searcher, SearchResult, seconds_per_epoch
from pc_darts.training import Machine

RANDOM_CELLS = 4  # stream of random numbers


@dataclass(frozen=True)
class Arm:
    """One line of the table: how a cell was found and what it is worth; `search` is None for cells that cost none."""

    name: str
    trained: RetrainResult
    search: SearchResult | None = None
    candidates: RandomSearch | None = None

    @property
    def search_seconds(self) -> float | None:
        if self.candidates is not None:
            return self.candidates.seconds
        return None if self.search is None else self.search.seconds


class Comparison:
    """The arms of a run, each in a folder of its own; finished parts are not repeated."""

    def __init__(self, config: RunConfig, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.folder = Path(config.run_dir)
        self.data: ImageSet = open_data(config.data)
        self.halves: tuple[Pictures, Pictures] = search_halves(self.data.train, config.data.halves, 0)
        self.augment = augmentation(config.data)
        self.cap = self._cap()

    def check(self) -> None:
        """Refuse what would fail after work has begun; writes nothing.

        Raises:
            UserError: naming what does not fit.
        """
        config, data = self.config, self.data
        for part in ("validation", "test"):
            if not len(getattr(data, part)):
                raise UserError(f"{data.name}: no picture is left for {part}; give more, or a larger data.validation")
        if config.genotype is None:
            for options in (config.search, *([darts_options(config.search)] if config.compare.darts else [])):
                check_schedule("search", options)
                self.searcher(options, self.folder)
        check_schedule("retrain", config.retrain)
        cell = Genotype.load(config.genotype) if config.genotype else random_genotype(0, config.search.nodes)
        Retraining(cell, config.retrain, data, self.augment, self.folder, config.seed, self.machine, config)

    def _cap(self) -> Cap | None:
        config = self.config
        limit = config.max_parameters or config.max_macs
        if not limit:
            return None
        measure: Literal["parameters", "macs"] = "parameters" if config.max_parameters else "macs"
        network = config.retrain.network(len(self.data.classes), self.data.channels)
        return size_cap(limit * 1e6, measure, network, self.data.size)

    def say(self, sentence: str) -> None:
        """To the user, once."""
        if self.machine.main and self.config.progress:
            print(sentence, file=sys.stderr, flush=True)

    def searcher(self, options: SearchOptions, folder: Path, cap: Cap | None = None) -> Searcher:
        config = self.config
        return Searcher(
            options,
            self.data,
            self.halves,
            self.augment,
            folder,
            config.seed,
            self.machine,
            config,
            cap=cap,
        )

    def search(self, name: str, options: SearchOptions, cap: Cap | None = None) -> SearchResult:
        """Finish a search in `<run>/<name>/search`."""
        self.say(f"{name}: searching, {options.epochs} epochs, K = {options.partial}, batch {options.batch_size}")
        found = self.searcher(options, self.folder / name / "search", cap).run()
        if self.machine.main:
            self.draw(name, found.genotype)
        return found

    def draw(self, name: str, genotype: Genotype) -> None:
        for kind in ("normal", "reduce"):
            folder, reduction = self.folder / name, kind == "reduce"
            draw_cell(genotype, reduction, folder / f"{kind}.svg", f"{name}: {kind} cell")
            dot = cell_dot(genotype, reduction)
            write_atomically(folder / f"{kind}.dot", lambda path, dot=dot: path.write_text(dot, encoding="utf-8"))  # type: ignore[misc]
        genotype.save(self.folder / name / "genotype.json")

    def train(self, name: str, genotype: Genotype, seed: int | None = None) -> RetrainResult:
        """Finish the training of a cell in `<run>/<name>/retrain`."""
        config = self.config
        self.say(f"{name}: training the cell from scratch, {config.retrain.epochs} epochs")
        result = retrain(
            genotype,
            config.retrain,
            self.data,
            self.augment,
            self.folder / name / "retrain",
            config.seed if seed is None else seed,
            self.machine,
            config,
        )
        self.say(f"{name}: test error {result.test_error:.2%}, {result.parameters / 1e6:.2f} M parameters")
        return result

    def cost(self, found: SearchResult) -> float:
        """What a search took in the unit of budgets (`Clock.cost`), the same in every process."""
        value = found.seconds if self.machine.device.type == "cuda" else found.cpu_seconds
        mean = torch.tensor(value, device=self.machine.device)
        self.machine.average([mean])
        return float(mean)

    def darts(self, budget: float) -> Arm:
        """DARTS with about the same memory (batch / K) for the same time."""
        options = darts_options(self.config.search)
        options = dataclasses.replace(options, epochs=self._darts_epochs(options, budget))
        found = self.search("darts", options)
        return Arm("DARTS", self.train("darts", found.genotype), found)

    def _darts_epochs(self, options: SearchOptions, budget: float) -> int:
        """As many as fit the budget; written down, so that a continued run has as many."""
        path = self.folder / "darts" / "budget.json"
        if not path.is_file():
            one = dataclasses.replace(options, epochs=1)
            taken = seconds_per_epoch(self.searcher(one, self.folder / "darts" / "search"))
            epochs = max(1, round(budget / taken))
            self.machine.wait()
            if self.machine.main:
                write_json(path, {"budget": budget, "epoch": taken, "epochs": epochs})
            self.machine.wait()
        return read_object(path, kinds={"epochs": int})["epochs"]

    def random_search(self, budget: float) -> Arm:
        """Random search for the time of the PC-DARTS search."""
        config = self.config
        folder = self.folder / "random_search"
        options = dataclasses.replace(config.retrain, epochs=config.compare.proxy_epochs, auxiliary=0.0, drop_path=0.0)

        def evaluate(genotype: Genotype, number: int) -> tuple[float, float]:
            proxy = retrain(
                genotype,
                options,
                self.data,
                self.augment,
                folder / f"candidate_{number:03d}",
                config.seed,
                self.machine,
                keep_weights=False,
            )
            spent = torch.tensor(proxy.seconds if self.machine.device.type == "cuda" else proxy.cpu_seconds)
            spent = spent.to(self.machine.device)
            self.machine.average([spent])
            self.say(f"random search: candidate {number + 1}, validation error {1 - proxy.validation_accuracy:.2%}")
            return proxy.validation_accuracy, float(spent)

        found = random_search(evaluate, budget, folder, config.seed, config.search.nodes)
        if self.machine.main:
            self.draw("random_search", found.best)
        return Arm("random search", self.train("random_search", found.best), candidates=found)

    def random_cells(self) -> list[Arm]:
        """Random cells, trained like the others."""
        config = self.config
        arms = []
        for number in range(config.compare.random):
            genotype = random_genotype(derive_seed(config.seed, RANDOM_CELLS, number), config.search.nodes)
            name = f"random_{number}"
            if self.machine.main:
                self.draw(name, genotype)
            arms.append(Arm(f"random cell {number + 1}", self.train(name, genotype)))
        return arms

    def given(self, name: str) -> Arm:
        """A cell that needs no search: a published one or a file."""
        genotype = Genotype.load(name)
        if self.machine.main:
            self.draw("given", genotype)
        return Arm(Path(name).stem, self.train("given", genotype))

    def pc_darts(self) -> Arm:
        """The paper's search, and its cell trained."""
        found = self.search("pc_darts", self.config.search, self.cap)
        name = "PC-DARTS" if self.config.search.partial > 1 else "DARTS with edge normalisation"
        return Arm(name, self.train("pc_darts", found.genotype), found)

    def write(self, arms: list[Arm]) -> dict[str, Any]:
        """table.md and metrics.json of the arms so far; returns the latter's content."""
        content = {
            "data": {
                "name": self.data.name,
                "classes": len(self.data.classes),
                "train": len(self.data.train),
                "validation": len(self.data.validation),
                "test": len(self.data.test),
            },
            "arms": [_figures(arm) for arm in arms],
            "seconds": clock_of(self.folder).keep(),
            "peak_memory_bytes": peak_memory(),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
        }
        if self.machine.main:
            write_json(self.folder / "metrics.json", content)
            text = table(arms, self.data) + "\n"
            write_atomically(self.folder / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
        return content


def check_schedule(section: str, options: SgdOptions) -> None:
    """Refuse a linear decay that has no epochs to decay in (`schedules.imagenet_final`)."""
    if options.lr_schedule == "imagenet_final" and options.lr_warmup < options.epochs <= 5:
        raise UserError(f"--{section}.epochs {options.epochs}: lr_schedule imagenet_final expects more than 5")


def _figures(arm: Arm) -> dict[str, Any]:
    search, trained = arm.search, arm.trained
    return {
        "name": arm.name,
        "test_error": trained.test_error,
        "validation_error": 1 - trained.validation_accuracy,
        "parameters": trained.parameters,
        "macs": trained.macs,
        "retrain_seconds": trained.seconds,
        "search_seconds": arm.search_seconds,
        "search_cpu_seconds": None if search is None else search.cpu_seconds,
        "search_images_per_second": None if search is None else search.images_per_second,
        "search_memory_bytes": None if search is None else search.memory_bytes,
        "search_peak_bytes": None if search is None else search.peak_bytes,
        "search_epochs": None if search is None else len(search.history),
        "candidates": None if arm.candidates is None else len(arm.candidates.candidates),
        "genotype": json.loads(trained.genotype.to_json()),
    }


def table(arms: list[Arm], data: ImageSet) -> str:
    """The arms as a Markdown table; random cells are one line, with mean and standard deviation."""

    def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
        return "-" if value is None else f"{value * scale:,.{digits}f}"

    head = "| method | test error % | validation error % | params M | MACs M | search min | search img/s | memory MB |"
    lines = [f"{data.name}, {len(data.classes)} classes, {len(data.test):,} test pictures", "", head, "|---" * 8 + "|"]
    random_cells = [arm for arm in arms if arm.name.startswith("random cell")]
    for arm in (arm for arm in arms if arm not in random_cells):
        search, trained = arm.search, arm.trained
        memory = None if search is None else search.peak_bytes or search.memory_bytes
        cells = [
            arm.name,
            number(trained.test_error, 100, 2),
            number(1 - trained.validation_accuracy, 100, 2),
            number(trained.parameters, 1e-6, 2),
            number(trained.macs, 1e-6),
            number(arm.search_seconds, 1 / 60),
            number(None if search is None else search.images_per_second, 1, 0),
            number(memory, 1e-6, 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if random_cells:
        errors = [100 * arm.trained.test_error for arm in random_cells]
        spread = f" +- {stdev(errors):.2f}" if len(errors) > 1 else ""
        held_out = fmean(100 * (1 - arm.trained.validation_accuracy) for arm in random_cells)
        sizes = fmean(arm.trained.parameters for arm in random_cells)
        macs = fmean(arm.trained.macs for arm in random_cells)
        lines.append(
            f"| {len(random_cells)} random cells | {fmean(errors):.2f}{spread} | {held_out:.2f} | {sizes / 1e6:.2f} | "
            f"{macs / 1e6:,.1f} | 0 | - | - |"
        )
    lines += [
        "",
        "memory: on a GPU the largest allocation; on the CPU what one architecture step keeps for its backward pass, "
        "plus weights, gradients and optimisers.",
    ]
    return "\n".join(lines)
