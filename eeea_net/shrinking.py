"""`train.py --space once_for_all`: the elastic network, trained by progressive shrinking; the search over its members.

Shape suffixes: B batch, C channels, H W sides, K classes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common.data.augmentation import Batches, evaluation_batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.evolution import fronts, generation_random, hypervolume, spread
from common.files import read_object, reading, write_atomically, write_json
from common.ledger import commit, hardware, peak_memory, versions
from common.options import RunOptions
from common.publishing import markdown_table
from common.run_clock import clock_of
from common.stopping import Steps
from common.weights import save_weights
from eeea_net.config import ElasticOptions, EvolutionOptions, RunConfig
from eeea_net.data import augmentation, open_data
from eeea_net.drawing import draw_comparison
from eeea_net.evolution import Member, first_generation
from eeea_net.once_for_all import DESIGNS, Design, Subnet, SubnetChoice, subnet_cost
from eeea_net.supernet import Elastic, Population, Supernet, member_count, phases, recalibrate, resized
from eeea_net.surrogate import ChoiceSpace, Genes, propose
from eeea_net.training import Loop

STREAM = 3  # of random numbers
EVALUATION_BATCH = 250


def elastic_of(options: ElasticOptions) -> Elastic:
    """What may be chosen."""
    return Elastic(*(tuple(getattr(options, name)) for name in ("kernels", "expands", "depths", "resolutions")))


class Shrinking(Loop):
    """One phase: each step trains some members of those that the phase allows, beside the classes by the answers of the
    largest member as it was after the first phase."""

    network: Supernet
    fused = False  # it takes no weights without a gradient, and each step leaves out what its members lack

    def __init__(
        self,
        supernet: Supernet,
        phase: tuple[str, Elastic],
        teacher: Subnet | None,
        options: ElasticOptions,
        batches: Batches,
        folder: Path,
        seed: int,
        run: RunOptions,
    ) -> None:
        self.allowed, self.teacher, self.elastic_options = phase[1], teacher, options
        super().__init__(supernet, options, options.epochs, batches, {"phase": phase[0]}, folder, seed, run)

    def loss(self, x_BCHW: Tensor, y_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        options, stages = self.elastic_options, self.network.stages
        random = np.random.default_rng([self.seed, STREAM, self.step])
        answers_BK = None
        if self.teacher is not None and options.distil:
            with torch.no_grad():
                answers_BK = self.teacher(resized(x_BCHW, x_BCHW.shape[-1])).softmax(-1)
        count = 1 if self.teacher is None else options.members
        total, logits_BK = torch.zeros((), device=x_BCHW.device), x_BCHW
        for _ in range(count):
            logits_BK = self.network(x_BCHW, self.allowed.draw(stages, random))
            total = total + F.cross_entropy(logits_BK, y_B)
            if answers_BK is not None:
                total = total + options.distil * F.cross_entropy(logits_BK, answers_BK)
        return total / count, logits_BK


class OnceForAll:
    """The parts of a run; finished ones are not repeated."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device, self.folder = config, device, Path(config.run_dir)
        options = config.elastic
        self.elastic = elastic_of(options)
        self.data: ImageSet = open_data(config.data, config.seed)
        base = DESIGNS[options.design]
        shape = {"classes": len(self.data.classes), "in_channels": self.data.channels}
        self.design = Design(**{**base.__dict__, **shape})
        self.space = ChoiceSpace(self.elastic, self.design)
        torch.manual_seed(derive_seed(config.seed, STREAM))
        self.supernet = Supernet(self.elastic, self.design).to(device)
        stream = derive_seed(config.seed, STREAM, 0)
        augment = augmentation(config.data, options.cutout)
        self.batches = Batches(self.data, self.data.train, options.batch_size, stream, augment, device=device)
        self._known: dict[str, dict[str, Any]] = {}
        wanted = options.initial + options.rounds * options.proposals
        if wanted > (there := member_count(self.elastic, self.supernet.stages)):
            raise UserError(
                f"--elastic.initial {options.initial}, {options.rounds} rounds of {options.proposals}: the space has "
                f"only {there} members; give fewer, or more choices"
            )
        start = EvolutionOptions(population=options.initial, beta=config.evolution.beta)
        self.first = first_generation(self.space, start, generation_random(config.seed, 0), self.parameters)

    def parameters(self, genes: Genes) -> float:
        """Of a member, in millions: what early exit compares with beta."""
        return subnet_cost(self.space.decode(genes), self.design)[0] / 1e6

    def say(self, sentence: str) -> None:
        if self.config.progress:
            print(sentence, file=sys.stderr, flush=True)

    def train(self) -> None:
        """All phases of progressive shrinking."""
        options, teacher = self.config.elastic, None
        for number, phase in enumerate(phases(self.elastic)):
            if phase[0] == "width 1":
                self.supernet.sort_channels()
            folder = self.folder / "shrinking" / f"{number}_{phase[0].replace(' ', '_')}"
            seed = derive_seed(self.config.seed, STREAM, 1, number) % 2**32
            loop = Shrinking(self.supernet, phase, teacher, options, self.batches, folder, seed, self.config)
            loop.run()
            write_json(folder / "history.json", {"phase": phase[0], "history": loop.history})
            self.say(f"{phase[0]}: loss {loop.history[-1]['loss']:.3f}")
            if teacher is None:
                teacher = self.member(self.supernet.full)

    @cached_property
    def calibration(self) -> Tensor:
        """Training pictures, unchanged."""
        count = min(self.config.elastic.calibration, len(self.data.train))
        order = torch.randperm(len(self.data.train), generator=step_generator(self.config.seed, STREAM))[:count]
        return torch.cat([x for x, _ in self._pictures(self.data.train.part(order.sort().values))])

    def _pictures(self, part: Pictures) -> list[tuple[Tensor, Tensor]]:
        return list(evaluation_batches(self.data, part, EVALUATION_BATCH, self.device))

    @torch.no_grad()
    def error(self, network: Subnet, choice: SubnetChoice, part: Pictures) -> float:
        """Share of wrong answers, 0..1; NaN where an answer is not finite."""
        network, pictures = network.eval(), self._pictures(part)
        return wrong([network(resized(x_BCHW, choice.resolution)) for x_BCHW, _ in pictures], pictures)

    def member(self, choice: SubnetChoice) -> Subnet:
        """Extracted and re-calibrated."""
        return recalibrate(self.supernet.extract(choice), [resized(self.calibration, choice.resolution)])

    def measure(self, members: Sequence[Member[Genes]]) -> list[Member[Genes]]:
        """Validation errors of members; what was measured before is read."""
        path = self.folder / "evaluations.json"
        new = [*{member.key: member for member in members if member.key not in self._known}.values()]
        choices = [self.space.decode(member.chromosome) for member in new]
        pictures = self._pictures(self.data.validation)
        population = Population(self.supernet, self.calibration, [x for x, _ in pictures])
        bar = tqdm(total=len(new), desc="members", disable=not self.config.progress or bool(os.environ.get("CI")))
        with bar, Steps() as steps:
            for number, logits in population.logits(choices):
                entry = {"error": wrong(logits, pictures), "choice": choices[number].__dict__}
                self._known[new[number].key] = entry
                write_json(path, {"evaluations": self._known})
                bar.update()
                steps.ended(lambda: f"the last of {len(self._known)} members is saved in {path}")
        errors = [_number(self._known[member.key]["error"]) for member in members]
        return [
            member.measured(self.objectives(self.space.decode(member.chromosome), error))
            for member, error in zip(members, errors)
        ]

    def objectives(self, choice: SubnetChoice, error: float) -> tuple[float, float]:
        """(error, MACs in millions): section 4.2 has two."""
        return error, subnet_cost(choice, self.design)[1] / 1e6

    def _volume(self, members: Sequence[Member[Genes]]) -> float:
        largest = subnet_cost(self.supernet.full, self.design)[1] / 1e6
        values = np.reshape([member.objectives for member in members], (-1, 2))
        return hypervolume(values, (1.0, largest), ideal=(0.0, 0.0))

    def search(self) -> dict[str, Any]:
        """Early-exit initialisation, then rounds of surrogate and measurement; beside as many random members."""
        config, options = self.config, self.config.elastic
        path = self.folder / "evaluations.json"
        if path.is_file():
            with reading(path):
                self._known = read_object(path, kinds={"evaluations": dict})["evaluations"]
                [entry["error"] for entry in self._known.values()]

        measured = self.measure(self.first.members)
        rounds: list[dict[str, Any]] = []
        volumes = [self._volume(measured)]
        for number in range(options.rounds):
            genes, name, tau = propose(self.space, measured, options.proposals, config.seed, number)
            measured += self.measure([Member(one, self.space.key(one)) for one in genes])
            volumes.append(self._volume(measured))
            rounds.append({"surrogate": name, "tau": tau, "hypervolume": volumes[-1]})
            self.say(f"round {number}: {name} (tau {tau:.2f}), HV {volumes[-1]:.4f}")
        blind = EvolutionOptions(population=len(measured), beta=0.0)
        drawn = first_generation(self.space, blind, generation_random(config.seed, 0), self.parameters)
        random = self.measure(drawn.members) if config.compare.random_search else []
        return {"measured": measured, "random": random, "rounds": rounds, "volumes": volumes}

    def finish(self, found: dict[str, Any]) -> dict[str, Any]:
        """Choose along the front, export, and write table.md, metrics.json and comparison.png."""
        measured: list[Member[Genes]] = found["measured"]
        front = sorted((measured[i] for i in fronts([m.objectives for m in measured])[0]), key=lambda m: m.objectives)
        chosen = [front[i] for i in spread([m.objectives for m in front], self.config.evolution.keep)]
        rows: list[dict[str, Any]] = []
        for number, member in enumerate([*chosen, None]):
            choice = self.supernet.full if member is None else self.space.decode(member.chromosome)
            name = "largest" if member is None else f"member_{number}"
            network = self.member(choice)
            raw = self.error(self.supernet.extract(choice), choice, self.data.validation)
            parameters, macs = subnet_cost(choice, self.design)
            row: dict[str, Any] = {
                "name": name,
                "test_error": self.error(network, choice, self.data.test),
                "error_before": raw,
            }
            row |= {"validation_error": self.error(network, choice, self.data.validation)}
            row |= {"parameters": parameters, "macs": macs, "choice": choice.__dict__}
            rows.append(row)
            save_weights(self.folder / name / "model.safetensors", network.state_dict())
            about: dict[str, Any] = {"choice": choice.__dict__, "design": self.design.__dict__, "data": self.data.name}
            about |= {"classes": list(self.data.classes), "size": choice.resolution}
            about |= {"mean": self.data.mean_C.tolist(), "std": self.data.std_C.tolist()}
            write_json(self.folder / name / "model.json", about)
        gains = [row["error_before"] - row["validation_error"] for row in rows]
        gains = [gain for gain in gains if math.isfinite(gain)]
        random: list[Member[Genes]] = found["random"]
        content = {
            "data": {"name": self.data.name, "classes": len(self.data.classes), "test": len(self.data.test)},
            "networks": rows,
            "accepted": self.first.accepted,
            "measured": len(measured),
            "rounds": found["rounds"],
            "hypervolume": found["volumes"][-1],
            "hypervolume_random": self._volume(random) if random else None,
            "recalibration_gain": float(np.mean(gains)) if gains else None,
            "seconds": clock_of(self.folder).keep(),
            "peak_memory_bytes": peak_memory(),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
        }
        write_json(self.folder / "metrics.json", content)
        write_atomically(self.folder / "table.md", lambda path: path.write_text(table(content), encoding="utf-8"))
        draw_comparison(
            {
                name: {
                    "evaluations": range(1, len(of) + 1),
                    "hypervolume": [self._volume(of[:count]) for count in range(1, len(of) + 1)],
                    "front": [m.objectives for m in of],
                }
                for name, of in (("surrogate search", measured), ("random", random))
                if of
            },
            self.folder / "comparison.png",
            "Members of the elastic network as they were measured: hypervolume so far, and error against MACs.",
            "MACs M",
            "members measured",
        )
        return content


def wrong(logits: Sequence[Tensor], pictures: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of wrong answers, 0..1; NaN where an answer is not finite."""
    if not all(torch.isfinite(one).all() for one in logits):
        return math.nan
    missed = sum(int((one.argmax(1) != y_B).sum()) for one, (_, y_B) in zip(logits, pictures, strict=True))
    return missed / sum(len(y_B) for _, y_B in pictures)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def table(content: dict[str, Any]) -> str:
    """The chosen members and the largest one as Markdown."""
    head = [
        "member",
        "resolution",
        "test error %",
        "validation error %",
        "before re-calibration %",
        "params M",
        "MACs M",
    ]
    rows = [
        [
            row["name"],
            str(row["choice"]["resolution"]),
            f"{100 * row['test_error']:.2f}",
            f"{100 * row['validation_error']:.2f}",
            f"{100 * row['error_before']:.2f}",
            f"{row['parameters'] / 1e6:.3f}",
            f"{row['macs'] / 1e6:.2f}",
        ]
        for row in content["networks"]
    ]
    data = content["data"]
    text = (
        f"{data['name']}, {data['classes']} classes, {data['test']:,} test pictures\n\n{markdown_table(head, rows)}\n"
    )
    random = content["hypervolume_random"]
    beside = f", random members {random:.4f}" if random is not None else ""
    return f"{text}\n{content['measured']} members measured; hypervolume {content['hypervolume']:.4f}{beside}\n"


def run(config: RunConfig, device: torch.device, begin: Any) -> dict[str, Any]:
    """Train, search, export. Returns what metrics.json holds.

    Args:
        begin: called with the opened data before anything is written.
    """
    parts = OnceForAll(config, device)
    begin(parts.data)
    parts.train()
    return parts.finish(parts.search())
