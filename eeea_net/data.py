"""The pictures: options -> a set with its splits, and what happens to a training picture."""

from __future__ import annotations

from common.data.augmentation import Augmentation, Policy
from common.data.classes import ImageSet, open_classes
from eeea_net.config import DataConfig


def open_data(config: DataConfig, seed: int = 0) -> ImageSet:
    """The configured set; `seed` decides which training pictures are held out for comparing networks."""
    return open_classes(
        config.name,
        config.size,
        config.path,
        images=config.images,
        validation=config.validation,
        seed=seed,
        image_column=config.image_column,
        label_column=config.label_column,
    )


def augmentation(config: DataConfig, cutout: int, policy: Policy | None = None) -> Augmentation:
    """Crop, flip, policy, normalisation and cutout, in this order."""
    return Augmentation(config.padding, config.flip, cutout=cutout, policy=policy)
