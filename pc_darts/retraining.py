"""The derived network trained from scratch (specification section 2.6), and what it then gets right.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.data.augmentation import Augmentation, Batches
from common.data.classes import ImageSet, Pictures
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import write_atomically, write_json
from pc_darts.config import RetrainOptions
from pc_darts.counting import count
from pc_darts.genotypes import Genotype
from pc_darts.losses import final_loss
from pc_darts.model import FinalNetwork
from pc_darts.schedules import drop_path_ramp, rate
from pc_darts.training import (
    Clock,
    Machine,
    accuracy,
    load_state,
    peak_bytes,
    progress_bar,
    restore,
    save_state,
    seed_step,
    start_peak,
    stop_if_not_finite,
    write_rows,
)

RETRAIN = 3  # stream of random numbers


@dataclass(frozen=True)
class RetrainResult:
    """What a cell is worth on a set.

    Attributes:
        test_accuracy: after the last epoch; the test pictures are looked at once.
        validation_accuracy: on pictures held out of the training set; choices between cells are made on these.
        parameters, macs: of the network without auxiliary head; multiply-adds of one picture.
        history: one row an epoch: epoch, lr, drop_path, train_loss, train_accuracy, seconds.
    """

    genotype: Genotype
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

    def save(self, path: Path) -> None:
        """As JSON, atomically."""
        write_json(path, {**self.__dict__, "genotype": json.loads(self.genotype.to_json())})

    @classmethod
    def load(cls, path: Path) -> RetrainResult:
        """What `save` wrote. Raises UserError when the file is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "genotype": Genotype.parse(json.dumps(content["genotype"]))})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of a training ({error}); delete it to train again") from None


def build_network(genotype: Genotype, options: RetrainOptions, data: ImageSet) -> FinalNetwork:
    """The final network of a cell for these options and pictures."""
    return FinalNetwork(
        genotype,
        options.channels,
        options.layers,
        len(data.classes),
        options.stem,
        options.auxiliary > 0,
        data.channels,
    )


def retrain(
    genotype: Genotype,
    options: RetrainOptions,
    data: ImageSet,
    augment: Augmentation,
    folder: Path,
    seed: int = 0,
    machine: Machine | None = None,
    checkpoint_every: int = 50,
    log_every: int = 10,
    progress: bool = False,
    pictures: Pictures | None = None,
    keep_weights: bool = True,
    stop_after: int | None = None,
    report: Callable[[str], None] | None = None,
) -> RetrainResult:
    """Train a cell's network from scratch and measure it; a finished training is not repeated.

    Args:
        augment: without cutout, which comes from `options`.
        pictures: what to train on; default: the set's training pictures.
        keep_weights: write `folder/model/` for `load_model`.
        stop_after: steps, for tests of interruptions.
        report: called with a sentence after every epoch.

    Raises:
        UserError: a loss that is not finite, a checkpoint of another network, a full disk.
    """
    done = folder / "retrain.json"
    if done.is_file():
        result = RetrainResult.load(done)
        if result.genotype != genotype:
            raise UserError(f"{done} is the result of another cell; choose another --run_dir or delete it")
        return result
    if options.epochs < 1:
        raise UserError(f"retrain.epochs {options.epochs}: expected at least one")
    machine = machine or Machine()
    device = machine.device
    torch.manual_seed(derive_seed(seed, RETRAIN))
    network = build_network(genotype, options, data).to(device)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(
        network.parameters(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    augment = dataclasses.replace(augment, cutout=options.cutout)
    part = data.train if pictures is None else pictures
    place = (machine.rank, machine.world, device)
    batches = Batches(data, part, options.batch_size, derive_seed(seed, RETRAIN), augment, *place)
    steps = batches.steps_per_epoch
    last = options.epochs * steps if stop_after is None else min(stop_after, options.epochs * steps)

    state = load_state(folder, "training", device)
    if state is None:
        state = {"step": 0, "history": [], "rows": [], "sums": [0.0, 0.0, 0.0], "seconds": 0.0, "cpu_seconds": 0.0}
    else:
        if state["genotype"] != genotype.to_json():
            raise UserError(f"{folder} holds the training of another cell; choose another --run_dir or delete it")
        restore(network, state["network"], folder / "last.ckpt")
        optimiser.load_state_dict(state["optimiser"])
    clock = Clock(state["seconds"], state["cpu_seconds"])
    history: list[dict[str, float]] = state["history"]
    rows: list[dict[str, float]] = state["rows"]
    sums: list[float] = state["sums"]  # loss, right answers, when the epoch began
    start_peak(device)
    bar = progress_bar(progress and machine.main, folder.name, state["step"], last)
    step = int(state["step"])
    for x_BCHW, y_B in batches.run(step, last):
        epoch = step // steps
        lr = rate(options.lr_schedule, epoch, options.epochs, options.lr, options.minimum_lr, options.lr_warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        network.train()
        network.drop_path_probability = drop_path_ramp(epoch, options.epochs, options.drop_path)
        seed_step(seed, step, machine.rank)  # dropped paths
        optimiser.zero_grad(set_to_none=True)
        with machine.whole_batch():
            logits_BK, auxiliary_BK = network.forward_with_auxiliary(x_BCHW)
            loss = final_loss(logits_BK, auxiliary_BK, y_B, options.auxiliary, options.smoothing)
            loss.backward()
        machine.average_gradients(network.parameters())
        if options.grad_clip > 0:
            nn.utils.clip_grad_norm_(network.parameters(), options.grad_clip)
        optimiser.step()
        measured = torch.stack([loss.detach(), (logits_BK.argmax(1) == y_B).float().mean()])
        machine.average([measured])
        value, right = measured.tolist()
        step += 1
        stop_if_not_finite(torch.tensor(value), step, folder, "training")
        sums[0] += value
        sums[1] += right
        if step % log_every == 0:
            row = {"step": step, "epoch": epoch, "lr": lr, "loss": value, "accuracy": right}
            rows.append({**row, "seconds": clock.seconds})
        if step % steps == 0:
            entry = {
                "epoch": epoch,
                "lr": lr,
                "drop_path": network.drop_path_probability,
                "train_loss": sums[0] / steps,
                "train_accuracy": sums[1] / steps,
                "seconds": clock.seconds - sums[2],
            }
            history.append(entry)
            if report is not None:
                report(f"epoch {epoch + 1}/{options.epochs}: training accuracy {entry['train_accuracy']:.1%}")
            sums = [0.0, 0.0, clock.seconds]
        if machine.main and (step % checkpoint_every == 0 or step == last):
            saved: dict[str, Any] = {
                "kind": "training",
                "genotype": genotype.to_json(),
                "step": step,
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "history": history,
                "rows": rows,
                "sums": sums,
                "seconds": clock.seconds,
                "cpu_seconds": clock.cpu_seconds,
            }
            save_state(folder, saved)
            if rows:
                write_rows(folder / "log.csv", rows)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    with torch.device("meta"):
        counts = count(build_network(genotype, options, data), data.size, data.channels)
    result = RetrainResult(
        genotype,
        accuracy(network, data, data.test, machine),
        accuracy(network, data, data.validation, machine),
        counts.parameters,
        counts.macs,
        step,
        clock.seconds,
        clock.cpu_seconds,
        peak_bytes(device),
        history,
    )
    if machine.main and step == options.epochs * steps:
        if keep_weights:
            save_model(network, options, data, folder / "model")
        result.save(done)
    machine.wait()
    return result


def save_model(network: FinalNetwork, options: RetrainOptions, data: ImageSet, folder: Path) -> None:
    """Weights (`model.safetensors`, the authors' names) and everything needed to use them (`model.json`)."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path))
    content = {
        "genotype": json.loads(network.genotype.to_json()),
        "channels": options.channels,
        "layers": options.layers,
        "stem": options.stem,
        "auxiliary": options.auxiliary > 0,
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
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        network = FinalNetwork(
            Genotype.parse(json.dumps(about["genotype"])),
            about["channels"],
            about["layers"],
            len(about["classes"]),
            about["stem"],
            about["auxiliary"],
            len(about["mean"]),
        )
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no network ({error}); expected model.json and model.safetensors") from None
    except Exception as error:  # safetensors has an exception of its own for damaged files
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / 'model.safetensors'} is damaged ({error}); train again") from None
    restore(network, weights, folder / "model.safetensors")
    return network.eval(), about
