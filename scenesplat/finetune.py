"""Fine-tune an encoder of Gaussians with labels: a linear head, cross-entropy and Lovasz, measured on unseen rooms.

    python scenesplat/finetune.py                                  # configs/finetune.yaml: four labelled rooms, scratch
    python scenesplat/finetune.py --init_from runs/scenesplat-pretrain/encoder --run_dir runs/scenesplat-tuned
    python scenesplat/finetune.py --init_from ENCODER --loss.frozen true           # a linear probe
    python scenesplat/finetune.py --data.name scenes --data.path SCENES --measure.views 13         # own scenes
    python scenesplat/evaluate.py --model runs/scenesplat-finetune/model --scenes SCENES

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, tuning/ (checkpoints, logs, weights), model/ and metrics.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import UserError, run_main
from scenesplat.pretrain_config import FinetuneConfig

if TYPE_CHECKING:
    from scenesplat.data import SceneData
    from scenesplat.export import LabelModel

CONFIGS = Path(__file__).parent / "configs"
STAGE = Path("tuning")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tune, write the model and measure it; returns the metrics."""
    config, text = parse_config(FinetuneConfig, CONFIGS / "finetune.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.data.cache import fingerprint_tensors
    from common.options import free_options
    from common.processes import is_main_process
    from common.training import booked, open_run, write_metrics
    from scenesplat.data import open_scenes
    from scenesplat.evaluate import labels_measured, report
    from scenesplat.run import PLACES

    check(config)
    opened = open_run(config, text, free_options("measure"), PLACES)
    folder, seconds = opened.path, dict[str, float]()
    with booked(seconds, "scenes"):
        scenes = open_scenes(config.data, "train", None, config.seed)
    check_scenes(config, scenes)
    model = new_model(config, scenes.classes)
    inputs = {"data": scenes.fingerprint}
    if config.init_from:
        inputs["weights"] = fingerprint_tensors(model.network.state_dict())
    opened.begin(inputs)
    tune(config, folder, scenes, model, seconds)
    if not is_main_process():
        return {}
    place = model.save(folder / "model")
    with booked(seconds, "evaluation"):
        unseen = open_scenes(config.data, "test", None, config.seed)
        metrics = labels_measured(model, unseen, config.measure)
    report(metrics)
    print(f"the model is {place}; measure it on scenes of yours:")
    print(f"  python scenesplat/evaluate.py --model {place} --scenes SCENES")
    total = time.perf_counter() - started
    return write_metrics(folder / "metrics.json", metrics, seconds, total, "tuning" in seconds)


def check(config: FinetuneConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """

    from common.training import check_trainer
    from scenesplat.run import check_encoder

    trainer = config.trainer
    batches = {"trainer.batch_size": trainer.batch_size}
    check_trainer(trainer, batches, resume=config.resume, grad_clip=config.optimiser.grad_clip)
    check_encoder(config.network, config.data, trainer)
    if config.loss.frozen and config.init_from is None:
        raise UserError("--loss.frozen: expected --init_from FOLDER, an encoder whose features a linear head can read")


def check_scenes(config: FinetuneConfig, scenes: SceneData) -> None:
    """Refuse scenes without labels, or too few of them.

    Raises:
        UserError: naming the option or the file.
    """
    from common.options import refuse_large_batch

    if not scenes.classes:
        raise UserError(f"--data.path {config.data.path}: no classes.txt in it, the classes' names, one a line")
    for number, scene in enumerate(scenes.scenes):
        if scene.labels_N is None:
            raise UserError(f"--data.path {config.data.path}: training scene {number + 1} has no labels (segment.npy)")
        if int(scene.labels_N.max()) >= len(scenes.classes):
            raise UserError(
                f"--data.path {config.data.path}: training scene {number + 1} has class {int(scene.labels_N.max())}, "
                f"classes.txt names {len(scenes.classes)} (from 0)"
            )
    refuse_large_batch("trainer.batch_size", config.trainer.batch_size, len(scenes), "training scenes")


def new_model(config: FinetuneConfig, classes: list[str]) -> LabelModel:
    """Encoder and head as they start."""
    import torch
    from torch import nn

    from scenesplat.export import LabelModel, start_from
    from scenesplat.model import PointTransformer

    torch.manual_seed(config.seed)
    network = PointTransformer(config.network)
    head = nn.Linear(config.network.dec_channels[0], len(classes))
    if config.init_from:
        start_from(network, Path(config.init_from))
    return LabelModel(network, head, config.data.voxel, list(config.data.inputs), list(classes))


def tune(config: FinetuneConfig, folder: Path, scenes: SceneData, model: LabelModel, seconds: dict[str, float]) -> None:
    """Train encoder and head on labelled scenes, unless that is finished."""
    from torch import nn

    from common.processes import is_main_process
    from common.steps import steps_of
    from common.training import booked
    from common.weights import load_weights, save_weights
    from scenesplat.run import fit
    from scenesplat.trainer import LabelTraining

    weights = folder / STAGE / "labels.safetensors"
    both = nn.ModuleDict({"network": model.network, "head": model.head})
    if weights.is_file():
        load_weights(both, weights, against="the network of this run's configuration")
    else:
        module = LabelTraining(
            model.network,
            model.head,
            config.loss,
            config.optimiser,
            **steps_of(config),
        )
        with booked(seconds, "tuning"):
            fit(module, scenes, folder / STAGE, config)
        if is_main_process():
            save_weights(weights, both.state_dict())
    both.eval().requires_grad_(False)


if __name__ == "__main__":
    run_main(main)
