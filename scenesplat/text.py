"""Texts as unit vectors: the space that Gaussians' features live in.

The packaged sentence encoder (MiniLM, 384-d) is the default; a SigLIP2 folder is the paper's own space (768-d), another
transformers encoder serves as well, and a .safetensors table holds features of names alone. Small runs project: names
of indoor things are centred and kept along their largest directions, since raw text features of such names all lie
close together (SigLIP2's have a mean cosine of 0.84).

Shape suffixes: N texts, W width of the encoder, D width of the space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.cache import fingerprint_strings, fingerprint_tensors
from common.data.text import TextEncoder
from common.errors import UserError
from common.files import read_object
from common.pretrained import from_folder, read_network
from common.weights import read_notes, read_weights, save_weights

PROMPT = "this is a {}"  # section 5.1; the articles that a user writes are taken off first
TOKENS = 64  # that SigLIP2's texts are padded to
# What a query has to beat (LERF's canonical phrases), and what every room is made of.
NEGATIVES = ("object", "things", "stuff", "texture", "wall", "floor", "ceiling")
STRUCTURE = ("wall", "floor", "ceiling")  # left out of f-mIoU
_VOCABULARIES: dict[str, Tensor] = {}  # by the encoder's fingerprint


@cache
def label_sets() -> dict[str, list[str]]:
    """The label sets of the paper's benchmarks by name: scannet20, scannet200, matterport21, matterport160, ..."""
    return json.loads(Path(__file__).with_name("label_sets.json").read_text(encoding="utf-8"))


def vocabulary() -> list[str]:
    """The distinct names of all label sets."""
    return list(dict.fromkeys(name for names in label_sets().values() for name in names))


class TextSpace:
    """Names or free text to unit vectors.

    Args:
        source: None for the packaged sentence encoder; a transformers folder; or a table of names (.safetensors).
        width: D, kept directions of centred names; None leaves the encoder's own space.
        frame: (mean [W], directions [W, D]) of a space that was made before.

    Raises:
        UserError: the folder or table cannot be read, or has fewer directions than asked for.
    """

    def __init__(
        self, source: str | None = None, width: int | None = None, frame: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.source = source
        self._names: dict[str, Tensor] = {}
        self._encoder: TextEncoder | None = None
        if source is not None and source.endswith(".safetensors"):
            self._names = _table(Path(source))
        else:
            self._encoder = TextEncoder(source)
        if frame is None and width is not None:
            frame = _frame(self._vocabulary(), width)
        self.frame = frame

    @cached_property
    def fingerprint(self) -> str:
        """Of the encoder and the directions that are kept."""
        origin = fingerprint_tensors(self._names) if self._encoder is None else self._encoder.fingerprint
        return fingerprint_strings([origin, str(None if self.frame is None else tuple(self.frame[1].shape))])

    @property
    def width(self) -> int:
        """D."""
        return self.frame[1].shape[1] if self.frame is not None else self._raw(["chair"]).shape[1]

    def embed(self, names: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of "this is a NAME".

        Raises:
            UserError: a table that does not have the name.
        """
        raw_NW = self._raw(names)
        if self.frame is None:
            return raw_NW
        mean_W, directions_WD = self.frame
        return F.normalize((raw_NW - mean_W) @ directions_WD, dim=1)

    def _raw(self, names: Sequence[str]) -> Tensor:
        bare = [plain(name) for name in names]
        if self._encoder is None:
            for name in bare:
                if name not in self._names:
                    raise UserError(
                        f"{self.source}: no features of {name!r}; a table knows its {len(self._names)} names only, a "
                        "text encoder's folder any text"
                    )
            return torch.stack([self._names[name] for name in bare])
        texts = [PROMPT.format(name) for name in bare]
        if str(self._encoder.config.get("model_type", "")).startswith("siglip"):
            return _siglip(self._encoder.path, texts)
        return self._encoder.sentence(texts)

    def _vocabulary(self) -> Tensor:
        """Vectors of all names that are known; of an encoder once in a process."""
        if self._encoder is None:
            return torch.stack(list(self._names.values()))
        if (encoder := self._encoder.fingerprint) not in _VOCABULARIES:
            _VOCABULARIES[encoder] = self._raw(vocabulary())
        return _VOCABULARIES[encoder]

    def save(self, path: Path) -> None:
        """Keep the directions, so that what was trained in this space can be asked without making them again."""
        if self.frame is not None:
            save_weights(path, {"mean": self.frame[0], "directions": self.frame[1]})

    @classmethod
    def read(cls, path: Path, source: str | None) -> TextSpace:
        """The space that `save` kept; the encoder's own where it kept none."""
        if not path.is_file():
            return cls(source)
        kept, _ = read_weights(path)
        return cls(source, frame=(kept["mean"], kept["directions"]))


def plain(text: str) -> str:
    """A query without its article: "a chair" is "chair", as the prompt has one."""
    return re.sub(r"^(an?|the)\s+(?=\S)", "", " ".join(text.split()), flags=re.IGNORECASE)


def _frame(raw_NW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean and largest directions; each points where its largest entry is positive."""
    if width > min(raw_NW.shape):
        raise UserError(f"--text.width {width}: expected at most {min(raw_NW.shape)}, what names span in this encoder")
    mean_W = raw_NW.mean(0)
    directions_WD = torch.linalg.svd((raw_NW - mean_W).double(), full_matrices=False).Vh[:width].t().float()
    largest = directions_WD.abs().argmax(0)
    sign_D = directions_WD[largest, torch.arange(width)].sign()
    return mean_W, (directions_WD * sign_D).contiguous()


def _table(path: Path) -> dict[str, Tensor]:
    """Names and unit features of a table: tensors [n, W] whose rows the note `labels` (JSON) names."""
    tensors, _ = read_weights(path, "--text.encoder")
    try:
        labels = json.loads(read_notes(path)["labels"])
        pairs = {name: row for key, names in labels.items() for name, row in zip(names, tensors[key], strict=True)}
    except (KeyError, ValueError, AttributeError, TypeError):
        raise UserError(
            f'--text.encoder {path}: expected a note "labels", JSON of the names of each tensor\'s rows'
        ) from None
    return {name: F.normalize(row.float(), dim=0) for name, row in pairs.items()}


@cache
def _siglip_parts(folder: Path) -> tuple[object, object]:
    from transformers import AutoModel, AutoTokenizer

    return read_network(AutoModel, folder).eval().requires_grad_(False), from_folder(AutoTokenizer, folder)


def _siglip(folder: Path, texts: Sequence[str]) -> Tensor:
    """SigLIP's text features, unit vectors, as its authors pad them."""
    model, tokenizer = _siglip_parts(folder)
    limit = int((read_object(folder / "config.json").get("text_config") or {}).get("max_position_embeddings", TOKENS))
    tokens = tokenizer(  # type: ignore[operator]
        list(texts), padding="max_length", truncation=True, max_length=min(TOKENS, limit), return_tensors="pt"
    )
    with torch.inference_mode():
        found = model.get_text_features(input_ids=tokens["input_ids"])  # type: ignore[attr-defined]
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=1).clone()
