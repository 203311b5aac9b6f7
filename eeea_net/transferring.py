"""What `transfer.py` does: backbones of equal MACs, each trained to classify, then with a task's head, and measured.

Shape suffixes: B batch, C channels, H W sides, K classes.
"""

from __future__ import annotations

import math
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.augmentation import Batches, evaluation_batches
from common.data.cache import fingerprint_strings
from common.data.classes import ImageSet
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import file_sha256, read_object, reading, write_atomically, write_json
from common.images import make_grid, save_png
from common.ledger import commit, hardware, peak_memory, versions
from common.publishing import markdown_table
from common.run_clock import clock_of
from common.weights import check_weights, load_weights, read_weights, save_weights
from eeea_net.backbones import Backbone, Plan, plan_of
from eeea_net.data import augmentation, open_data
from eeea_net.model import Network
from eeea_net.once_for_all import Subnet
from eeea_net.proxy import EVALUATION_BATCH, compare
from eeea_net.scenes import SceneBatches, open_scenes
from eeea_net.scores import check_installed
from eeea_net.tasks import KINDS, TILE, Task
from eeea_net.training import Loop
from eeea_net.transfer_config import FitOptions, PretrainOptions, TransferConfig

STREAM = 4  # of random numbers
POLY = 0.9
FALLS = (90 / 140, 120 / 140)  # of SimpleBaseline's rate, each to a tenth
RGB = 3


class Pretraining(Loop):
    """A classifier on its way from scratch."""

    options: PretrainOptions

    def loss(self, x_BCHW: Tensor, y_B: Any, epoch: int) -> tuple[Tensor, Tensor]:
        logits_BK = self.network(x_BCHW)
        return F.cross_entropy(logits_BK, y_B), logits_BK


class Fitting(Loop):
    """Backbone and head on their way."""

    options: FitOptions
    stream: SceneBatches

    def __init__(self, network: nn.Module, task: Task, *rest: Any) -> None:
        self.task = task
        super().__init__(network, *rest)

    def make_optimiser(self) -> torch.optim.Optimizer:
        options = self.options
        backbone: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, weight in self.network.named_parameters():
            (backbone if name.startswith("backbone.") else head).append(weight)
        groups = [{"params": backbone, "scale": options.backbone_rate}, {"params": head, "scale": 1.0}]
        if options.optimiser == "adam":
            return torch.optim.Adam(groups, options.lr, weight_decay=options.weight_decay, fused=True)
        nesterov = options.nesterov and options.momentum > 0
        settings: dict[str, Any] = {"momentum": options.momentum, "weight_decay": options.weight_decay}
        return torch.optim.SGD(groups, options.lr, nesterov=nesterov, fused=True, **settings)

    def rate(self, epoch: int) -> float:
        return rate(self.options, self.step, self.total_steps)

    def loss(self, x_BCHW: Tensor, y_B: Any, epoch: int) -> tuple[Tensor, Tensor]:
        return self.task.loss(self.network(x_BCHW), y_B)

    def right(self, logits_BK: Tensor, y_B: Any) -> Tensor:
        return logits_BK  # the task's own share


def rate(options: FitOptions, step: int, steps: int) -> float:
    """The learning rate of a step, over that at the start."""
    done = step / steps
    if options.schedule == "cosine":
        value = (1 + math.cos(math.pi * done)) / 2
    elif options.schedule == "poly":
        value = (1 - done) ** POLY
    else:
        value = 0.1 ** sum(done >= fall for fall in FALLS)
    return value * min(1.0, (step + 1) / options.warm_up) if options.warm_up else value


class Transfer:
    """The parts of a run, each backbone in a folder of its own; finished parts are not repeated.

    Args:
        classifiers: where backbones are trained to classify, if several runs share them; by default in their folders.
    """

    def __init__(self, config: TransferConfig, device: torch.device, classifiers: Path | None = None) -> None:
        if config.task != "segmentation":
            check_installed()
        self.config, self.device, self.folder = config, device, Path(config.run_dir)
        self.classifiers = classifiers or self.folder
        self.channels = self.pictures.channels if config.pretrain.epochs else RGB
        self.train, self.test = (part.in_channels(self.channels) for part in open_scenes(config.data, config.seed))
        self.task = KINDS[config.task](self.train, config.head, config.data.size)
        scale = self.train.scale
        seed = derive_seed(config.seed, STREAM, 1)
        shared: tuple[Any, ...] = (config.augment, config.data.size, scale, device)
        self.batches = SceneBatches(self.train, config.task, config.fit.batch_size, seed, *shared)
        self.test_batches = SceneBatches(self.test, config.task, min(50, len(self.test)), seed, *shared)

    @cached_property
    def pictures(self) -> ImageSet:
        """What is classified before the transfer; scenes are grey where these are."""
        return open_data(self.config.pretrain.data, self.config.seed)

    @property
    def contents(self) -> str:
        """Fingerprint of all pictures."""
        values = [str(part.images_NCHW.double().sum().item()) for part in (self.train, self.test)]
        return fingerprint_strings([*values, self.pictures.contents if self.config.pretrain.epochs else ""])

    @staticmethod
    def made_of(plans: list[Plan]) -> str:
        """Fingerprint of the backbones that came with weights."""
        files = [plan.source / "model.safetensors" for plan in plans if plan.source is not None]
        return fingerprint_strings([file_sha256(file) for file in files])

    def plans(self) -> list[Plan]:
        """The backbones: the first as it is, the others at its MACs.

        Raises:
            UserError: a name that is none, or weights that do not fit.
        """
        config = self.config
        found: list[Plan] = []
        classes = len(self.pictures.classes) if config.pretrain.epochs else 1000
        for name in (config.backbone, *config.beside):
            like = found[0] if found else None
            sizes = (classes, self.channels, config.layers, like, config.data.size, config.first_stride)
            found.append(plan_of(name, *sizes))
            if self.name(found[-1]) in map(self.name, found[:-1]):
                raise UserError(f"--beside {name}: another backbone is called {found[-1].name} too; rename its folder")
            self.task.network(Backbone.of(self._empty(found[-1]), config.first_stride))
        return found

    @staticmethod
    def _empty(plan: Plan) -> Subnet | Network:
        with torch.device("meta"):
            return plan.build()

    @staticmethod
    def name(plan: Plan) -> str:
        return plan.name.lower()

    def say(self, sentence: str) -> None:
        if self.config.progress:
            print(sentence, file=sys.stderr, flush=True)

    def classifier(self, plan: Plan) -> tuple[Subnet | Network, float | None]:
        """The network with weights of a classifier, and its test error in 0..1 if it was trained here."""
        config, folder = self.config, self.classifiers / self.name(plan) / "pretrain"
        torch.manual_seed(derive_seed(config.seed, STREAM, 0))
        network = plan.build()
        given = config.weights if plan.name == Path(config.backbone).name else None
        if given is not None:
            weights, wanted = (
                {name: value for name, value in state.items() if not name.startswith("classifier.")}
                for state in (read_weights(Path(given), "--weights")[0], network.state_dict())
            )
            check_weights(weights, wanted, f"--weights {given}", plan.name)
            network.load_state_dict(weights, strict=False)
            return network, None
        if plan.weights is not None and config.inherit:
            network.load_state_dict(plan.weights)
            return network, None
        if not config.pretrain.epochs:
            return network, None
        options, data = config.pretrain, self.pictures
        stream = derive_seed(config.seed, STREAM, 2)
        augment = augmentation(options.data, options.cutout)
        batches = Batches(data, data.train, options.batch_size, stream, augment, device=self.device)
        about = {"backbone": self.name(plan), "macs": plan.macs(config.data.size, config.first_stride)}
        network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        loop = Pretraining(network, options, options.epochs, batches, about, folder, config.seed, config)
        loop.run()
        pictures = list(evaluation_batches(data, data.test, EVALUATION_BATCH, self.device))
        return network, compare(network, pictures)[0]

    def one(self, plan: Plan) -> dict[str, Any]:
        """Train a backbone and its head and measure them; what is finished is not repeated."""
        config, folder = self.config, self.folder / self.name(plan)
        done = folder / "trained.json"
        macs = plan.macs(config.data.size, config.first_stride)
        if done.is_file():
            with reading(done, "delete it, and its work is done again"):
                found = read_object(done, kinds={"scores": dict, "macs": int})
            if found["macs"] != macs:
                raise UserError(f"{done} is the result of another backbone; choose another --run_dir, or delete it")
            return found
        classifier, error = self.classifier(plan)
        shown = f", classification error {error:.2%}" if error is not None else ""
        self.say(f"{plan.name}: {macs / 1e6:.2f} M MACs{shown}; {config.task}, {config.fit.epochs} epochs")
        torch.manual_seed(derive_seed(config.seed, STREAM, 3))
        backbone = Backbone.of(classifier, config.first_stride)
        network = self.task.network(backbone)
        network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        about = {"backbone": self.name(plan), "macs": macs, "task": config.task}
        rest = (config.fit, config.fit.epochs, self.batches, about, folder, config.seed, config)
        loop = Fitting(network, self.task, *rest)
        loop.run()
        scores = self.scores(network)
        row = {
            "name": plan.name,
            "scores": scores,
            "macs": macs,
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "backbone_parameters": sum(weight.numel() for weight in backbone.parameters()),
            "classification_error": error,
            "steps": loop.step,
            "cpu_seconds": loop.cpu_seconds,
            "history": loop.history,
        }
        save_weights(folder / "model" / "model.safetensors", network.state_dict())
        mean_C, std_C = self.train.scale
        about = {**about, "classes": list(self.train.classes), "size": config.data.size, "data": self.train.name}
        write_json(folder / "model" / "model.json", {**about, "mean": mean_C.tolist(), "std": std_C.tolist()})
        write_json(done, row)
        self.say(f"{plan.name}: {', '.join(f'{name} {100 * value:.2f}' for name, value in scores.items())}")
        return read_object(done)

    @torch.no_grad()
    def scores(self, network: nn.Module) -> dict[str, float]:
        """The task's measures on the test pictures, 0..1."""
        return self.task.measure(network.eval(), self.test_batches.test())

    def write(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """table.md and metrics.json of what there is so far; returns metrics.json's content."""
        config = self.config
        content = {
            "task": config.task,
            "metric": self.task.metric,
            "data": {"name": self.train.name, "train": len(self.train), "test": len(self.test)},
            "networks": [{key: value for key, value in row.items() if key != "history"} for row in rows],
            "seconds": clock_of(self.folder).keep(),
            "peak_memory_bytes": peak_memory(),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
        }
        write_json(self.folder / "metrics.json", content)
        write_atomically(self.folder / "table.md", lambda path: path.write_text(table(content), encoding="utf-8"))
        return content

    @torch.no_grad()
    def draw(self, plans: list[Plan]) -> None:
        """predictions.png: test pictures with the truth, below them with what each network predicts."""
        batch = next(self.test_batches.test())
        count = min(self.config.pictures, len(batch[0]))
        batch = (batch[0][:count], {name: value[:count] for name, value in batch[1].items()})
        mean_C, std_C = (value[:, None, None] for value in self.train.scale)
        pixels = ((batch[0].cpu() * std_C + mean_C) * 255).round().clamp(0, 255).byte()
        pixels_NHWC = pixels.expand(-1, RGB, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        side, rows, captions = TILE * self.config.data.size, [], []
        for plan in (None, *plans):
            drawn = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in pixels_NHWC]
            self.task.draw(self._trained(plan) if plan is not None else None, batch, drawn)
            rows += [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).view(side, side, 3) for one in drawn]
            captions += [plan.name if plan is not None else "truth"] * count
        grid = make_grid(torch.stack(rows).permute(0, 3, 1, 2), count, captions, side)
        save_png(grid, self.folder / "predictions.png")

    def _trained(self, plan: Plan) -> nn.Module:
        network = self.task.network(Backbone.of(plan.build(), self.config.first_stride))
        load_weights(network, self.folder / self.name(plan) / "model" / "model.safetensors", against=plan.name)
        return network.to(self.device).eval()


def table(content: dict[str, Any]) -> str:
    """The networks as Markdown."""
    names = list(content["networks"][0]["scores"])
    head = ["backbone", *(f"{name} %" for name in names), "params M", "backbone MACs M", "classification error %"]
    rows = []
    for row in content["networks"]:
        scores = [_percent(row["scores"][name]) for name in names]
        sizes = [f"{row['parameters'] / 1e6:.3f}", f"{row['macs'] / 1e6:.2f}"]
        rows.append([row["name"], *scores, *sizes, _percent(row["classification_error"])])
    data = content["data"]
    return f"{content['task']} on {data['name']}, {data['test']:,} test pictures\n\n{markdown_table(head, rows)}\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
