"""ELECTRA (Clark et al., ICLR 2020): `from electra import load_discriminator, load_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import ElectraForPreTraining

    from electra.wordpiece import Tokenizer


def load_discriminator(folder: str | Path) -> ElectraForPreTraining:
    """Stock transformers' discriminator of an exported folder: logits above 0 say that a token was replaced.

    Raises:
        UserError: no such folder, damaged, or one whose relative positions transformers cannot express.
    """
    from transformers import ElectraForPreTraining

    from common.errors import UserError
    from common.files import read_object
    from common.paths import existing_path
    from common.pretrained import from_folder
    from electra.layouts import MODEL_TYPE, encoder_folder

    place = encoder_folder(existing_path(folder))
    kind = read_object(place / "config.json", f"{place}: expected a folder that train.py exported").get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{place}: model type {kind}; stock transformers reads {MODEL_TYPE}, with absolute positions")
    return from_folder(ElectraForPreTraining, place).eval()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The vocabulary of such a folder; UserError where there is none."""
    from common.paths import existing_path
    from electra.layouts import encoder_folder
    from electra.wordpiece import load_tokenizer as load

    return load(encoder_folder(existing_path(folder)))
