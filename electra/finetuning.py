"""Fine-tuning on a labelled task, as in the official code, and what it scores.

Adam without bias correction, linear decay with 10 % warm-up, layer-wise rates, gradients of the summed loss clipped at
norm 1. Rows are packed without padding and the last block computes only the tokens that the head reads.

Shapes: B rows, N packed tokens of a batch, M tagged words, L tokens of a row, D hidden size.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, stop_if_not_finite
from common.processes import say_once
from electra.config import ElectraConfig, FinetuneConfig
from electra.heads import ClassificationHead, QuestionAnsweringHead, RegressionHead, answer_candidates, best_span
from electra.layouts import Pretrained, load_pretrained
from electra.model import Batch, Encoder
from electra.optim import OfficialAdam, clip_global_norm, learning_rate, parameter_groups, set_learning_rate
from electra.tasks import Item, Task
from electra.wordpiece import Tokenizer

LONGEST_ANSWER = 30  # tokens (official `max_answer_length`)
_EVALUATION_BATCH = {"classification": 128, "regression": 128, "tagging": 128, "questions": 16}


@dataclass(frozen=True)
class FinetuneResult:
    """Scores in per cent (correlations too) on the test and development splits, and what they cost."""

    task: str
    seed: int
    pretrained: bool
    metric: str
    test: dict[str, float]
    dev: dict[str, float]
    steps: int
    train_seconds: float
    train_loss: float

    @property
    def score(self) -> float:
        """The task's headline metric on the test split."""
        return self.test[self.metric]

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


@dataclass(frozen=True)
class Row:
    """An encoded item.

    Args:
        ids, types: the tokens; `places` the tokens that the head reads.
        label: class or score; tags: one class per place; span: first and last token of the answer, (0, 0) for none.
        word_of_token: which word of the passage each token belongs to, -1 outside it.
    """

    ids: list[int]
    types: list[int]
    places: list[int]
    item: Item
    tags: list[int]
    span: tuple[int, int] = (0, 0)
    word_of_token: tuple[int, ...] = ()


def encode_items(items: Sequence[Item], task: Task, tokenizer: Tokenizer, max_length: int) -> list[Row]:
    """Rows of the items, at most `max_length` tokens long.

    Classification: [CLS] A [SEP] (B [SEP]), the longer one cut first. Tagging: the words' pieces, type 1 on every token
    (as in the official code), labels on first pieces; words beyond the length are dropped. Questions: [CLS] question
    [SEP] passage [SEP]; an answer beyond the length counts as none in training.
    """
    if task.kind in ("tagging", "questions"):
        flat = tokenizer.ids_of_words([word for item in items for word in item.words])
        bounds = np.cumsum([0, *(len(item.words) for item in items)])
        words = [flat[a:b] for a, b in pairwise(bounds)]
        if task.kind == "tagging":
            return [_tagging_row(*pair, tokenizer, max_length) for pair in zip(items, words)]
        questions = tokenizer.ids_of_many([item.text for item in items])
        return [_question_row(*triple, tokenizer, max_length) for triple in zip(items, questions, words)]
    rows: list[Row] = []
    cut: list[int] = []
    cls_id, sep_id = tokenizer.cls_id, tokenizer.sep_id
    seconds = tokenizer.ids_of_many([item.second for item in items])
    for item, first, second in zip(items, tokenizer.ids_of_many([item.text for item in items]), seconds):
        room = max_length - (3 if second else 2)
        cut += [len(rows)] if len(first) + len(second) > room else []
        while len(first) + len(second) > room:
            (first if len(first) > len(second) else second).pop()
        ids = [cls_id, *first, sep_id, *second, *([sep_id] if second else [])]
        types = [0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2)
        rows.append(Row(ids, types, [0], item, []))
    if cut:
        say_once(
            f"{task.name}: {len(cut)} of {len(items)} texts are cut to {max_length} tokens, the first is "
            f"{items[cut[0]].text[:200]!r}"
        )
    return rows


def _tagging_row(item: Item, words: list[list[int]], tokenizer: Tokenizer, max_length: int) -> Row:
    ids, places = [tokenizer.cls_id], []
    for pieces in words:
        if len(ids) + len(pieces) >= max_length:
            break
        places.append(len(ids))
        ids += pieces
    ids.append(tokenizer.sep_id)
    return Row(ids, [1] * len(ids), places, item, list(item.tags[: len(places)]))


def _question_row(
    item: Item, question: list[int], words: list[list[int]], tokenizer: Tokenizer, max_length: int
) -> Row:
    ids = [tokenizer.cls_id, *question[: max_length // 2], tokenizer.sep_id]
    start = len(ids)
    word_of_token = [-1] * start
    for index, pieces in enumerate(words):
        if len(ids) + len(pieces) >= max_length:
            break
        ids += pieces
        word_of_token += [index] * len(pieces)
    ids.append(tokenizer.sep_id)
    word_of_token.append(-1)
    span = (0, 0)
    if item.answer is not None and item.answer[1] in word_of_token:
        last = len(word_of_token) - 1 - word_of_token[::-1].index(item.answer[1])
        span = (word_of_token.index(item.answer[0]), last)
    return Row(ids, [0] * start + [1] * (len(ids) - start), [], item, [], span, tuple(word_of_token))


class FinetuneModel(nn.Module):
    """An encoder (`electra`) and the head that the task's kind needs (`head`); the head's options from `config`."""

    def __init__(self, electra: Encoder, task: Task, config: FinetuneConfig | None = None) -> None:
        super().__init__()
        config = config or FinetuneConfig()
        dropout = config.dropout
        self.electra = electra
        self.kind = task.kind
        width = electra.config.hidden_size
        self.head: ClassificationHead | RegressionHead | QuestionAnsweringHead
        if task.kind == "questions":
            self.head = QuestionAnsweringHead(width, config.joint_ends, config.answerable, config.answerable_from_start)
        elif task.kind == "regression":
            self.head = RegressionHead(width, dropout)
        else:
            self.head = ClassificationHead(width, len(task.classes), dropout)

    def hidden(self, batch: PackedRows) -> Tensor:
        """What the head reads: [B, D] of [CLS], [M, D] of tagged words, or [B, L, D] for questions."""
        if self.kind == "questions":
            return batch.tokens.pad(self.electra(batch.tokens))
        return self.electra(batch.tokens, select_M=batch.places_M)

    def loss(self, batch: PackedRows) -> Tensor:
        """The loss of every example (of every word for tagging)."""
        hidden = self.hidden(batch)
        if isinstance(self.head, QuestionAnsweringHead):
            start_B, end_B = batch.labels.unbind(1)
            logits = self.head(hidden, batch.candidates(), start_B)
            return self.head.loss(logits, start_B, end_B, start_B == 0)
        return self.head.loss(self.head(hidden), batch.labels)


@dataclass(frozen=True)
class PackedRows:
    """A batch of rows: tokens, the places that the head reads, and labels ([B], [M], or [B, 2] spans)."""

    tokens: Batch
    places_M: Tensor
    labels: Tensor
    rows: list[Row]

    @classmethod
    def of(cls, rows: Sequence[Row], kind: str, device: torch.device) -> PackedRows:
        """Pack the rows, longest first: rows of equal length stand side by side, which attends fastest."""
        kept = sorted(rows, key=lambda row: -len(row.ids))
        lengths = [len(row.ids) for row in kept]
        starts = np.cumsum([0, *lengths[:-1]])
        places = [int(s) + p for s, row in zip(starts, kept) for p in row.places]
        labels: Tensor
        if kind == "questions":
            labels = torch.tensor([row.span for row in kept])
        elif kind == "tagging":
            labels = torch.tensor([tag for row in kept for tag in row.tags], dtype=torch.long)
        elif kind == "regression":
            labels = torch.tensor([row.item.label for row in kept], dtype=torch.float32)
        else:
            labels = torch.tensor([int(row.item.label) for row in kept])
        ids_N = torch.from_numpy(np.fromiter((i for row in kept for i in row.ids), np.int64, sum(lengths)))
        types_N = torch.from_numpy(np.fromiter((t for row in kept for t in row.types), np.int64, sum(lengths)))
        tokens = Batch.from_flat(ids_N, types_N, lengths).to(device)
        return cls(tokens, torch.tensor(places, dtype=torch.long).to(device), labels.to(device), kept)

    def candidates(self) -> Tensor:
        """Where an answer may stand, [B, L]."""
        types_N = self.tokens.types_N
        return answer_candidates(self.tokens.pad(torch.ones_like(types_N)), self.tokens.pad(types_N))


def finetune(
    source: str | Path | Pretrained | ElectraConfig,
    tokenizer: Tokenizer,
    task: Task,
    config: FinetuneConfig | None = None,
    seed: int = 0,
) -> FinetuneResult:
    """Fine-tune on the task's training split and score the test split once, after the last step.

    Args:
        source: a transformers directory or what `load_pretrained` read; an ElectraConfig trains from scratch.
        seed: of the head, of an encoder from scratch, of the order and of dropout.

    Raises:
        UserError: vocabulary and encoder do not fit, or the directory is no ELECTRA model.
    """
    return finetune_model(source, tokenizer, task, config, seed)[1]


def finetune_model(
    source: str | Path | Pretrained | ElectraConfig,
    tokenizer: Tokenizer,
    task: Task,
    config: FinetuneConfig | None = None,
    seed: int = 0,
) -> tuple[FinetuneModel, FinetuneResult]:
    """`finetune`, with the trained network (in eval mode)."""
    config = config or FinetuneConfig()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        encoder = _encoder(source, tokenizer, config)
        model = FinetuneModel(encoder, task, config).to(device)
        length = min(config.max_length, encoder.config.max_position)
        rows = encode_items(_training_items(task, config), task, tokenizer, length)
        started = time.perf_counter()
        steps, loss = _train(model, rows, config, seed, from_scratch=isinstance(source, ElectraConfig))
        seconds = time.perf_counter() - started
    test, dev = (
        evaluate(model, encode_items(items, task, tokenizer, length), config) if items else {}
        for items in (task.test, task.dev)
    )
    pretrained = not isinstance(source, ElectraConfig)
    return model, FinetuneResult(
        task.name, seed, pretrained, task.metric, test, dev, steps, round(seconds, 3), round(loss, 5)
    )


def _encoder(source: str | Path | Pretrained | ElectraConfig, tokenizer: Tokenizer, config: FinetuneConfig) -> Encoder:
    changes = {"dropout": config.dropout, "attention_dropout": config.dropout}
    if isinstance(source, ElectraConfig):
        encoder = Encoder(replace(source, **changes))  # type: ignore[arg-type]
    else:
        pretrained = source if isinstance(source, Pretrained) else load_pretrained(Path(source))
        encoder = pretrained.encoder(**changes)
    if tokenizer.size > encoder.config.vocab_size:
        raise UserError(
            f"the vocabulary has {tokenizer.size} pieces but the encoder knows {encoder.config.vocab_size}; give the "
            "vocab.txt that the encoder was trained with"
        )
    return encoder


def _training_items(task: Task, config: FinetuneConfig) -> list[Item]:
    if not config.double_unordered:
        return task.train
    return task.train + [replace(item, text=item.second, second=item.text) for item in task.train if item.second]


def _train(
    model: FinetuneModel, rows: list[Row], config: FinetuneConfig, seed: int, from_scratch: bool
) -> tuple[int, float]:
    """Returns the number of steps and the mean loss of the last tenth of them."""
    layers = model.electra.config.layers
    decay = None if from_scratch else config.layer_decay
    base = config.scratch_lr if from_scratch and config.scratch_lr is not None else config.lr
    groups = parameter_groups(model.named_parameters(), config.weight_decay, decay, layers)
    optimizer = OfficialAdam(groups, base)
    parameters = [p for group in groups for p in group["params"]]
    device = parameters[0].device
    total = max(1, int(len(rows) * config.epochs / config.batch_size))
    warmup = int(total * config.warmup)
    recent: list[float] = []
    model.train()
    for step, chosen in enumerate(_batches(rows, config.batch_size, total, seed)):
        set_learning_rate(optimizer, learning_rate(step + 1, base, warmup, total + 1))
        batch = PackedRows.of(chosen, model.kind, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = model.loss(batch)
        mean = float(losses.detach().mean())
        stop_if_not_finite(mean, step + 1, advice="a lower rate, and look at the labels", what="fine-tuning loss")
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # the official reduction
        clip_global_norm(parameters, config.clip)
        optimizer.step()
        if step >= total * 9 // 10:
            recent.append(mean)
    model.eval()
    return total, sum(recent) / len(recent)


def _batches(rows: Sequence[Row], size: int, total: int, seed: int) -> Iterator[list[Row]]:
    """`total` batches from one shuffled pass after the other; a batch may span two passes."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(total):
        while len(queue) < size:
            queue += rng.permutation(len(rows)).tolist()
        yield [rows[i] for i in queue[:size]]
        del queue[:size]


@torch.inference_mode()
def evaluate(model: FinetuneModel, rows: Sequence[Row], config: FinetuneConfig | None = None) -> dict[str, float]:
    """Scores in per cent: accuracy and Matthews, Spearman and Pearson, tagging accuracy, or F1 and exact match.

    Raises:
        UserError: the network's answers are not finite, which would all count as one class.
    """
    from scipy.stats import rankdata
    from sklearn.metrics import matthews_corrcoef

    config = config or FinetuneConfig()
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row.ids))
    outputs, truths, spans = [], [], []
    size = _EVALUATION_BATCH[model.kind]
    for start in range(0, len(ordered), size):
        batch = PackedRows.of(ordered[start : start + size], model.kind, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            hidden = model.hidden(batch)
            refuse_not_finite(hidden)
            if isinstance(model.head, QuestionAnsweringHead):
                spans += _answers(model.head, hidden, batch)
                continue
            outputs.append(model.head(hidden))
            refuse_not_finite(outputs[-1])
        truths.append(batch.labels)
    if model.kind == "questions":
        return _answer_scores(spans)
    output, truth = torch.cat(outputs).cpu().numpy(), torch.cat(truths).cpu().numpy()
    if model.kind == "regression":
        return {"spearman": _correlation(rankdata(output), rankdata(truth)), "pearson": _correlation(output, truth)}
    predicted = output.argmax(-1)
    scores = {"accuracy": 100 * float((predicted == truth).mean())}
    if model.kind == "classification":
        scores["matthews"] = 100 * float(matthews_corrcoef(truth, predicted))  # 0 where one of them is constant
    return scores


@torch.inference_mode()
def predict(
    model: FinetuneModel, items: Sequence[Item], task: Task, tokenizer: Tokenizer, config: FinetuneConfig | None = None
) -> list[Any]:
    """What the network answers to every item, in their order: a class index, a score, a class index for every tagged
    word that a row has room for, or the first and last word of the answer (None: there is none).
    """
    config = config or FinetuneConfig()
    device = next(model.parameters()).device
    rows = encode_items(items, task, tokenizer, min(config.max_length, model.electra.config.max_position))
    answers: dict[int, Any] = {}
    size = _EVALUATION_BATCH[model.kind]
    for start in range(0, len(rows), size):
        place = {id(row): start + i for i, row in enumerate(rows[start : start + size])}
        batch = PackedRows.of(rows[start : start + size], model.kind, device)
        hidden = model.hidden(batch)
        refuse_not_finite(hidden)
        if isinstance(model.head, QuestionAnsweringHead):
            answers |= {place[id(row)]: span for span, _, row in _answers(model.head, hidden, batch)}
            continue
        output = model.head(hidden)
        refuse_not_finite(output)
        values = (output if model.kind == "regression" else output.argmax(-1)).tolist()
        if model.kind == "tagging":
            ends = np.cumsum([len(row.places) for row in batch.rows]).tolist()
            values = [values[end - len(row.places) : end] for row, end in zip(batch.rows, ends)]
        answers |= {place[id(row)]: value for row, value in zip(batch.rows, values)}
    return [answers[i] for i in range(len(rows))]


def answer_text(answer: Any, item: Item, task: Task) -> str:
    """An answer of `predict` for people: the class or the score; the classes of the words, `?` for those beyond the
    longest row; the words of the passage, nothing where there is no answer.
    """
    if task.kind == "questions":
        return "" if answer is None else " ".join(item.words[answer[0] : answer[1] + 1])
    if task.kind == "tagging":
        return " ".join([*(task.classes[k] for k in answer), *["?"] * (len(item.words) - len(answer))])
    return task.classes[int(answer)] if task.classes else f"{answer:.4f}"


def refuse_not_finite(output: Tensor) -> None:
    """Raise UserError where fine-tuning has run away."""
    if not bool(torch.isfinite(output).all()):
        raise UserError(
            "the fine-tuned network's answers are not finite, since its training ran away: try a lower rate (lr)"
        )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation in per cent; 0 where one side is constant."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    spread = float(a.std() * b.std())
    return 100 * float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 0 else 0.0


Answer = tuple[int, int] | None


def _answers(head: QuestionAnsweringHead, h_BLD: Tensor, batch: PackedRows) -> list[tuple[Answer, Answer, Row]]:
    """(predicted, gold, row) in words of the passage; no answer where the head deems that more probable than not."""
    beams = head.search(h_BLD, batch.candidates())
    found = []
    for index, row in enumerate(batch.rows):
        span = best_span(beams, index, LONGEST_ANSWER)
        predicted: Answer = None
        if span is not None and float(beams.impossible_B[index]) <= 0:
            first, last = row.word_of_token[span[0]], row.word_of_token[span[1]]
            predicted = (first, last) if first >= 0 and last >= 0 else None
        found.append((predicted, row.item.answer, row))
    return found


def _answer_scores(found: Sequence[tuple[Answer, Answer, Row]]) -> dict[str, float]:
    f1 = [answer_f1(_words(p, row.item), _words(g, row.item)) for p, g, row in found]
    exact = [_words(p, row.item) == _words(g, row.item) for p, g, row in found]
    answerable = [(p is None) == (g is None) for p, g, _ in found]
    return {
        "f1": 100 * float(np.mean(f1)),
        "exact_match": 100 * float(np.mean(exact)),
        "answerable_accuracy": 100 * float(np.mean(answerable)),
    }


def _words(answer: Answer, item: Item) -> list[str]:
    return [] if answer is None else [word.lower() for word in item.words[answer[0] : answer[1] + 1]]


def answer_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words (SQuAD); two empty answers agree."""
    if not predicted or not gold:
        return float(list(predicted) == list(gold))
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))
