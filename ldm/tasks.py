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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.cache import fingerprint_strings, fingerprint_tensors
from common.data.photos import CATEGORIES
from common.data.rows import FEWEST_IMAGES, HELD_OUT_SHARE, LEFT_OUT, hold_out
from common.data.sampling import LazyTable, Table, TensorTable, derive_seed
from common.data.shapes import COLOURS, SHAPES
from common.data.shards import ShardedImages
from common.data.text import say_lost, unknown_texts
from common.errors import UserError
from common.images import to_unit
from ldm.conditioners import ClassEmbedder, LayoutTokenizer, SpatialRescaler, TransformerEmbedder
from ldm.config import ConditionerConfig, DataConfig, LdmConfig
from ldm.degradation import low_resolution
from ldm.masks import random_mask
from ldm.streaming import ShardStream, open_shards

if TYPE_CHECKING:
    from common.data.folders import Images

NO_OBJECT = -1  # class of the padding rows in `classes`
PHOTO_SPLITS = {"train": "train", "test": "scene"}  # held out: pairs of a known object and a known background
PIXELS_ALONE = dict.fromkeys(("unconditional", "superres", "inpaint"), "unconditional")
TOKENIZER_CAPTIONS = 50_000  # of a stream, from which its tokenizer learns
BOX_CATEGORIES = 128  # layout tokens: at least 8 shapes x 10 colours


def open_dataset(data: DataConfig, split: str, seed: int = 0, task: str = "") -> Dataset:
    """The configured data set; items are dictionaries with `image` uint8 [3, H, W] and what the set knows of it.

    Args:
        task: what it has no use for is not read from the user's own data.
    """
    n = data.train_images if split == "train" else data.eval_images
    if data.name == "emoji":
        from common.data.emoji import EmojiCap

        return EmojiCap(split, size=data.size, skin_tones="none", seed=seed)  # type: ignore[arg-type]
    if data.name == "emoji_groups":
        from common.data.emoji import EmojiGroups

        return EmojiGroups(split, size=data.size)  # type: ignore[arg-type]
    if data.name == "shapes":
        from common.data.shapes import TASKS, Shapes

        tasks = tuple(data.tasks) if data.tasks else TASKS
        return Shapes(split, n or 20000, size=data.size, seed=seed, tasks=tasks)  # type: ignore[arg-type]
    if data.name == "photos":
        from common.data.photos import PhotoCollage

        return PhotoCollage(PHOTO_SPLITS[split], n or 20000, data.size, seed, data.path)  # type: ignore[arg-type]
    if data.name == "fashion_mnist":
        from common.data.fashion_mnist import FashionMNIST

        return FashionMNIST(split, root=data.path, pad_to=data.size)  # type: ignore[arg-type]
    if data.path is None:
        raise UserError(f"data.name {data.name} needs --data.path (a folder, or a data set's name)")
    columns = {"image": data.image_column, "text": data.text_column, "label": data.label_column}
    for name in {"unconditional": ("text", "label"), "class": ("text",)}.get(PIXELS_ALONE.get(task, task), ()):
        columns[name] = columns[name] or LEFT_OUT
    need = {"text": ("caption",), "class": ("label",)}.get(task, ())
    return user_images(data.path, data.size, split, seed, need, **columns)


class UserImages(Dataset[dict[str, Any]]):
    """A part of the user's images, with `captions` and `classes`."""

    def __init__(self, images: Images) -> None:
        self.images, self.classes, self.about = images, images.classes, images.source.about

    @cached_property
    def captions(self) -> list[str]:
        return self.images.captions()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.images[index]


def user_images(
    where: str, size: int, split: str, seed: int, need: Sequence[str] = (), **columns: str | None
) -> UserImages:
    """The user's images of a part, train or test, which share none (`hold_out`).

    Args:
        need, columns: for `open_source`; of columns image, text and label.
    """
    from common.data.folders import Framing, Images, open_source

    source = open_source(where, **columns, need=need)
    rows, held_out = hold_out(source)
    if not held_out:
        raise UserError(
            f"--data.path {where}: {len(source)} images are too few; at least {FEWEST_IMAGES} are needed, one in "
            f"{HELD_OUT_SHARE} of which is held out for the metrics"
        )
    return UserImages(Images(source, Framing(size), seed).part(rows if split == "train" else held_out))


def whole_folder(data: DataConfig) -> UserImages:
    """All of the user's images, to measure with."""
    from common.data.folders import Framing, Images, open_source

    source = open_source(str(data.path), image=data.image_column, text=data.text_column, label=data.label_column)
    return UserImages(Images(source, Framing(data.size)))


@dataclass
class Task:
    """Data and condition of one run.

    Attributes:
        train, reference: tables with `image` uint8 [N, 3, H, W] and the task's own columns; `reference` is held out.
            `train` is lazy where it would not fit in data.max_memory_gb, and a stream for data.name shards.
        conditioning_key: None, "crossattn", "concat" or "adm".
        concat_channels: channels that the condition adds to the denoiser's input.
        conditioner: turns the columns of a batch into the condition (trained jointly), or None.
        captions: of the reference images, for the grids and the alignment metric.
    """

    name: str
    train: Table | ShardStream
    reference: TensorTable
    conditioning_key: str | None = None
    concat_channels: int = 0
    context_dim: int | None = None
    num_classes: int | None = None
    conditioner: nn.Module | None = None
    tokenizer: Any = None
    captions: list[str] = field(default_factory=list)
    reference_dataset: Any = None
    classes: Sequence[str] = ()

    def fingerprint(self) -> str:
        """Of what is trained on and measured by: of the user's files, or of the columns of our own sets (captions are
        a function of their options).
        """
        if isinstance(self.train, ShardStream):
            return self.train.images.contents
        if isinstance(self.reference_dataset, UserImages):
            return self.reference_dataset.images.source.fingerprint
        parts = []
        for table in (self.train, self.reference):
            rows = torch.linspace(0, len(table) - 1, min(len(table), 256)).long().tolist()  # of one not in memory
            columns = table.columns if isinstance(table, TensorTable) else table.__getitems__(rows)
            parts.append(fingerprint_tensors({name: c for name, c in columns.items() if name != "tokens"}))
        return fingerprint_strings([str(len(self.train)), *parts])

    def caption_columns(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The columns of a text task for any captions."""
        if isinstance(self.conditioner, StateTable):
            return {"tokens": self.conditioner.rows(captions)[:, None]}
        if not set(captions) <= set(self.captions):  # those of the data were told about when they were read
            say_lost_captions(self.tokenizer, captions, "prompts")
        return {"tokens": tokenize(self.tokenizer, captions)[:, None]}


Columns = Callable[[dict[str, Any], int], dict[str, Tensor]]


def lazy_table(dataset: Dataset, columns: Columns, limit: int | None) -> LazyTable:
    """Every sample's image and task columns, made when they are asked for."""
    n = min(len(dataset), limit or len(dataset))  # type: ignore[arg-type]
    if n == 0:
        raise UserError("the data set is empty")

    def row(i: int) -> dict[str, Tensor]:
        item = dataset[i]
        if len(item["image"]) == 1:  # grey levels
            item = {**item, "image": item["image"].expand(3, -1, -1)}
        return {"image": item["image"], **columns(item, i)}

    return LazyTable(n, row)


def table(dataset: Dataset, columns: Columns, limit: int | None) -> TensorTable:
    """Every sample's image and task columns, stacked in memory."""
    lazy = lazy_table(dataset, columns, limit)
    return TensorTable(lazy.__getitems__(range(len(lazy))))


def fitting_table(dataset: Dataset, columns: Columns, limit: int | None, gigabytes: float) -> Table:
    """In memory where the samples are at most so large, else lazy."""
    lazy = lazy_table(dataset, columns, limit)
    size = len(lazy) * sum(column.nbytes for column in lazy[0].values())
    return table(dataset, columns, limit) if size <= gigabytes * 1e9 else lazy


def train_tokenizer(captions: Sequence[str], vocabulary: int, tokens: int) -> Any:
    """A WordPiece tokenizer learned from the captions, as a fast transformers tokenizer ([CLS] ... [SEP], padded)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in set(captions) for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    # The trainer numbers letters inside words in the order of a hash map, which differs from run to run, and breaks
    # ties by these numbers: naming the letters beforehand makes the vocabulary a function of the captions.
    inner = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    learner.train_from_iterator(
        sorted(captions),
        trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special + inner, show_progress=False),
    )
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
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


def say_lost_captions(tokenizer: Any, captions: Sequence[str], name: str = "captions") -> None:
    """Warn of captions that the tokenizer cuts, or of which it knows no word; each is counted once."""
    different = list(dict.fromkeys(captions))[:TOKENIZER_CAPTIONS]
    encodings = tokenizer(different, truncation=True, max_length=tokenizer.model_max_length).encodings or ()
    cut = [i for i, encoding in enumerate(encodings) if encoding.overflowing]
    say_lost(f"different {name}", different, cut, f"cut to {tokenizer.model_max_length} tokens")
    unknown = unknown_texts(tokenizer, [encoding.ids for encoding in encodings])
    say_lost(f"different {name}", different, unknown, "unknown to the tokenizer")


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
                attn_implementation="eager",  # the fused one has a slow backward pass in bfloat16 on CPUs
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
    plain = list(captions[:n]) if captions is not None else [dataset[i]["caption"] for i in range(n)]
    if not any(plain):
        found = f" ({dataset.about})" if hasattr(dataset, "about") else ""
        raise UserError(
            'task text needs captions: give every image a "text" in metadata.jsonl, name their column with '
            f"--data.text_column, or choose --task unconditional{found}"
        )
    return plain


def prepare(config: LdmConfig, tokenizer: Any = None) -> Task:
    """Open the data, build the task's columns and its conditioner.

    Args:
        tokenizer: of an earlier run (resume, sampling); text tasks otherwise learn one from the training captions.
    """
    train: Any
    held_out: Any
    if config.data.name == "shards":
        train, held_out = open_shards(config.data, config.task, config.seed)
    else:
        train, held_out = (open_dataset(config.data, part, config.seed, config.task) for part in ("train", "test"))
    return build_task(config, train, held_out, tokenizer)


def build_task(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any = None) -> Task:
    """The task's columns of two parts of the data, and its conditioner; see `prepare`."""
    builders: dict[str, Callable[..., Task]] = {
        "unconditional": _unconditional,
        "class": _class,
        "text": _text,
        "layout": _layout,
        "semantic": _semantic,
        "superres": _superres,
        "inpaint": _unconditional,
    }
    torch.manual_seed(config.seed)  # the conditioner's first weights
    task = builders[config.task](config, train, held_out, tokenizer)
    task.reference_dataset = held_out
    task.classes = getattr(train, "classes", None) or getattr(train, "class_names", None) or ()
    if config.task == "inpaint":
        task.conditioning_key = "concat"
    return task


def _tables(
    config: LdmConfig, train: Any, held_out: Any, columns: Columns, columns_test: Columns | None = None
) -> dict[str, Any]:
    data = config.data
    return {
        "train": ShardStream(train, columns, data.workers)
        if isinstance(train, ShardedImages)
        else fitting_table(train, columns, data.train_images, data.max_memory_gb),
        "reference": table(held_out, columns_test or columns, config.data.eval_images),
    }


def _unconditional(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    return Task(config.task, **_tables(config, train, held_out, lambda item, i: {}))


def _class(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    def columns(item: dict[str, Any], i: int) -> dict[str, Tensor]:
        label = int(_need(item, "label", config))
        if label < 0:
            raise UserError(
                "task class needs a class for every image: sort the images into one folder per class, or add "
                '"label" to metadata.jsonl'
            )
        return {"label": torch.as_tensor(label)}

    tables = _tables(config, train, held_out, columns)
    names = getattr(train, "classes", None) or getattr(train, "class_names", None) or ()
    labels = [int(part.columns["label"].max()) for part in tables.values() if isinstance(part, TensorTable)]
    known = train.class_count() if isinstance(train, ShardedImages) else len(names)
    classes = max(known, *(label + 1 for label in labels))
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
    test_captions = plain_captions(held_out, min(len(held_out), config.data.eval_images))
    streamed = isinstance(train, ShardedImages)
    if streamed:
        if options.kind == "frozen":
            raise UserError(
                "conditioner.kind frozen keeps the states of every caption in memory, which data.name shards does not "
                "know beforehand: use bert or tau"
            )
        train_captions = [[caption] for caption in train.captions(TOKENIZER_CAPTIONS)] if tokenizer is None else []
    else:
        n = min(len(train), config.data.train_images or len(train))
        train_captions = phrasings(train, n, options.caption_variants, config.seed)
    if options.kind == "frozen":
        return _frozen_text(config, train, held_out, train_captions, test_captions)
    if tokenizer is None:
        tokenizer = train_tokenizer([c for row in train_captions for c in row], options.vocabulary, options.tokens)
    say_lost_captions(tokenizer, [caption for row in train_captions for caption in row] + test_captions)
    test_tokens = tokenize(tokenizer, test_captions)
    tokens = [] if streamed else [tokenize(tokenizer, row) for row in train_captions]

    def columns(item: dict[str, Any], i: int) -> dict[str, Tensor]:
        return {"tokens": tokenize(tokenizer, [item["caption"]]) if streamed else tokens[i]}

    tables = _tables(config, train, held_out, columns, lambda item, i: {"tokens": test_tokens[i][None]})
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

    def encode(texts: Sequence[str]) -> Tensor:
        return encoder.encode(texts, length=config.conditioner.tokens)[0].to(torch.float16)  # 0 at padding

    states = encode(distinct)
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
        conditioner=StateTable(states, row_of, encode),
        captions=test_captions,
    )


class StateTable(nn.Module):
    """Frozen token states by caption number; `null` is the empty caption's number.

    Args:
        row_of: number of every caption, the empty one included.
        encode: makes the states [N, L, D] of captions that are not in the table yet.
    """

    states_NLD: Tensor

    def __init__(self, states_NLD: Tensor, row_of: dict[str, int], encode: Callable[[Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.register_buffer("states_NLD", states_NLD, persistent=False)
        self.row_of, self.encode, self.null = dict(row_of), encode, row_of[""]

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Numbers int64 [N] of captions; new ones are encoded and join the table."""
        new = sorted(set(captions) - self.row_of.keys())
        if new:
            self.row_of.update({caption: len(self.states_NLD) + i for i, caption in enumerate(new)})
            self.states_NLD = torch.cat([self.states_NLD, self.encode(new).to(self.states_NLD)])
        return torch.tensor([self.row_of[caption] for caption in captions])

    def forward(self, rows_B: Tensor) -> Tensor:
        return self.states_NLD[rows_B].float()


def box_categories(item: dict[str, Any]) -> Tensor:
    """Category of every box: that of the photographed object, and for Shapes class and colour together."""
    if "colours" in item:
        return item["classes"] * len(COLOURS) + item["colours"]
    return item["categories"]


def layout_tokenizer(objects: int) -> LayoutTokenizer:
    """Of layouts with at most so many objects."""
    return LayoutTokenizer(n_categories=BOX_CATEGORIES, max_objects=objects, no_tokens=1024)


def layout_columns(item: dict[str, Any]) -> dict[str, Tensor]:
    """The columns of a layout: its tokens, and boxes, classes and colours to draw it."""
    classes = item["classes"] if "classes" in item else item["categories"]
    present = classes != NO_OBJECT
    corners = item["boxes"][present]
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    layout = layout_tokenizer(len(item["boxes"]))
    return {
        "layout": torch.as_tensor(layout.encode(box_categories(item)[present].tolist(), boxes)),
        "boxes": item["boxes"],
        "classes": classes,
        **({"colours": item["colours"]} if "colours" in item else {}),
    }


def _layout(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    first = held_out[0]
    _need(first, "boxes", config)
    layout = layout_tokenizer(len(first["boxes"]))

    def columns(item: dict[str, Any], i: int) -> dict[str, Tensor]:
        return layout_columns(item)

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
    # 0 is the background; a small training set may lack a category that a held-out picture shows.
    n_labels = 1 + (len(SHAPES) if config.data.name == "shapes" else len(CATEGORIES))
    halvings = 0 if config.first_stage.kind == "pixels" else len(config.first_stage.ch_mult) - 1
    return Task(
        "semantic",
        **tables,
        conditioning_key="concat",
        concat_channels=3,
        conditioner=SemanticConditioner(n_labels, halvings),
    )


def _superres(config: LdmConfig, train: Any, held_out: Any, tokenizer: Any) -> Task:
    """The low-resolution image itself is the condition, at the latent's resolution: where scale and f differ (f = 1,
    the pixel-space baseline) it is enlarged by repetition."""
    options = config.conditioner
    side = config.data.size // (
        1 if config.first_stage.kind == "pixels" else 2 ** (len(config.first_stage.ch_mult) - 1)
    )

    def columns(item: dict[str, Any], i: int) -> dict[str, Tensor]:
        low = low_resolution(item["image"], options.scale, options.degradation, derive_seed(config.seed, i))
        return {"low": F.interpolate(low[None], side, mode="nearest")[0]}

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


def null_input(task: Task) -> Tensor | None:
    """The raw condition that means "none": the empty caption, the null class; None means zeros."""
    if task.name == "class":
        assert task.num_classes is not None
        return torch.tensor([task.num_classes - 1])
    if task.name == "text":
        if isinstance(task.conditioner, StateTable):
            return torch.tensor([task.conditioner.null])
        return tokenize(task.tokenizer, [""])
    return None


def raw_condition(task_name: str, columns: Mapping[str, Tensor], pick_B: Tensor | None = None) -> dict[str, Tensor]:
    """The batch entries that `LatentDiffusion.conditioning` reads, from a table's columns.

    Args:
        pick_B: numbers in [0, 1) that choose among the phrasings of each caption; None takes the first.
    """
    if task_name == "text":
        tokens = columns["tokens"]
        if pick_B is None:
            return {"condition": tokens[:, 0]}
        rows = (pick_B * tokens.shape[1]).long().clamp_(max=tokens.shape[1] - 1)
        return {"condition": tokens[torch.arange(len(tokens), device=tokens.device), rows]}
    if task_name == "class":
        return {"condition": columns["label"]}
    if task_name == "layout":
        return {"condition": columns["layout"]}
    if task_name == "semantic":
        return {"condition": columns["label_map"]}
    if task_name == "superres":
        return {"condition": to_unit(columns["low"])}
    if task_name == "inpaint":
        hole_B1HW = columns["hole"]
        # Unknown pixels are black before encoding; the mask itself enters as -1 (known) and +1 (to be painted).
        return {"condition": torch.where(hole_B1HW > 0.5, -1.0, to_unit(columns["image"])), "mask": hole_B1HW * 2 - 1}
    return {}
