"""PC-DARTS (Xu et al., ICLR 2020): `from pc_darts import load_genotype, load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pc_darts.genotypes import Genotype
    from pc_darts.model import FinalNetwork


def load_genotype(name: str | Path = "PC_DARTS_cifar") -> Genotype:
    """A cell by its published name, or from the JSON file of a search.

    Raises:
        UserError: neither.
    """
    from pc_darts.genotypes import Genotype

    return Genotype.load(str(name))


def load_model(folder: str | Path) -> tuple[FinalNetwork, dict[str, Any]]:
    """A retrained network in eval mode, and what its model.json says: classes, side, mean and standard deviation.

    Args:
        folder: `retrain/model/` of an arm of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.paths import existing_path
    from pc_darts.retraining import load_model as load

    return load(existing_path(folder))
