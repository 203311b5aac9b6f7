"""Train the classifier of noisy latents that classifier guidance needs (appendix D.4).

    python train_classifier.py                                     # configs/classifier.yaml, for runs/ldm-class
    python train_classifier.py --model runs/mine --run_dir runs/mine-classifier
    python sample.py --model runs/ldm-class --classifier runs/ldm-classifier --classifier_scale 3

`--model` is a finished run of train.py with task class. Started again after an interruption, it continues where it
stopped. The run folder holds config.yaml, model.safetensors, metrics.json (held-out accuracy by noise level) and logs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.cli import parse_config
from common.errors import run_main
from ldm.config import ClassifierConfig

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, or report what was trained; returns the metrics."""
    config, text = parse_config(ClassifierConfig, CONFIGS / "classifier.yaml", __doc__.split("\n")[0], argv)
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from ldm.classifier import train_classifier

    metrics = train_classifier(config, text)
    for band in metrics["bands"]:
        print(f"t {band['t_from']:4d} to {band['t_to']:4d}: accuracy {band['accuracy']:.3f}")
    print(f"mean {metrics['accuracy']:.3f}, largest class {metrics['chance']:.3f}, {metrics['images']} held-out images")
    return metrics


if __name__ == "__main__":
    run_main(main)
