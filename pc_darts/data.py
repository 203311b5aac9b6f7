"""The pictures of a search: options -> set, augmentation and the two halves."""

from __future__ import annotations

from collections.abc import Sequence

from common.data.augmentation import Augmentation
from common.data.classes import ImageSet, Pictures, open_classes, per_class_sample
from common.errors import UserError
from pc_darts.config import DataConfig


def open_data(config: DataConfig, seed: int = 0) -> ImageSet:
    """The configured set with its splits; `seed` decides which pictures are held out for validation."""
    return open_classes(
        config.name,
        config.size,
        config.path,
        images=config.images,
        validation=config.validation,
        margin=config.resized_crop > 0,
        seed=seed,
        image_column=config.image_column,
        label_column=config.label_column,
    )


def augmentation(config: DataConfig) -> Augmentation:
    """What the options do to a training picture (cutout is an option of the final training)."""
    if len(config.jitter) not in (0, 4):
        raise UserError(f"data.jitter {config.jitter}: expected [] or four strengths (ImageNet: 0.4 0.4 0.4 0.2)")
    b, c, s, h = config.jitter or (0.0, 0.0, 0.0, 0.0)
    return Augmentation(config.padding, config.flip, config.resized_crop, (b, c, s, h))


def search_halves(train: Pictures, shares: Sequence[float], seed: int) -> tuple[Pictures, Pictures]:
    """(pictures for the weights, pictures for alphas and betas): disjoint, each with the same share of every class."""
    if len(shares) != 2:
        raise UserError(f"data.halves {list(shares)}: expected two shares, for weights and for alphas")
    weights, alphas = per_class_sample(train.labels_N, shares, seed)
    if not len(weights) or not len(alphas):
        raise UserError(
            f"data.halves {list(shares)}: {len(train)} training pictures are too few, {len(weights)} and {len(alphas)} "
            "would be left; give more pictures or larger shares"
        )
    return train.part(weights), train.part(alphas)
