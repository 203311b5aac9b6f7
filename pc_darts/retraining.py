"""The derived network trained from scratch, and what it then gets right.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.augmentation import Augmentation, Batches
from common.data.classes import ImageSet
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import read_object, write_json
from common.options import RunOptions
from common.weights import load_weights, save_weights
from pc_darts.config import FinalConfig, RetrainOptions
from pc_darts.counting import count
from pc_darts.genotypes import Genotype
from pc_darts.losses import final_loss
from pc_darts.model import FinalNetwork
from pc_darts.schedules import drop_path_ramp
from pc_darts.training import Loop, Machine, Result, accuracy, peak_bytes, seed_step

RETRAIN = 3  # stream of random numbers


@dataclass(frozen=True)
class RetrainResult(Result):
    """What a cell is worth on a set.

    Attributes:
        test_accuracy: after the last epoch; the test pictures are looked at once.
        validation_accuracy: on pictures held out of the training set; choices between cells are made on these.
        parameters, macs: of the network without auxiliary head; multiply-adds of one picture.
        history: one row an epoch: epoch, lr, drop_path, train_loss, train_accuracy, seconds.
    """

    test_accuracy: float
    validation_accuracy: float
    parameters: int
    macs: int
    steps: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None
    history: list[dict[str, float]]

    @property
    def test_error(self) -> float:
        return 1 - self.test_accuracy


class Retraining(Loop[FinalNetwork]):
    """A cell's network trained from scratch.

    Args:
        augment: without cutout, which comes from `options`.
        run: see `Loop`.
    """

    kind = "training"

    def __init__(
        self,
        genotype: Genotype,
        options: RetrainOptions,
        data: ImageSet,
        augment: Augmentation,
        folder: Path,
        seed: int,
        machine: Machine,
        run: RunOptions | None,
    ) -> None:
        if options.epochs < 1:
            raise UserError(f"retrain.epochs {options.epochs}: expected at least one")
        device, stream = machine.device, derive_seed(seed, RETRAIN)
        torch.manual_seed(stream)
        network = FinalNetwork(genotype, options.network(len(data.classes), data.channels))
        # Depthwise convolutions go back several times as fast with channels last, on CPUs too.
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        augment = replace(augment, cutout=options.cutout)
        batches = Batches(data, data.train, options.batch_size, stream, augment, machine.rank, machine.world, device)
        super().__init__(network, list(network.parameters()), options, batches, folder, seed, machine, run)
        self.options = options

    def _one_step(self, *batch: Tensor) -> None:
        x_BCHW, y_B = batch
        options, network = self.options, self.network
        self._begin_step()
        network.drop_path_probability = drop_path_ramp(self.epoch, options.epochs, options.drop_path)
        seed_step(self.seed, self.step)  # dropped paths
        self.optimiser.zero_grad(set_to_none=True)
        with self.machine.whole_batch():
            logits_BK, auxiliary_BK = network.forward_with_auxiliary(x_BCHW)
            loss = final_loss(logits_BK, auxiliary_BK, y_B, options.auxiliary, options.smoothing)
            loss.backward()
        self._end_step(loss, logits_BK, y_B)

    def _end_epoch(self, row: dict[str, Any]) -> None:
        row["drop_path"] = self.network.drop_path_probability

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "genotype": self.network.genotype.to_json()}

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        super()._refuse_other(state)
        if state["genotype"] != self.network.genotype.to_json():
            raise UserError(f"{self.folder} holds the training of another cell; choose another --run_dir or delete it")


def retrain(
    genotype: Genotype,
    options: RetrainOptions,
    data: ImageSet,
    augment: Augmentation,
    folder: Path,
    seed: int = 0,
    machine: Machine | None = None,
    run: RunOptions | None = None,
    keep_weights: bool = True,
    stop_after: int | None = None,
) -> RetrainResult:
    """Train a cell's network from scratch and measure it; a finished training is not repeated.

    Args:
        augment, run: see `Retraining`.
        keep_weights: write `folder/model/` for `load_model`.
        stop_after: steps, for tests of interruptions.

    Raises:
        UserError: a loss that is not finite, a checkpoint of another network, a full disk.
    """
    done = folder / "retrain.json"
    if done.is_file():
        result = RetrainResult.load(done)
        if result.genotype != genotype:
            raise UserError(f"{done} is the result of another cell; choose another --run_dir or delete it")
        return result
    machine = machine or Machine()
    loop = Retraining(genotype, options, data, augment, folder, seed, machine, run)
    loop.train(stop_after)
    network = loop.network
    with torch.device("meta"):
        counts = count(FinalNetwork(genotype, network.config), data.size, data.channels)
    result = RetrainResult(
        genotype,
        accuracy(network, data, data.test, machine),
        accuracy(network, data, data.validation, machine),
        counts.parameters,
        counts.macs,
        loop.step,
        loop.clock.seconds,
        loop.clock.cpu_seconds,
        peak_bytes(machine.device),
        loop.history,
    )
    if machine.main and loop.step == loop.total_steps:
        if keep_weights:
            save_model(network, data, folder / "model")
        result.save(done)
    machine.wait()
    return result


def save_model(network: FinalNetwork, data: ImageSet, folder: Path) -> None:
    """Weights (`model.safetensors`, the authors' names) and everything needed to use them (`model.json`)."""
    save_weights(folder / "model.safetensors", network.state_dict())
    config = network.config
    content = {
        "genotype": json.loads(network.genotype.to_json()),
        "channels": config.channels,
        "layers": config.layers,
        "stem": config.stem,
        "auxiliary": config.auxiliary,
        "classes": list(data.classes),
        "data": data.name,
        "size": data.size,
        "mean": data.mean_C.tolist(),
        "std": data.std_C.tolist(),
    }
    write_json(folder / "model.json", content)


def load_model(folder: Path) -> tuple[FinalNetwork, dict[str, Any]]:
    """The network of `save_model` in eval mode, and the content of its `model.json`.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit each other.
    """
    about = read_object(folder / "model.json", f"{folder} holds no network")
    try:
        classes, channels = len(about["classes"]), len(about["mean"])
        config = FinalConfig(about["channels"], about["layers"], about["stem"], classes, about["auxiliary"], channels)
        network = FinalNetwork(Genotype.parse(json.dumps(about["genotype"])), config)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'model.json'} describes no network ({error}); train again") from None
    load_weights(network, folder / "model.safetensors", against="model.json")
    return network.eval(), about
