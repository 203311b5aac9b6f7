"""What `train.py` does: evolve, choose, draw and train; unfiltered and random search and other cells beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.data.classes import ImageSet
from common.errors import UserError
from common.events import Board
from common.files import write_atomically, write_json
from common.ledger import commit, hardware, peak_memory, versions
from common.publishing import markdown_table
from common.run_clock import clock_of
from eeea_net.config import EvolutionOptions, RetrainOptions, RunConfig
from eeea_net.counting import count
from eeea_net.data import open_data
from eeea_net.drawing import draw_comparison, draw_generation, draw_genotype
from eeea_net.genotypes import Genotype
from eeea_net.model import Network
from eeea_net.proxy import Lesson, Setting
from eeea_net.search import Evaluator, Generation, Scale, Search
from eeea_net.space import Space
from eeea_net.training import Trained, Training, train

OURS = "eeea_net"
NARROWEST_SE = 16  # channels of a cell's output
WIDEST = 512  # channels tried for a cell of equal parameters


@dataclass(frozen=True)
class Row:
    """A trained network of the table and the search that it comes from, if any."""

    name: str
    trained: Trained
    search: Search | None = None


def pick_device(name: str) -> torch.device:
    """The device of an option.

    Raises:
        UserError: `cuda` was asked for and there is none, or several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a run of eeea_net is one process; its networks are trained by several with --engine processes "
            "--workers N, or on a cluster with --engine ray"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    cuda = name != "cpu" and torch.cuda.is_available()
    torch.backends.cudnn.benchmark = cuda  # the same few shapes of convolution come again and again
    return torch.device("cuda" if cuda else "cpu")


def random_search(options: EvolutionOptions, evaluations: int) -> EvolutionOptions:
    """As many random networks, in one generation."""
    return replace(options, population=max(4, evaluations), generations=1, beta=0.0, filter_children=False, seeds=[])


class Comparison:
    """The parts of a run, each in a folder of its own; finished parts are not repeated."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.folder = config, Path(config.run_dir)
        self.device = pick_device(config.device)
        self.data: ImageSet = open_data(config.data, config.seed)
        self.space = Space.of(config.cell)
        self.scale = Scale(self.space, config.large)
        self.setting = Setting(config.data, config.proxy, config.seed, str(self.device))
        self._trained: dict[tuple[Genotype, RetrainOptions], Trained] = {}

    def check(self) -> None:
        """Refuse what would fail after work has begun; writes nothing.

        Raises:
            UserError: naming what does not fit.
        """
        config = self.config
        if not len(self.data.test):
            raise UserError(f"{self.data.name}: no picture is left for testing; give more")
        cells = [Genotype.load(name) for name in config.compare.genotypes]
        cell = Genotype.load(config.genotype) if config.genotype else (cells or [Genotype.load("EEEA_C")])[0]
        self._training(cell, config.retrain)
        if config.genotype is None:
            Lesson(self.setting, self.data)
            if config.proxy.se and config.proxy.channels < NARROWEST_SE:
                raise UserError(
                    f"--proxy.se true needs --proxy.channels {NARROWEST_SE} or more: a cell may give out one block"
                )
            with torch.device("meta"):
                Network(cell, config.proxy.network(len(self.data.classes), self.data.channels))
            seeds = [self.space.encode(Genotype.load(name)) for name in config.evolution.seeds]
            if len(seeds) > config.evolution.population:
                raise UserError(f"--evolution.seeds: {len(seeds)} cells are more than the population")

    def _training(self, genotype: Genotype, options: RetrainOptions) -> Training:
        config = self.config
        return Training(genotype, options, self.data, config.data, self.folder, config.seed, self.device, config)

    def say(self, sentence: str) -> None:
        if self.config.progress:
            print(sentence, file=sys.stderr, flush=True)

    def search(self, name: str, options: EvolutionOptions) -> Search:
        """Finish a search in `<run>/<name>`; what another search of the run has trained is not trained again."""
        config = self.config
        evaluations = self.folder / "evaluations.json"
        evaluator = Evaluator(self.setting, self.space, evaluations, config.engine, config.workers, config.progress)

        board = Board(self.folder / name, config.logger)

        def after(generations: list[Generation]) -> None:
            last = generations[-1]
            front = len(last.front)
            let_in = f", {last.accepted:.0%} of {last.draws} draws let in" if last.accepted is not None else ""
            self.say(f"{name}: generation {last.number}, {front} on the front, HV {last.hypervolume:.4f}{let_in}")
            everyone = {m.key: m.objectives for generation in generations for m in generation.members}
            own = {m.key: m.objectives for m in last.members}
            draw_generation(
                [values for key, values in everyone.items() if key not in own],
                list(own.values()),
                [everyone[key] for key in last.front],
                [generation.hypervolume for generation in generations],
                self.folder / name / "generations" / f"{last.number:03d}.png",
                f"{name}, generation {last.number}: the front and its hypervolume.",
            )
            best = min(values[0] for values in everyone.values())
            row = {"step": last.number + 1, "hypervolume": last.hypervolume, "front": front, "best_error": best}
            board.keep([row], last.number + 1)

        found = Search(options, self.scale, evaluator, self.folder / name, config.seed, after)
        with board:
            found.run()
        if not found.chosen():
            raise UserError(f"{name}: every network diverged; try a lower --proxy.lr")
        self._export(name, found)
        return found

    def _export(self, name: str, search: Search) -> None:
        """pareto.json: the front over all generations with its genotypes, and what the search cost."""
        generations = search.generations
        front = [
            {
                "key": member.key,
                **dict(zip(("error", "parameters_m", "macs_m"), member.objectives)),
                "genotype": self.space.decode(member.chromosome).fields(),
            }
            for member in search.front()
        ]
        content = {
            "front": front,
            "chosen": [member.key for member in search.chosen()],
            "hypervolume": [generation.hypervolume for generation in generations],
            "population_hypervolume": [generation.population_hypervolume for generation in generations],
            "accepted": generations[0].accepted,
            "draws": generations[0].draws,
            "costs": search.costs(),
        }
        write_json(self.folder / name / "pareto.json", content)

    def train(self, name: str, genotype: Genotype, options: RetrainOptions | None = None) -> Trained:
        """Draw a genotype and finish its training in `<run>/<name>`; one that two searches chose is trained once."""
        config, folder = self.config, self.folder / name
        options = options or config.retrain
        draw_genotype(genotype, folder, name)
        if (genotype, options) not in self._trained:
            self.say(f"{name}: training from scratch, {options.epochs} epochs")
            found = train(genotype, options, self.data, config.data, folder, config.seed, self.device, config)
            self._trained[genotype, options] = found
        found = self._trained[genotype, options]
        self.say(f"{name}: test error {found.test_error:.2%}, {found.parameters / 1e6:.3f} M parameters")
        return found

    def best_of(self, name: str, search: Search) -> Row:
        """The most accurate network of a search, trained."""
        return Row(name, self.train(name, self.space.decode(search.front()[0].chromosome)), search)

    def equal_parameters(self, genotype: Genotype, parameters: int) -> RetrainOptions:
        """The recipe with the width at which a genotype's network comes nearest to so many parameters."""
        options = self.config.retrain

        def distance(channels: int) -> float:
            network = replace(options, channels=channels).network(len(self.data.classes), self.data.channels)
            return abs(count(genotype, network, self.data.size).parameters - parameters)

        return replace(options, channels=min(range(2, WIDEST, 2), key=distance))

    def filtered(self) -> tuple[Search, list[Row]]:
        """The paper's search; networks along its front, trained."""
        search = self.search(OURS, self.config.evolution)
        rows = []
        for number, member in enumerate(search.chosen()):
            name = f"{OURS}_{number}"
            rows.append(Row(name, self.train(name, self.space.decode(member.chromosome)), search))
        return search, rows

    def others(self, ours: Search, best: Trained) -> tuple[dict[str, Search], list[Row]]:
        """What stands beside it: the same evolution without beta, random search, published cells of equal size."""
        config, searches, rows = self.config, {}, []
        evolution = config.evolution
        if config.compare.unfiltered and evolution.beta:
            options = replace(evolution, beta=0.0, filter_children=False)
            searches["unfiltered"] = self.search("unfiltered", options)
        if config.compare.random_search:
            count_of = int(ours.costs()["evaluations"])
            searches["random_search"] = self.search("random_search", random_search(evolution, count_of))
        rows += [self.best_of(f"{name}_0", search) for name, search in searches.items()]
        for name in config.compare.genotypes:
            genotype = Genotype.load(name)
            options_of = self.equal_parameters(genotype, best.parameters)
            rows.append(Row(Path(name).stem, self.train(f"given_{Path(name).stem}", genotype, options_of)))
        return searches, rows

    def given(self, name: str) -> list[Row]:
        """A cell that needs no search."""
        return [Row(Path(name).stem, self.train("given", Genotype.load(name)))]

    def write(self, rows: Sequence[Row], searches: dict[str, Search]) -> dict[str, Any]:
        """table.md, metrics.json and comparison.png of what there is so far; returns metrics.json's content."""
        data = self.data
        sizes = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
        content = {
            "data": {"name": data.name, "classes": len(data.classes), **sizes},
            "networks": [_figures(row) for row in rows],
            "searches": {
                name: {
                    **search.costs(),
                    "hypervolume": search.generations[-1].hypervolume,
                    "best_validation_error": search.best_error(),
                    "accepted": search.generations[0].accepted,
                }
                for name, search in searches.items()
            },
            "seconds": clock_of(self.folder).keep(),
            "peak_memory_bytes": peak_memory(),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
        }
        write_json(self.folder / "metrics.json", content)
        text = table(content)
        write_atomically(self.folder / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
        if searches:
            curves = {name: curve(search) for name, search in searches.items()}
            caption = "Hypervolume over the networks that each search trained, and the fronts at the end."
            draw_comparison(curves, self.folder / "comparison.png", caption)
        return content


def curve(search: Search) -> dict[str, Any]:
    """Hypervolume over networks trained, and the front; of random search, in the order in which they were drawn."""
    seen: set[str] = set()
    evaluations, volumes, values = [], [], []
    alone = len(search.generations) == 1
    for generation in search.generations:
        for member in generation.members:
            if member.key in seen:
                continue
            seen.add(member.key)
            values.append(member.objectives)
            if alone and len(seen) % max(1, len(generation.members) // 12) == 0:
                evaluations.append(len(seen))
                volumes.append(search.scale.hypervolume(values))
        if not alone:
            evaluations.append(len(seen))
            volumes.append(generation.hypervolume)
    return {"evaluations": evaluations, "hypervolume": volumes, "front": [m.objectives for m in search.front()]}


def _figures(row: Row) -> dict[str, Any]:
    trained = row.trained
    names = ("test_error", "validation_error", "parameters", "macs", "channels", "seconds", "cpu_seconds")
    return {"name": row.name, **{name: getattr(trained, name) for name in names}, "genotype": trained.genotype.fields()}


def table(content: dict[str, Any]) -> str:
    """Networks and searches as Markdown."""
    data = content["data"]
    head = ["network", "channels", "test error %", "validation error %", "params M", "MACs M"]
    rows = [
        [
            one["name"],
            str(one["channels"]),
            f"{100 * one['test_error']:.2f}",
            f"{100 * one['validation_error']:.2f}",
            f"{one['parameters'] / 1e6:.3f}",
            f"{one['macs'] / 1e6:.1f}",
        ]
        for one in content["networks"]
    ]
    text = (
        f"{data['name']}, {data['classes']} classes, {data['test']:,} test pictures\n\n{markdown_table(head, rows)}\n"
    )
    if content["searches"]:
        head = ["search", "networks trained", "their parameters M", "CPU min", "best validation error %", "hypervolume"]
        rows = [
            [
                name,
                str(int(of["evaluations"])),
                f"{of['parameters_m']:.0f}",
                f"{of['cpu_seconds'] / 60:.1f}",
                f"{100 * of['best_validation_error']:.2f}",
                f"{of['hypervolume']:.4f}",
            ]
            for name, of in content["searches"].items()
        ]
        text += f"\n{markdown_table(head, rows)}\n"
    return text
