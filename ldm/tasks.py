"""The paper's tasks (sections 4.1 to 4.5): which data each needs, and how its condition reaches the denoiser.

| task          | condition                                     | enters by       |
|---------------|-----------------------------------------------|-----------------|
| unconditional | -                                             | -               |
| class         | label, one learned token (or label embedding) | cross-attention |
| text          | caption tokens through a trained transformer  | cross-attention |
| layout        | bounding-box tokens through the same          | cross-attention |
| semantic      | label map, halved and mixed by a 1x1 conv     | concatenation   |
| superres      | the low-resolution image itself               | concatenation   |
| inpaint       | latent of the masked image, and the mask      | concatenation   |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.sampling import TensorTable, derive_seed
from common.data.shapes import COLOURS
from common.errors import UserError
from ldm.conditioners import ClassEmbedder, LayoutTokenizer, SpatialRescaler, TransformerEmbedder
from ldm.config import ConditionerConfig, DataConfig, LdmConfig
from ldm.degradation import low_resolution
from ldm.masks import random_mask

NO_OBJECT = -1  # class of the padding rows in `classes`
PHOTO_SPLITS = {"train": "train", "test": "scene"}  # held out: pairs of a known object and a known background
BOX_CATEGORIES = 128  # layout tokens: at least 8 shapes x 10 colours


def open_dataset(data: DataConfig, split: str, seed: int = 0) -> Dataset:
    """The configured data set; items are dictionaries with `image` uint8 [3, H, W] and what the set knows of it."""
    n = data.train_images if split == "train" else data.eval_images
    if data.name == "emoji":
        from common.data.emoji import EmojiCap

        return EmojiCap(split, size=data.size, skin_tones="none", seed=seed)  # type: ignore[arg-type]
    if data.name == "emoji_groups":
        from common.data.emoji import EmojiGroups

        return EmojiGroups(split, size=data.size)  # type: ignore[arg-type]
    if data.name == "shapes":
        from common.data.shapes import Shapes

        return Shapes(split, n or 20000, size=data.size, seed=seed)
    if data.name == "photos":
        from common.data.photos import PhotoCollage

        return PhotoCollage(PHOTO_SPLITS[split], n or 20000, size=data.size, seed=seed, root=data.path)
    if data.name == "fashion_mnist":
        from common.data.fashion_mnist import FashionMNIST

        return FashionMNIST(split, root=data.path, pad_to=data.size)  # type: ignore[arg-type]
    if data.path is None:
        raise UserError(f"data.name {data.name} needs --data.path (a folder, or a data set's name)")
    from common.data.folders import open_images

    return open_images(data.path, data.size, split=split, seed=seed)


@dataclass
class Task:
    """Data and condition of one run.

    Attributes:
        train, reference: tables with `image` uint8 [N, 3, H, W] and the task's own columns; `reference` is held out.
        conditioning_key: None, "crossattn", "concat" or "adm".
        concat_channels: channels that the condition adds to the denoiser's input.
        conditioner: turns the columns of a batch into the condition (trained jointly), or None.
        captions: of the reference images, for the grids and the alignment metric.
    """

    name: str
    train: TensorTable
    reference: TensorTable
    conditioning_key: str | None = None
    concat_channels: int = 0
    context_dim: int | None = None
    num_classes: int | None = None
    conditioner: nn.Module | None = None
    tokenizer: Any = None
    captions: list[str] = field(default_factory=list)
    reference_dataset: Any = None


def table(
    dataset: Dataset, columns: Callable[[dict[str, Any], int], dict[str, Tensor]], limit: int | None
) -> TensorTable:
    """Every sample's image and task columns, stacked in memory."""
    n = min(len(dataset), limit or len(dataset))  # type: ignore[arg-type]
    if n == 0:
        raise UserError("the data set is empty")
    rows = []
    for i in range(n):
        item = dataset[i]
        rows.append({"image": item["image"], **columns(item, i)})
    return TensorTable({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def train_tokenizer(captions: Sequence[str], vocabulary: int, tokens: int) -> Any:
    """A WordPiece tokenizer learned from the captions, as a fast transformers tokenizer ([CLS] ... [SEP], padded)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer breaks ties by the order in which words come: sorted input makes the vocabulary reproducible.
    tokenizer.train_from_iterator(
        sorted(captions), trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=tokens,
    )


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Token ids int64 [N, tokens], padded and cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


class BertConditioner(nn.Module):
    """tau as a transformers BertModel trained jointly: the form in which stock diffusers pipelines can carry it.

    Every token attends to every other, padding included (the paper's tau has no mask either).
    """

    def __init__(self, config: ConditionerConfig, vocabulary: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.width = config.width
        self.bert = BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=max(1, config.width // 32),
                intermediate_size=4 * config.width,
                max_position_embeddings=config.tokens,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
            )
        )
        # The pooler is part of BertModel's format but nothing here reads it; DDP must not wait for its gradient.
        self.bert.pooler.requires_grad_(False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.bert(tokens_BL, attention_mask=torch.ones_like(tokens_BL)).last_hidden_state


def phrasings(dataset: Any, n: int, variants: int, seed: int) -> list[list[str]]:
    """For each of the first n samples, `variants` phrasings where the data set can rephrase, else its one caption."""
    if hasattr(dataset, "caption_for"):
        generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in range(n)]
        return [[dataset.caption_for(i, generators[i]) for _ in range(variants)] for i in range(n)]
    return [[caption] for caption in plain_captions(dataset, n)]


def plain_captions(dataset: Any, n: int) -> list[str]:
    """The first n samples' captions as they stand."""
    captions = getattr(dataset, "captions", None)
    return list(captions[:n]) if captions is not None else [dataset[i]["caption"] for i in range(n)]


def prepare(config: LdmConfig, tokenizer: Any = None) -> Task:
    """Open the data, build the task's columns and its conditioner.

    Args:
        tokenizer: of an earlier run (resume, sampling); text tasks otherwise learn one from the training captions.
    """
    builders: dict[str, Callable[..., Task]] = {
        "unconditional": _unconditional,
        "class": _class,
        "text": _text,
        "layout": _layout,
        "semantic": _semantic,
        "superres": _superres,
        "inpaint": _unconditional,
    }
    train = open_dataset(config.data, "train", config.seed)
    held_out = open_dataset(config.data, "test", config.seed)
    task = builders[config.task](config, train, held_out, tokenizer)
    task.reference_dataset = held_out
    if config.task == "inpaint":
        task.conditioning_key = "concat"
    return task


def _tables(
    config: LdmConfig, train: Any, held_out: Any, columns: Any, columns_test: Any = None
) -> dict[str, TensorTable]:
    return {
        "train": table(train, columns, config.data.train_images),
        "reference": table(held_out, columns_test or columns, config.data.eval_images),
    }


def _unconditional(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    return Task(config.task, **_tables(config, train, held_out, lambda item, i: {}))


def _class(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    tables = _tables(
        config, train, held_out, lambda item, i: {"label": torch.as_tensor(int(_need(item, "label", config)))}
    )
    classes = int(tables["train"].columns["label"].max()) + 1
    if config.conditioner.class_embedding == "adm":
        return Task("class", **tables, conditioning_key="adm", num_classes=classes + 1)
    width = config.conditioner.width
    # One more entry than classes: the null class of the guided model.
    return Task(
        "class",
        **tables,
        conditioning_key="crossattn",
        context_dim=width,
        conditioner=ClassEmbedder(width, classes + 1),
        num_classes=classes + 1,
    )


def _text(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    options = config.conditioner
    n = min(len(train), config.data.train_images or len(train))
    n_test = min(len(held_out), config.data.eval_images)
    train_captions = phrasings(train, n, options.caption_variants, config.seed)
    test_captions = plain_captions(held_out, n_test)
    if options.kind == "frozen":
        return _frozen_text(config, train, held_out, train_captions, test_captions)
    if tokenizer is None:
        tokenizer = train_tokenizer([c for row in train_captions for c in row], options.vocabulary, options.tokens)
    tokens = [tokenize(tokenizer, row) for row in train_captions]
    test_tokens = tokenize(tokenizer, test_captions)
    tables = _tables(
        config, train, held_out, lambda item, i: {"tokens": tokens[i]}, lambda item, i: {"tokens": test_tokens[i][None]}
    )
    if options.kind == "tau":
        conditioner: nn.Module = TransformerEmbedder(options.width, options.layers, len(tokenizer), options.tokens)
    else:
        conditioner = BertConditioner(options, len(tokenizer))
    return Task(
        "text",
        **tables,
        conditioning_key="crossattn",
        context_dim=options.width,
        conditioner=conditioner,
        tokenizer=tokenizer,
        captions=test_captions,
    )


def _frozen_text(
    config: LdmConfig, train: Any, held_out: Any, captions: list[list[str]], test_captions: list[str]
) -> Task:
    """Token states of a fixed encoder, computed once per distinct caption."""
    from common.data.text import TextEncoder

    encoder = TextEncoder(Path(config.conditioner.encoder)) if config.conditioner.encoder else TextEncoder()
    distinct = sorted({c for row in captions for c in row} | set(test_captions) | {""})
    states, mask = encoder.encode(distinct, length=config.conditioner.tokens)
    states = (states * mask[..., None]).to(torch.float16)
    row_of = {caption: i for i, caption in enumerate(distinct)}
    tables = _tables(
        config,
        train,
        held_out,
        lambda item, i: {"tokens": torch.tensor([row_of[c] for c in captions[i]])},
        lambda item, i: {"tokens": torch.tensor([row_of[test_captions[i]]])},
    )
    return Task(
        "text",
        **tables,
        conditioning_key="crossattn",
        context_dim=encoder.width,
        conditioner=StateTable(states, row_of[""]),
        captions=test_captions,
    )


class StateTable(nn.Module):
    """Frozen token states by caption number; `null` is the empty caption's number."""

    def __init__(self, states_NLD: Tensor, null: int) -> None:
        super().__init__()
        self.register_buffer("states_NLD", states_NLD, persistent=False)
        self.null = null

    def forward(self, rows_B: Tensor) -> Tensor:
        states: Tensor = self.states_NLD  # type: ignore[assignment]
        return states[rows_B].float()


def box_categories(item: dict[str, Any]) -> Tensor:
    """Category of every box: its class, and for Shapes class and colour together."""
    if "colours" in item:
        return item["classes"] * len(COLOURS) + item["colours"]
    return item["classes"]


def _layout(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    first = train[0]
    _need(first, "boxes", config)
    layout = LayoutTokenizer(n_categories=BOX_CATEGORIES, max_objects=len(first["boxes"]), no_tokens=1024)

    def columns(item: dict[str, Any], i: int) -> dict[str, Tensor]:
        present = item["classes"] != NO_OBJECT
        corners = item["boxes"][present]
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        return {
            "layout": torch.as_tensor(layout.encode(box_categories(item)[present].tolist(), boxes)),
            "boxes": item["boxes"],
            "classes": item["classes"],
        }

    options = config.conditioner
    conditioner = TransformerEmbedder(options.width, options.layers, layout.no_tokens, layout.length)
    return Task(
        "layout",
        **_tables(config, train, held_out, columns),
        conditioning_key="crossattn",
        context_dim=options.width,
        conditioner=conditioner,
    )


class SemanticConditioner(nn.Module):
    """One-hot label map, bilinearly halved to the latent's size, mixed to 3 channels by a trained 1x1 convolution."""

    def __init__(self, n_labels: int, halvings: int, channels: int = 3) -> None:
        super().__init__()
        self.n_labels = n_labels
        self.rescaler = SpatialRescaler(n_stages=halvings, in_channels=n_labels, out_channels=channels)

    def forward(self, map_BHW: Tensor) -> Tensor:
        one_hot_BCHW = F.one_hot(map_BHW.long(), self.n_labels).permute(0, 3, 1, 2).float()
        return self.rescaler(one_hot_BCHW)


def _semantic(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    tables = _tables(config, train, held_out, lambda item, i: {"label_map": _need(item, "label_map", config)})
    n_labels = int(getattr(train, "n_map_classes", int(tables["train"].columns["label_map"].max()) + 1))
    halvings = 0 if config.first_stage.kind == "pixels" else len(config.first_stage.ch_mult) - 1
    return Task(
        "semantic",
        **tables,
        conditioning_key="concat",
        concat_channels=3,
        conditioner=SemanticConditioner(n_labels, halvings),
    )


def _superres(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    options = config.conditioner

    def columns(item: dict[str, Any], i: int) -> dict[str, Tensor]:
        seed = derive_seed(config.seed, i)
        return {"low": low_resolution(item["image"], options.scale, options.degradation, seed)}

    return Task("superres", **_tables(config, train, held_out, columns), conditioning_key="concat", concat_channels=3)


def mask_bank(size: int, n: int, seed: int) -> Tensor:
    """`n` random inpainting masks float [n, 1, size, size], 1 where the image is to be painted."""
    return (
        torch.stack([torch.as_tensor(random_mask(size, derive_seed(seed, i))) for i in range(n)])
        .float()
        .view(n, 1, size, size)
    )


def _need(item: dict[str, Any], key: str, config: LdmConfig) -> Any:
    if key not in item:
        raise UserError(
            f'task {config.task} needs "{key}" for every image, which data.name {config.data.name} does not have'
        )
    return item[key]
