"""A trained encoder as a folder that stands alone: network, text space, and how scenes are read for it.

config.json           the network's options, the voxel's side, the classes it was trained with
model.safetensors     its weights, by the names of the released checkpoints
text.safetensors      the directions of a projected text space, where there are any
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import parse_config
from common.errors import UserError
from common.files import read_object, replace_folder, write_json
from common.weights import load_weights, save_weights
from scenesplat.config import NetworkConfig, check_network
from scenesplat.model import PointTransformer
from scenesplat.text import TextSpace

CARD, WEIGHTS, TEXT = "config.json", "model.safetensors", "text.safetensors"


@dataclass
class SceneModel:
    """An encoder and the space of its answers.

    Args:
        voxel: side of a voxel in metres.
        attributes: of a Gaussian that the network sees, by the names of `gaussians.ATTRIBUTES`.
        classes: names it was trained with; [] for converted weights.
    """

    network: PointTransformer
    text: TextSpace
    voxel: float
    attributes: list[str]
    classes: list[str]

    def texts(self, names: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of names, in the space of the network's answers.

        Raises:
            UserError: the text encoder is of another width than the answers.
        """
        found, wanted = self.text.embed(names), self.network.options.dec_channels[0]
        if found.shape[1] != wanted:
            raise UserError(
                f"the text encoder gives {found.shape[1]} numbers and this model answers with {wanted}; say --text "
                "FOLDER, that of the encoder which the model was trained with"
            )
        return found

    def save(self, folder: Path, half: bool = False, **facts: Any) -> Path:
        """Write the folder, whole or not at all; with `half` the weights in 16 bits."""

        def write(place: Path) -> None:
            place.mkdir(parents=True, exist_ok=True)
            save_weights(place / WEIGHTS, self.network.state_dict(), dtype=torch.float16 if half else None)
            self.text.save(place / TEXT)
            card = {
                "network": asdict(self.network.options),
                "text_encoder": self.text.source,
                "voxel": self.voxel,
                "attributes": self.attributes,
                "classes": self.classes,
                **facts,
            }
            write_json(place / CARD, card)

        replace_folder(folder, write)
        return folder

    @classmethod
    def load(cls, folder: Path, option: str = "--model", encoder: str | None = None) -> SceneModel:
        """Read such a folder.

        Args:
            encoder: where the text encoder lies now, if not where it was.

        Raises:
            UserError: it is none, or a part is missing or damaged.
        """
        if not (folder / CARD).is_file():
            raise UserError(f"{option} {folder}: no {CARD} there; expected a run's model/ folder, or a converted one")
        card = read_object(folder / CARD, kinds={"network": dict, "voxel": float, "attributes": list, "classes": list})
        options = network_options(card["network"], folder / CARD)
        network = PointTransformer(options)
        load_weights(network, folder / WEIGHTS, against=f"the network of {folder / CARD}", option=option)
        text = TextSpace.read(folder / TEXT, encoder or card.get("text_encoder"))
        return cls(network.eval().requires_grad_(False), text, card["voxel"], card["attributes"], card["classes"])


def network_options(given: dict[str, Any], where: Path) -> NetworkConfig:
    """Options of a network from a JSON object.

    Raises:
        UserError: an option is unknown, or its value is not one.
    """
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    try:
        options = parse_config(NetworkConfig, None, "", words)[0]
        check_network(options)
        return options
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
