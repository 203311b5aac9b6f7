"""EEEA-Net (Termritthikun et al., 2021): `from eeea_net import load_genotype, load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eeea_net.genotypes import Genotype
    from eeea_net.model import Network
    from eeea_net.once_for_all import Subnet


def load_genotype(name: str | Path = "EEEA_C") -> Genotype:
    """A cell by its published name, or from the file of a search.

    Raises:
        UserError: neither.
    """
    from eeea_net.genotypes import Genotype

    return Genotype.load(str(name))


def load_model(folder: str | Path) -> tuple[Network | Subnet, dict[str, Any]]:
    """A trained network in eval mode, and what its model.json says: classes, side, mean and standard deviation.

    Args:
        folder: `model/` of a network of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from common.paths import existing_path
    from eeea_net.training import load_model as load

    return load(existing_path(folder))
