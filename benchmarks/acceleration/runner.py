"""Measures methods: tuning, seeds, metrics, cost, latency. Finished pieces are kept and not measured again."""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.acceleration import methods
from benchmarks.acceleration.protocol import BUDGETS, Bench, Budget, Method, Sampler
from common.errors import UserError
from common.files import read_object, write_json
from common.ledger import commit, hardware, versions
from common.metrics.judge import ShapesJudge
from common.metrics.measures import EVALUATION_SEED, PromptSet, Yardstick, shapes_prompts
from common.metrics.perceptual import perceptual_distance
from common.paths import WORKPLACE
from common.study import kept, kept_tensors
from common.weights import save_weights

SEEDS = (0, 1, 2)
TUNING_SEED = 100  # of training while tuning: none of the seeds that are reported
VALIDATION_SEED = EVALUATION_SEED + 1  # scenes and noises on which the tuned number is chosen
SHOWN = 12  # images kept of every column, for the same-noise sheets
REFERENCE_STEPS = 50  # of the teacher, for fidelity to it


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure.

    Args:
        images: of every column; tuning_images: of the smallest and largest column while tuning.
        tuning_share: of the training budget that each of the four tries gets.
    """

    images: int = 2048
    tuning_images: int = 256
    tuning_share: float = 0.25
    seeds: tuple[int, ...] = SEEDS
    batch: int = 64


def known_methods() -> dict[str, Method]:
    """Every `methods/<name>.py`, by name; names that begin with an underscore are shared code."""
    found = {}
    for module in sorted(pkgutil.iter_modules(methods.__path__), key=lambda m: m.name):
        if module.name.startswith("_"):
            continue
        method = getattr(importlib.import_module(f"{methods.__name__}.{module.name}"), "METHOD", None)
        if not isinstance(method, Method):
            raise UserError(f"benchmarks/acceleration/methods/{module.name}.py defines no METHOD = Method(...)")
        found[module.name] = method
    return found


class Runner:
    """One budget class on one teacher.

    Args:
        folder: where pieces are kept; below it everything is named after what it depends on.
    """

    def __init__(self, bench: Bench, settings: Settings, folder: Path | None = None) -> None:
        self.bench, self.settings = bench, settings
        key = f"{bench.level}-{bench.teacher.checksum()[:12]}-g{bench.guidance:g}-n{settings.images}"
        self.folder = (folder or WORKPLACE / "runs" / "acceleration") / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._yardsticks: dict[int, Yardstick] = {}

    def yardstick(self, seed: int, count: int) -> Yardstick:
        """Prompts, noises and references of the evaluation set, or of the validation set."""
        if seed not in self._yardsticks:
            teacher = self.bench.teacher
            prompts = shapes_prompts(count, teacher.latent_shape, teacher.image_size[0], seed)
            reference = self._teacher_images(prompts) if seed == EVALUATION_SEED else None
            self._yardsticks[seed] = Yardstick(prompts, ShapesJudge(), reference, perceptual_distance("trained"))
        return self._yardsticks[seed]

    def _teacher_images(self, prompts: PromptSet) -> Tensor:
        """The teacher's 50-step images of the evaluation set, drawn once per teacher and guidance."""

        def drawn() -> dict[str, Tensor]:
            source = self.bench.teacher_source(REFERENCE_STEPS)
            return {"images": self._images(lambda noise, states, _: source(noise, states), prompts, 0)}

        return kept_tensors(self.folder / f"teacher-{REFERENCE_STEPS}-steps.safetensors", drawn)["images"]

    def _images(self, draw: Any, prompts: PromptSet, steps: int) -> Tensor:
        return self.bench.teacher.draw(
            lambda noise, states: draw(noise, states, steps), prompts.prompts, prompts.noise, self.settings.batch
        )

    def tune(self, name: str, method: Method) -> dict[str, Any]:
        """The number of the method's grid with the lowest FD to validation data, and every try.

        Solvers choose for each number of steps (nothing is trained); trained methods choose one learning rate, by the
        mean of log FD over their columns.
        """

        def tried(value: float) -> dict[str, Any]:
            share = self.settings.tuning_share if method.tuned == "learning rate" else 1.0
            budget = Budget(share * BUDGETS[self.bench.level])
            sampler = method.build(self.bench, budget, value, TUNING_SEED)
            yardstick = self.yardstick(VALIDATION_SEED, self.settings.tuning_images)
            found = {
                str(steps): yardstick.measure(self._images(sampler.draw, yardstick.prompts, steps))["fd_data"]
                for steps in method.steps
            }
            return {"value": value, "fd_data": found}

        tries = [
            kept(self.folder / f"{name}-try-{value:g}.json", partial(tried, value), self._tuning)
            for value in method.grid
        ]

        def badness(entry: dict[str, Any], steps: Sequence[int]) -> float:
            values = [entry["fd_data"][str(n)] for n in steps]
            if any(value is None for value in values):  # diverged
                return float("inf")
            return statistics.fmean(torch.tensor(values).clamp(min=1e-6).log().tolist())

        if method.tuned == "guidance":
            chosen = {str(n): min(tries, key=lambda t: badness(t, [n]))["value"] for n in method.steps}
        else:
            best = min(tries, key=lambda t: badness(t, method.steps))["value"]
            chosen = {str(n): best for n in method.steps}
        return {"tuned": method.tuned, "chosen": chosen, "tries": tries}

    def measure(self, name: str, method: Method, seed: int) -> dict[str, Any]:
        """One seed of a method: metrics of every column, what it cost, and its latency."""
        path = self.folder / f"{name}-seed{seed}.json"
        return kept(path, lambda: self._measured(name, method, seed), self._tuning)

    @property
    def _tuning(self) -> dict[str, float]:
        """What a piece depends on that its folder's name does not say."""
        return {"tuning_share": self.settings.tuning_share, "tuning_images": self.settings.tuning_images}

    def _measured(self, name: str, method: Method, seed: int) -> dict[str, Any]:
        tuning = self.tune(name, method)
        yardstick = self.yardstick(EVALUATION_SEED, self.settings.images)
        started, cpu = time.perf_counter(), time.process_time()
        columns, shown = {}, {}
        built: dict[float, tuple[Sampler, Budget]] = {}
        for steps in method.steps:
            value = tuning["chosen"][str(steps)]
            if value not in built:
                budget = Budget(BUDGETS[self.bench.level])
                built[value] = (method.build(self.bench, budget, value, seed), budget)
                seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
            sampler, budget = built[value]
            images = self._images(sampler.draw, yardstick.prompts, steps)
            columns[str(steps)] = {
                **yardstick.measure(images),
                "forwards_per_image": sampler.forwards(steps),
                "latency_ms": self._latency(sampler, yardstick.prompts, steps),
            }
            shown[f"steps_{steps}"] = images[:SHOWN]
        save_weights(self.images_of(name, seed), shown)
        return {
            "method": name,
            "title": method.title,
            "trains": method.trains,
            "seed": seed,
            "budget": self.bench.level,
            "forward_equivalents": budget.spent if method.tuned == "learning rate" else {},
            "trained_parameters": sampler.trained,
            "wall_seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "tuning": {key: tuning[key] for key in ("tuned", "chosen")},
            "steps": columns,
        }

    def images_of(self, name: str, seed: int) -> Path:
        """Where the first images of a seed's columns are kept."""
        return self.folder / f"{name}-seed{seed}.safetensors"

    def _latency(self, sampler: Sampler, prompts: PromptSet, steps: int, repeats: int = 5) -> float:
        """Milliseconds from one prompt to one image, text encoder and decoder included: median of `repeats`."""
        times = []
        one = PromptSet(prompts.prompts[:1], prompts.noise[:1])
        for _ in range(repeats + 1):
            started = time.perf_counter()
            self._images(sampler.draw, one, steps)
            times.append(time.perf_counter() - started)
        return round(1000 * statistics.median(times[1:]), 3)

    def run(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """All seeds of the named methods; frozen solvers have one, since nothing about them is random."""
        found, known = [], known_methods()
        for name in names:
            method = known[name]
            for seed in self.settings.seeds if method.tuned == "learning rate" else self.settings.seeds[:1]:
                started = time.perf_counter()
                result = self.measure(name, method, seed)
                values = ", ".join(f"{n}: {column['fd_data']:.2f}" for n, column in result["steps"].items())
                print(f"{method.title}, seed {seed}: FD {values} ({time.perf_counter() - started:.0f} s)", flush=True)
                found.append(result)
        return found


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds, one entry a (budget, method, steps)."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["budget"], run["method"]), []).append(run)
    rows = []
    for (budget, name), members in groups.items():
        for steps in members[0]["steps"]:
            columns = [member["steps"][steps] for member in members]
            metrics = {}
            for key in columns[0]:
                values = [column[key] for column in columns]
                whole = all(value is not None for value in values)
                metrics[key] = {
                    "mean": statistics.fmean(values) if whole else None,
                    "std": (statistics.stdev(values) if len(values) > 1 else 0.0) if whole else None,
                }
            rows.append(
                {
                    "budget": budget,
                    "method": name,
                    "title": members[0]["title"],
                    "steps": int(steps),
                    "seeds": len(members),
                    "training_forwards": statistics.fmean(sum(m["forward_equivalents"].values()) for m in members),
                    "metrics": metrics,
                }
            )
    return rows


def write_results(path: Path, runs: Sequence[dict[str, Any]], runner: Runner) -> dict[str, Any]:
    """Merge runs into `path`, replacing those of the same (budget, method, seed). Runs of another teacher go.

    Returns the whole content.
    """
    content: dict[str, Any] = read_object(path) if path.is_file() else {}
    checksum = runner.bench.teacher.checksum()
    old = content.get("runs", []) if content.get("teacher", {}).get("sha256") == checksum else []
    fresh = {(run["budget"], run["method"], run["seed"]) for run in runs}
    merged = [r for r in old if (r["budget"], r["method"], r["seed"]) not in fresh] + list(runs)
    merged.sort(key=lambda r: (r["budget"], r["method"], r["seed"]))
    folder = runner.bench.teacher.folder
    content = {
        "teacher": {"name": folder.name if folder else "", "sha256": checksum, "guidance": runner.bench.guidance},
        "judge": ShapesJudge.name,
        "settings": {
            **content.get("settings", {}),
            runner.bench.level: {
                "forward_equivalents": BUDGETS[runner.bench.level],
                "images": runner.settings.images,
                "tuning_share": runner.settings.tuning_share,
                "tuning_images": runner.settings.tuning_images,
            },
        },
        "summary": summary(merged),
        "runs": merged,
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    write_json(path, content)
    return content
