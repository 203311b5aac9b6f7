"""A trained encoder as a folder that stands alone: network, text space, and how scenes are read for it.

config.json           the network's options, the voxel's side, the classes it was trained with
model.safetensors     its weights, by the names of the released checkpoints
text.safetensors      the directions of a projected text space, where there are any
head.safetensors      the linear head of a network that was fine-tuned with labels

A self-supervised encoder has the first two files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import parse_config
from common.errors import UserError
from common.files import read_object, replace_folder, write_json
from common.weights import check_weights, load_weights, read_weights, save_weights
from scenesplat.config import NetworkConfig, check_network
from scenesplat.model import PointTransformer
from scenesplat.text import TextSpace

CARD, WEIGHTS, TEXT, HEAD = "config.json", "model.safetensors", "text.safetensors", "head.safetensors"


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
            more = {"text_encoder": self.text.source, "classes": self.classes, **facts}
            _write(place, self.network, self.voxel, self.attributes, half, **more)
            self.text.save(place / TEXT)

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
        network, card = _read(folder, option)
        if (folder / HEAD).is_file():
            raise UserError(
                f"{option} {folder}: a model that was fine-tuned with labels answers with classes and not with texts; "
                "expected the model/ folder of a run of train.py, or a converted one"
            )
        if card.get("kind") == "encoder":
            raise UserError(
                f"{option} {folder}: a self-supervised encoder knows no texts; train it first: "
                f"train.py --init_from {folder}, or finetune.py --init_from {folder}"
            )
        text = TextSpace.read(folder / TEXT, encoder or card.get("text_encoder"))
        return cls(network, text, card["voxel"], card["attributes"], card["classes"])


@dataclass
class LabelModel:
    """An encoder with a linear head: fine-tuned with labels.

    Args:
        voxel, attributes: as `SceneModel` has them. classes: of the head's answers.
    """

    network: PointTransformer
    head: nn.Linear
    voxel: float
    attributes: list[str]
    classes: list[str]

    def save(self, folder: Path) -> Path:
        """Write the folder, whole or not at all."""

        def write(place: Path) -> None:
            _write(place, self.network, self.voxel, self.attributes, classes=self.classes, kind="labels")
            save_weights(place / HEAD, self.head.state_dict())

        replace_folder(folder, write)
        return folder

    @classmethod
    def load(cls, folder: Path, option: str = "--model") -> LabelModel:
        """Read such a folder.

        Raises:
            UserError: it is none, or a part is missing or damaged.
        """
        network, card = _read(folder, option)
        head = nn.Linear(network.options.dec_channels[0], len(card["classes"]))
        load_weights(head, folder / HEAD, against=f"the classes of {folder / CARD}", option=option)
        head.requires_grad_(False)
        return cls(network, head, card["voxel"], card["attributes"], card["classes"])


def has_labels(folder: Path) -> bool:
    """Whether a model folder holds one that was fine-tuned with labels."""
    return (folder / HEAD).is_file()


def save_encoder(folder: Path, network: PointTransformer, voxel: float, attributes: Sequence[str]) -> Path:
    """Write a self-supervised encoder as a folder, whole or not at all."""
    replace_folder(folder, lambda place: _write(place, network, voxel, attributes, classes=[], kind="encoder"))
    return folder


def start_from(network: PointTransformer, folder: Path, option: str = "--init_from") -> None:
    """Give a network the weights of a model folder of any kind; a mask token that it has no place for is left out.

    Raises:
        UserError: no such folder, or its network is another one.
    """
    _card(folder, option)
    given, wanted = read_weights(folder / WEIGHTS)[0], network.state_dict()
    if "mask_token" not in wanted:
        given.pop("mask_token", None)
    elif "mask_token" not in given:
        given["mask_token"] = wanted["mask_token"]
    check_weights(given, wanted, f"{option} {folder}", "--network")
    network.load_state_dict(given)


def _card(folder: Path, option: str) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        raise UserError(f"{option} {folder}: no {CARD} there; expected a run's model/ folder, or a converted one")
    return read_object(folder / CARD, kinds={"network": dict, "voxel": float, "attributes": list, "classes": list})


def _read(folder: Path, option: str) -> tuple[PointTransformer, dict[str, Any]]:
    """The network of a model folder, frozen, and its card."""
    card = _card(folder, option)
    network = PointTransformer(network_options(card["network"], folder / CARD))
    load_weights(network, folder / WEIGHTS, against=f"the network of {folder / CARD}", option=option)
    return network.eval().requires_grad_(False), card


def _write(
    place: Path, network: PointTransformer, voxel: float, attributes: Sequence[str], half: bool = False, **facts: Any
) -> None:
    """Weights and card."""
    place.mkdir(parents=True, exist_ok=True)
    save_weights(place / WEIGHTS, network.state_dict(), dtype=torch.float16 if half else None)
    card = {"network": asdict(network.options), "voxel": voxel, "attributes": list(attributes), **facts}
    write_json(place / CARD, card)


def network_options(given: dict[str, Any], where: Path) -> NetworkConfig:
    """Options of a network from a JSON object.

    Raises:
        UserError: an option is unknown, or its value is not one.
    """
    words = [word for name, value in given.items() for word in (f"--{name}", "null" if value is None else str(value))]
    try:
        options = parse_config(NetworkConfig, None, "", words)[0]
        check_network(options)
        return options
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
