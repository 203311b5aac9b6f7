"""Train the classifier of noisy latents that classifier guidance needs (appendix D.4).

    python ldm/train_classifier.py                                     # configs/classifier.yaml, for runs/ldm-class
    python ldm/train_classifier.py --model runs/mine --run_dir runs/mine-classifier
    python ldm/sample.py --model runs/ldm-class --classifier runs/ldm-classifier --classifier_scale 3

`--model` is a finished run of train.py with task class. Started again after an interruption, it continues where it
stopped. The run folder holds config.yaml, model.safetensors, metrics.json (held-out accuracy by noise level) and logs.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import parse_config
from common.errors import run_main
from ldm.config import ClassifierConfig

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, or report what was trained; returns the metrics."""
    config, text = parse_config(ClassifierConfig, CONFIGS / "classifier.yaml", __doc__.split("\n")[0], argv)
    metrics = train_classifier(config, text)
    for band in metrics["bands"]:
        print(f"t {band['t_from']:4d} to {band['t_to']:4d}: accuracy {band['accuracy']:.3f}")
    print(f"mean {metrics['accuracy']:.3f}, largest class {metrics['chance']:.3f}, {metrics['images']} held-out images")
    return metrics


def train_classifier(config: ClassifierConfig, config_yaml: str) -> dict[str, Any]:
    """Train or resume the classifier; writes model.safetensors and metrics.json into `config.run_dir`.

    Returns:
        The metrics; those of the folder as they are where it has been trained already.

    Raises:
        UserError: the model is not a finished class-conditional run, or the folder holds another run.
    """
    started = time.perf_counter()
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    import torch

    from common.data.cache import fingerprint_path
    from common.data.sampling import TensorTable
    from common.files import read_object, write_json
    from common.training import check_trainer, open_run_folder, train
    from common.weights import save_weights
    from ldm.classifier import accuracy_by_noise, build_classifier, class_run, latent_space
    from ldm.run import FREE_OPTIONS, inputs_of
    from ldm.streaming import data_module
    from ldm.trainer import ClassifierTrainer

    options, folder = config.trainer, Path(config.run_dir)
    if options.threads:
        torch.set_num_threads(options.threads)
    check_trainer(options, {"trainer.batch_size": options.batch_size}, resume=config.resume)
    finished = folder / "metrics.json"
    opened = open_run_folder(folder, config.resume, config_yaml, FREE_OPTIONS, {"model": ["model"]})
    if config.resume == "auto" and finished.is_file():
        print(f"{folder}: trained already", file=sys.stderr)
        return read_object(finished)
    run, ldm, classes = class_run(Path(config.model))
    weights = Path(config.model) / "model.safetensors"
    opened.begin({**inputs_of(run.config, run.task), "model": partial(fingerprint_path, weights)})
    torch.manual_seed(config.seed)
    classifier = build_classifier(config.network, run.config, ldm, classes)
    in_memory = isinstance(run.task.train, TensorTable)
    table = run.latents(ldm.first_stage_model, folder) if in_memory else run.task.train  # type: ignore[arg-type]
    workers = run.config.data.workers
    trainer = train(
        folder,
        ClassifierTrainer(classifier, ldm, config),
        data_module(table, options.batch_size, options.max_steps, config.seed, workers, options.accumulate),
        options,
        steps=options.max_steps,
        batch_size=options.batch_size,
        resume=config.resume,
        grad_clip=1.0,
    )
    seconds = time.perf_counter() - started
    classifier, ldm = classifier.cpu().eval(), ldm.cpu()
    metrics: dict[str, Any] = {
        "classes": classes,
        "steps": options.max_steps,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        **accuracy_by_noise(classifier, ldm, run.task.reference),
        "seconds": round(seconds, 1),
    }
    if trainer.is_global_zero:
        notes = {"latent_space": latent_space(ldm)}
        save_weights(folder / "model.safetensors", classifier.state_dict(), notes)
        write_json(finished, metrics)
    return metrics


if __name__ == "__main__":
    run_main(main)
