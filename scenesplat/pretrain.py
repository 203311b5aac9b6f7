"""Pre-train an encoder of Gaussians without labels (GaussianSSL): what is hidden, a teacher's answers, language codes.

    python scenesplat/pretrain.py                               # configs/pretrain.yaml: furnished rooms, on a laptop
    python scenesplat/pretrain.py --terms.language 0            # without language: needs no picture and no text
    python scenesplat/pretrain.py --terms.distillation 0 --terms.patches 0        # masked modelling alone
    python scenesplat/pretrain.py --data.name scenes --data.path SCENES --terms.language 0         # own scenes
    python scenesplat/finetune.py --init_from runs/scenesplat-pretrain/encoder    # what it is for

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, pretraining/ (checkpoints, logs, weights), encoder/ and metrics.json.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import UserError, run_main
from scenesplat.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    from scenesplat.data import SceneData
    from scenesplat.model import PointTransformer
    from scenesplat.text import TextSpace
    from scenesplat.trainer import SelfSupervision

CONFIGS = Path(__file__).parent / "configs"
STAGE = Path("pretraining")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pre-train, write the encoder and say what it makes of unseen scenes; returns the metrics."""
    config, text = parse_config(PretrainConfig, CONFIGS / "pretrain.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import booked, open_run, write_metrics
    from scenesplat.data import open_scenes
    from scenesplat.export import save_encoder
    from scenesplat.run import PLACES
    from scenesplat.text import TextSpace

    check(config)
    opened = open_run(config, text, places=PLACES)
    folder, seconds = opened.path, dict[str, float]()
    space = TextSpace(config.text.encoder, config.text.width) if config.terms.language else None
    with booked(seconds, "scenes"):
        scenes = open_scenes(config.data, "train", space, config.seed)
    check_scenes(config, scenes)
    opened.begin({"data": scenes.fingerprint, **({"text": space.fingerprint} if space else {})})
    network, found = pretrain(config, folder, scenes, space, seconds)
    if not is_main_process():
        return {}
    save_encoder(folder / "encoder", network.eval(), config.data.voxel, config.data.inputs)
    with booked(seconds, "evaluation"):
        unseen = open_scenes(config.data, "test", space, config.seed)
        metrics = {**found, **seen_through(network, unseen, config)}
    for name, value in metrics.items():
        print(f"  {name}: {value:.4g}")
    print(f"the encoder is {folder / 'encoder'}; teach it classes, or texts:")
    print(f"  python scenesplat/finetune.py --init_from {folder / 'encoder'}")
    total = time.perf_counter() - started
    return write_metrics(folder / "metrics.json", metrics, seconds, total, "pretraining" in seconds)


def check(config: PretrainConfig) -> None:
    """Refuse what would fail after work has begun.

    Raises:
        UserError: naming the option.
    """

    from common.training import check_trainer
    from scenesplat.run import check_encoder

    trainer, crops, terms = config.trainer, config.crops, config.terms
    batches = {"trainer.batch_size": trainer.batch_size}
    check_trainer(trainer, batches, resume=config.resume, grad_clip=config.optimiser.grad_clip)
    check_encoder(config.network, config.data, trainer)
    if not config.network.mask_token:
        raise UserError("--network.mask_token false: expected true, what stands where a Gaussian is hidden")
    if not any((terms.masked, terms.distillation, terms.patches, terms.language)):
        raise UserError("--terms: expected one term at least with a weight above 0")
    for name in ("ratio", "local"):
        least, most = getattr(crops, f"{name}_least"), getattr(crops, f"{name}_most")
        if least > most:
            raise UserError(f"--crops.{name}_least {least:g}: expected at most --crops.{name}_most, {most:g}")
    if terms.language and not terms.codes:
        raise UserError("--terms.codes []: expected one width at least, or --terms.language 0")
    if terms.codes_from == "pictures" and terms.autoencoder == "each":
        raise UserError("--terms.autoencoder each: expected together, since pictures belong to no single scene")


def check_scenes(config: PretrainConfig, scenes: SceneData) -> None:
    """Refuse scenes that the terms cannot be asked of.

    Raises:
        UserError: naming the option.
    """
    from common.options import refuse_large_batch

    refuse_large_batch("trainer.batch_size", config.trainer.batch_size, len(scenes), "training scenes")
    if config.terms.language and config.terms.codes_from == "pictures" and not scenes.rooms:
        raise UserError("--terms.codes_from pictures: expected --data.name rooms, whose pictures are at hand")


def coded(config: PretrainConfig, scenes: SceneData, space: TextSpace | None) -> tuple[SceneData, dict[str, float]]:
    """The scenes with language codes in place of features, as crops; and how well features come back from codes."""
    from scenesplat.crops import CropData
    from scenesplat.data import picture_features
    from scenesplat.language_codes import with_codes

    terms, given, found = config.terms, scenes.scenes, dict[str, float]()
    if space is not None:
        pictures = terms.codes_from == "pictures"
        learnt = picture_features(scenes.rooms, config.data, space, config.seed) if pictures else None
        given, cosine = with_codes(given, terms.codes, config.seed, terms.autoencoder == "each", learnt)
        found["autoencoder_cosine"] = cosine
    return CropData(scenes, given, config.crops), found


def pretrain(
    config: PretrainConfig, folder: Path, scenes: SceneData, space: TextSpace | None, seconds: dict[str, float]
) -> tuple[PointTransformer, dict[str, float]]:
    """Train the network on crops of the scenes, unless it is finished; and what is known of codes and heads."""
    from common.files import read_object, write_json
    from common.processes import is_main_process
    from common.training import booked
    from common.weights import load_weights, save_weights
    from scenesplat.run import fit

    weights, module = folder / STAGE / "encoder.safetensors", module_of(config)
    if weights.is_file():
        load_weights(module.network, weights, against="the network of this run's configuration")
        return module.network, read_object(folder / STAGE / "codes.json")
    data, found = coded(config, scenes, space)
    with booked(seconds, "pretraining"):
        fit(module, data, folder / STAGE, config)
    if is_main_process():
        write_json(folder / STAGE / "codes.json", found)
        save_weights(folder / STAGE / "heads.safetensors", module.heads.state_dict())
        save_weights(weights, module.network.state_dict())
    return module.network, found


def module_of(config: PretrainConfig) -> SelfSupervision:
    """Network, heads and teacher as they start."""
    import torch

    from common.steps import steps_of
    from scenesplat.model import PointTransformer
    from scenesplat.trainer import SelfSupervision

    torch.manual_seed(config.seed)
    return SelfSupervision(
        PointTransformer(config.network),
        config.terms,
        config.optimiser,
        config.data.inputs,
        config.terms.codes[-1] if config.terms.codes else 0,
        **steps_of(config),
    )


def seen_through(network: PointTransformer, scenes: SceneData, config: PretrainConfig) -> dict[str, float]:
    """How many directions features of unseen scenes spread over, and how well hidden Gaussians are made out there."""
    from common.weights import load_weights
    from scenesplat.crops import CropData
    from scenesplat.self_supervision import hidden_error, ranks

    data, found = config.data, ranks(network, scenes.scenes, config.data.voxel, config.data.inputs)
    if config.terms.masked:
        heads = module_of(config).heads
        load_weights(heads, Path(config.run_dir) / STAGE / "heads.safetensors", against="the heads of this run")
        plain = [replace(scene, features_NF=None, valid_N=None) for scene in scenes.scenes]
        crops = CropData(scenes, plain, config.crops)
        crops.data = replace(data, augment=False)
        batches = [crops.__getitems__([(row, row)]) for row in range(len(plain))]
        found |= hidden_error(network, heads["mae"], batches, config.terms, data.inputs)
    return found


if __name__ == "__main__":
    run_main(main)
