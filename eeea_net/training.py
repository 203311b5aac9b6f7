"""The chosen networks trained from scratch (section 4.1.2), and what they then get right.

Everything random in a step is a function of (seed, step): an interrupted training goes on exactly.

Shape suffixes: B batch, C channels, H W sides, K classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common import loops
from common.data.augmentation import Batches, evaluation_batches
from common.data.classes import ImageSet
from common.data.sampling import derive_seed, step_generator
from common.errors import UserError, stop_if_not_finite
from common.files import read_object, reading, write_json
from common.options import RunOptions
from common.weights import load_weights, save_weights
from eeea_net.autoaugment import cifar_policy
from eeea_net.config import DataConfig, NetworkConfig, RetrainOptions, SgdOptions
from eeea_net.counting import count
from eeea_net.data import augmentation
from eeea_net.genotypes import Genotype
from eeea_net.losses import training_loss
from eeea_net.model import Network
from eeea_net.once_for_all import Subnet, from_records
from eeea_net.proxy import EVALUATION_BATCH, compare

STREAM = 2  # of random numbers


@dataclass(frozen=True)
class Trained:
    """What a genotype is worth on a set.

    Attributes:
        test_error: after the last epoch; the test pictures are looked at once. 0..1
        parameters, macs: without the auxiliary head; of one picture.
        history: one row an epoch: epoch, lr, drop_path, loss, accuracy, seconds.
    """

    genotype: Genotype
    test_error: float
    validation_error: float
    parameters: int
    macs: int
    channels: int
    steps: int
    seconds: float
    cpu_seconds: float
    history: list[dict[str, float]]

    def save(self, path: Path) -> None:
        write_json(path, {**self.__dict__, "genotype": self.genotype.fields()})

    @classmethod
    def load(cls, path: Path) -> Trained:
        """What `save` wrote.

        Raises:
            UserError: the file is damaged.
        """
        with reading(path, "delete it, and its work is done again"):
            content = read_object(path, kinds={"test_error": (int, float), "history": list})
            return cls(**{**content, "genotype": Genotype.of(content["genotype"])})


def cutmix_box(share: float, height: int, width: int, centre: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of the part that CutMix pastes: about 1 - `share` of the area, clipped at the borders.

    Args:
        centre: of the part, 0..1 of height and width.
    """
    side = math.sqrt(1 - share)
    middle = (centre[0] * height, centre[1] * width)
    half = (side * height / 2, side * width / 2)
    (top, left), (bottom, right) = (
        [min(max(round(m + sign * h), 0), limit) for m, h, limit in zip(middle, half, (height, width))]
        for sign in (-1, 1)
    )
    return slice(top, bottom), slice(left, right)


def cutmix(x_BCHW: Tensor, y_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """CutMix (Yun et al. 2019) with alpha 1: (mixed pictures, classes of the pasted parts, share of own area)."""
    share, row, column = torch.rand(3, generator=generator).tolist()
    order_B = torch.randperm(len(x_BCHW), generator=generator).to(x_BCHW.device)
    height, width = x_BCHW.shape[2:]
    rows, columns = cutmix_box(share, height, width, (row, column))
    mixed_BCHW = x_BCHW.clone()
    mixed_BCHW[:, :, rows, columns] = x_BCHW[order_B][:, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed_BCHW, y_B[order_B], 1 - pasted / (height * width)


class Stream(Protocol):
    """Batches (pictures, targets) as a function of the step."""

    @property
    def steps_per_epoch(self) -> int: ...

    def run(self, start: int, stop: int) -> Iterator[tuple[Tensor, Any]]: ...


class Loop(loops.Loop):
    """Steps of SGD with a cosine over epochs; `run` finishes them from wherever they were interrupted.

    Args:
        about: what a checkpoint must agree with to be gone on from.
    """

    fused = True  # the optimiser's form; these networks have hundreds of small tensors

    def __init__(
        self,
        network: nn.Module,
        options: SgdOptions,
        epochs: int,
        batches: Stream,
        about: dict[str, Any],
        folder: Path,
        seed: int,
        run: RunOptions,
    ) -> None:
        self.weights = list(network.parameters())
        super().__init__(folder, run, self.weights[0].device)
        self.network, self.options, self.epochs, self.stream = network, options, epochs, batches
        self.about, self.seed = about, seed
        self.optimiser = self.make_optimiser()
        self.seconds = self.cpu_seconds = 0.0  # of the finished training
        self.history: list[dict[str, float]] = []
        self.sums = {"loss": 0.0, "right": 0.0, "seconds": 0.0}  # of the epoch

    @abstractmethod
    def loss(self, x_BCHW: Tensor, y_B: Any, epoch: int) -> tuple[Tensor, Tensor]:
        """(loss, logits [B, K]) of a step in training mode."""

    def right(self, logits_BK: Tensor, y_B: Any) -> Tensor:
        """Share of right answers."""
        return (logits_BK.argmax(1) == y_B).float().mean()

    def make_optimiser(self) -> torch.optim.Optimizer:
        options = self.options
        return torch.optim.SGD(
            self.weights,
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov and options.momentum > 0,
            fused=self.fused,
        )

    def rate(self, epoch: int) -> float:
        """The learning rate of the step, over that at the start."""
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def facts(self) -> dict[str, float]:
        """What the history says of an epoch beside loss and accuracy."""
        return {}

    @property
    def total_steps(self) -> int:
        return self.epochs * self.stream.steps_per_epoch

    def batches(self, first: int, last: int) -> Iterable[tuple[Tensor, Any]]:
        return self.stream.run(first, last)

    def run(self) -> None:
        """`train` to the end."""
        self.train()
        self.seconds, self.cpu_seconds = self.clock.seconds, self.clock.cpu_seconds

    def _after_step(self) -> None:
        if self.step % self.stream.steps_per_epoch == 0:
            self._close_epoch()

    def _one_step(self, x_BCHW: Tensor, y_B: Any) -> None:
        options = self.options
        epoch = self.step // self.stream.steps_per_epoch
        lr = options.lr * self.rate(epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        self.network.train()
        torch.manual_seed(derive_seed(self.seed, STREAM, 2, self.step))  # dropped paths
        self.optimiser.zero_grad(set_to_none=True)
        loss, logits_BK = self.loss(x_BCHW, y_B, epoch)
        loss.backward()
        if options.grad_clip:
            nn.utils.clip_grad_norm_(self.weights, options.grad_clip, foreach=True)
        self.optimiser.step()
        value = float(loss.detach())
        right = float(self.right(logits_BK, y_B))
        stop_if_not_finite(value, self.step + 1, self._place, advice="a lower lr")
        self.sums["loss"] += value
        self.sums["right"] += right
        if (self.step + 1) % self.run_options.log_every == 0:
            self.rows.append({"step": self.step + 1, "epoch": epoch, "lr": lr, "loss": value, "accuracy": right})

    def _close_epoch(self) -> None:
        steps = self.stream.steps_per_epoch
        row = {
            "epoch": self.step // steps - 1,
            "lr": self.optimiser.param_groups[0]["lr"],
            "loss": self.sums["loss"] / steps,
            "accuracy": self.sums["right"] / steps,
            "seconds": self.clock.seconds - self.sums["seconds"],
        }
        self.history.append({**row, **self.facts()})
        self.sums = {"loss": 0.0, "right": 0.0, "seconds": self.clock.seconds}

    def _state(self) -> dict[str, Any]:
        parts = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
        return {**parts, "about": self.about, "history": self.history, "sums": self.sums}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.history, self.sums = state["history"], state["sums"]

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        if state.get("about") != self.about:
            raise UserError(f"{self._place} is of another training; choose another --run_dir, or delete it")


class Training(Loop):
    """A genotype's network on its way from scratch."""

    network: Network
    options: RetrainOptions

    def __init__(
        self,
        genotype: Genotype,
        options: RetrainOptions,
        data: ImageSet,
        pictures: DataConfig,
        folder: Path,
        seed: int,
        device: torch.device,
        run: RunOptions,
    ) -> None:
        stream = derive_seed(seed, STREAM)
        torch.manual_seed(stream)
        network = Network(genotype, options.network(len(data.classes), data.channels))
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        augment = augmentation(pictures, options.cutout, cifar_policy if options.autoaugment else None)
        batches = Batches(data, data.train, options.batch_size, stream, augment, device=device)
        about = {"genotype": genotype.fields()}
        super().__init__(network, options, options.epochs, batches, about, folder, seed, run)

    def loss(self, x_BCHW: Tensor, y_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        options, network = self.options, self.network
        network.drop_path_probability = options.drop_path * epoch / options.epochs
        others_B, share = None, 1.0
        if options.cutmix:
            generator = step_generator(derive_seed(self.seed, STREAM, 1), self.step)
            if float(torch.rand((), generator=generator)) < options.cutmix:
                x_BCHW, others_B, share = cutmix(x_BCHW, y_B, generator)
        logits_BK, auxiliary_BK = network.with_auxiliary(x_BCHW)
        return training_loss(logits_BK, auxiliary_BK, y_B, options.auxiliary, others_B, share), logits_BK

    def facts(self) -> dict[str, float]:
        return {"drop_path": self.network.drop_path_probability}


def train(
    genotype: Genotype,
    options: RetrainOptions,
    data: ImageSet,
    pictures: DataConfig,
    folder: Path,
    seed: int = 0,
    device: torch.device | None = None,
    run: RunOptions | None = None,
    keep_weights: bool = True,
) -> Trained:
    """Train a genotype's network and measure it; a finished training is not repeated.

    Args:
        keep_weights: write `folder/model/` (`load_model`).

    Raises:
        UserError: see `Training.run`; or the folder holds the training of another genotype.
    """
    done, device = folder / "trained.json", device or torch.device("cpu")
    if done.is_file():
        found = Trained.load(done)
        if found.genotype != genotype:
            raise UserError(f"{done} is the result of another cell; choose another --run_dir, or delete it")
        return found
    run = run or RunOptions(checkpoint_every=200, log_every=20, progress=False, logger="none")
    training = Training(genotype, options, data, pictures, folder, seed, device, run)
    training.run()
    network = training.network
    errors = [
        compare(network, list(evaluation_batches(data, part, EVALUATION_BATCH, device)))[0]
        for part in (data.test, data.validation)
    ]
    counts = count(genotype, network.config, data.size)
    found = Trained(
        genotype,
        errors[0],
        errors[1],
        counts.parameters,
        counts.macs,
        options.channels,
        training.step,
        training.seconds,
        training.cpu_seconds,
        training.history,
    )
    if keep_weights:
        save_model(network, data, folder / "model")
    found.save(done)
    return found


def save_model(network: Network, data: ImageSet, folder: Path) -> None:
    """Weights (`model.safetensors`, the authors' names) and what is needed to use them (`model.json`)."""
    save_weights(folder / "model.safetensors", network.state_dict())
    pictures = {"classes": list(data.classes), "data": data.name, "size": data.size}
    scale = {"mean": data.mean_C.tolist(), "std": data.std_C.tolist()}
    about = {"genotype": network.genotype.fields(), "network": network.config.__dict__, **pictures, **scale}
    write_json(folder / "model.json", about)


def load_model(folder: Path) -> tuple[Network | Subnet, dict[str, Any]]:
    """The network of `save_model`, or a member that a run over the once-for-all space exported, in eval mode, and the
    content of its `model.json`.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit each other.
    """
    about = read_object(folder / "model.json", f"{folder} holds no network")
    try:
        network: Network | Subnet
        if "choice" in about:
            network = Subnet.of(*from_records(about["choice"], about["design"]))
        else:
            network = Network(Genotype.of(about["genotype"]), NetworkConfig(**about["network"]))
        len(about["classes"]), len(about["mean"]), int(about["size"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'model.json'} describes no network ({error}); train again") from None
    load_weights(network, folder / "model.safetensors", against="model.json")
    return network.eval(), about
