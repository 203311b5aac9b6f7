"""Fine-tuning heads as in the official code (which differ from transformers').

Shapes: B rows (tagging: words), L tokens of a row, D hidden size, C classes, K beam.

Every final layer starts at TensorFlow's default (Glorot uniform, zero bias). Losses are one number per example; the
official training loss is their SUM over the batch, which clipping at norm 1 turns into a normalised gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANSWER_HIDDEN = 512  # width of the two hidden layers of the question-answering head
BEAM = 20  # starts, and ends per start, that are tried at inference
ANSWERABLE_WEIGHT = 0.5
_OUTSIDE = 1000.0  # taken from the logits of tokens that can be no answer


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ClassificationHead(nn.Module):
    """Dropout and one linear layer on the hidden state of [CLS], or (tagging) of the first piece of every word."""

    def __init__(self, hidden_size: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = _linear(hidden_size, classes)

    def forward(self, h_BD: Tensor) -> Tensor:
        """Logits [B, C], float32."""
        return self.dense(self.dropout(h_BD)).float()

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy [B]."""
        return F.cross_entropy(logits_BC, labels_B, reduction="none")


class RegressionHead(nn.Module):
    """Dropout and one linear unit on the hidden state of [CLS]; targets are scaled to [0, 1]."""

    def __init__(self, hidden_size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = _linear(hidden_size, 1)

    def forward(self, cls_BD: Tensor) -> Tensor:
        """Predictions [B], float32."""
        return self.dense(self.dropout(cls_BD))[:, 0].float()

    def loss(self, predictions_B: Tensor, targets_B: Tensor) -> Tensor:
        """Squared error [B]."""
        return (predictions_B - targets_B).square()


@dataclass(frozen=True)
class AnswerLogits:
    """Start and end logits [B, L] (end given the gold start) and the logit [B] of "there is no answer"."""

    start_BL: Tensor
    end_BL: Tensor
    impossible_B: Tensor


@dataclass(frozen=True)
class AnswerBeams:
    """Log-probabilities and places of the K best starts, of the K best ends for each, and `impossible_B` as above."""

    start_log_probs_BK: Tensor
    starts_BK: Tensor
    end_log_probs_BKK: Tensor
    ends_BKK: Tensor
    impossible_B: Tensor


class QuestionAnsweringHead(nn.Module):
    """Span extraction with answerability (SQuAD 2.0): the end is predicted given the start.

    start: one unit on h_t. end: one unit on gelu(dense([h_start; h_t])). No answer: one unit on
    gelu(dense([h_cls; sum_t softmax(start)_t h_t])).

    Args:
        joint: False predicts the end by one unit on h_t, without the start (official `joint_prediction`).
        answerable: False leaves the question whether there is an answer out (official `answerable_classifier`).
        answerable_from_start: False asks one unit on h_cls alone (official `answerable_uses_start_logits`).
    """

    def __init__(
        self, hidden_size: int, joint: bool = True, answerable: bool = True, answerable_from_start: bool = True
    ) -> None:
        super().__init__()
        self.joint, self.answerable, self.from_start = joint, answerable, answerable and answerable_from_start
        self.start = _linear(hidden_size, 1)
        if joint:
            self.end_hidden = _linear(2 * hidden_size, ANSWER_HIDDEN)
        self.end = _linear(ANSWER_HIDDEN if joint else hidden_size, 1)
        if self.from_start:
            self.impossible_hidden = _linear(2 * hidden_size, ANSWER_HIDDEN)
        if answerable:
            self.impossible = _linear(ANSWER_HIDDEN if self.from_start else hidden_size, 1)

    @property
    def official_layers(self) -> dict[str, str]:
        """What the official code calls our layers: TensorFlow counts those without a name of their own."""
        ours = [name for name in ("start", "end", "impossible_hidden", "impossible") if hasattr(self, name)]
        counted = {name: f"dense_{i}" if i else "dense" for i, name in enumerate(ours)}
        return {**counted, "end_hidden": "qa_hidden"} if self.joint else counted

    def forward(self, h_BLD: Tensor, candidates_BL: Tensor, start_B: Tensor) -> AnswerLogits:
        """Logits for training.

        Args:
            candidates_BL: 1 where an answer may stand (see `answer_candidates`), 0 elsewhere.
            start_B: gold start; 0 ([CLS]) for a question without answer.
        """
        h_BLD = h_BLD.float()
        start_BL = self._start_logits(h_BLD, candidates_BL)
        start_B1D = h_BLD.gather(1, start_B[:, None, None].expand(-1, 1, h_BLD.shape[-1]))
        end_BL = self._end_logits(h_BLD, start_B1D, candidates_BL)[:, 0]
        return AnswerLogits(start_BL, end_BL, self._impossible_logit(h_BLD, start_BL))

    def loss(
        self,
        logits: AnswerLogits,
        start_B: Tensor,
        end_B: Tensor,
        impossible_B: Tensor,
        answerable_weight: float = ANSWERABLE_WEIGHT,
    ) -> Tensor:
        """(start + end) / 2 + 0.5 answerability, [B]."""
        start = F.cross_entropy(logits.start_BL, start_B, reduction="none")
        end = F.cross_entropy(logits.end_BL, end_B, reduction="none")
        if not self.answerable:
            return (start + end) / 2
        answerable = F.binary_cross_entropy_with_logits(logits.impossible_B, impossible_B.float(), reduction="none")
        return (start + end) / 2 + answerable_weight * answerable

    def search(self, h_BLD: Tensor, candidates_BL: Tensor, beam: int = BEAM) -> AnswerBeams:
        """The `beam` best starts and the `beam` best ends for each (fewer in shorter rows)."""
        h_BLD = h_BLD.float()
        start_BL = self._start_logits(h_BLD, candidates_BL)
        k = min(beam, h_BLD.shape[1])
        start_log_probs_BK, starts_BK = start_BL.log_softmax(-1).topk(k)
        start_BKD = h_BLD.gather(1, starts_BK[..., None].expand(-1, -1, h_BLD.shape[-1]))
        end_BKL = self._end_logits(h_BLD, start_BKD, candidates_BL)
        end_log_probs_BKK, ends_BKK = end_BKL.log_softmax(-1).topk(k)
        impossible_B = self._impossible_logit(h_BLD, start_BL)
        return AnswerBeams(start_log_probs_BK, starts_BK, end_log_probs_BKK, ends_BKK, impossible_B)

    def _start_logits(self, h_BLD: Tensor, candidates_BL: Tensor) -> Tensor:
        return self.start(h_BLD)[..., 0] + _OUTSIDE * (candidates_BL - 1)

    def _end_logits(self, h_BLD: Tensor, start_BKD: Tensor, candidates_BL: Tensor) -> Tensor:
        """[B, K, L]. dense([h_start; h_t]) is the sum of two products, neither of which needs all K x L pairs."""
        if not self.joint:
            end_BL = self.end(h_BLD)[..., 0] + _OUTSIDE * (candidates_BL - 1)
            return end_BL[:, None].expand(-1, start_BKD.shape[1], -1)
        from_start, from_token = self.end_hidden.weight.chunk(2, dim=1)
        start_BK1H = F.linear(start_BKD, from_start, self.end_hidden.bias)[:, :, None]
        token_B1LH = F.linear(h_BLD, from_token)[:, None]
        end_BKL = self.end(F.gelu(start_BK1H + token_B1LH))[..., 0]
        return end_BKL + _OUTSIDE * (candidates_BL[:, None] - 1)

    def _impossible_logit(self, h_BLD: Tensor, start_BL: Tensor) -> Tensor:
        """[B]; 0 where the head does not ask."""
        if not self.answerable:
            return h_BLD.new_zeros(len(h_BLD))
        if not self.from_start:
            return self.impossible(h_BLD[:, 0])[:, 0]
        expected_BD = torch.einsum("bl,bld->bd", start_BL.softmax(-1), h_BLD)
        features = torch.cat([h_BLD[:, 0], expected_BD], -1)
        return self.impossible(F.gelu(self.impossible_hidden(features)))[:, 0]


def answer_candidates(mask_BL: Tensor, types_BL: Tensor) -> Tensor:
    """1.0 at [CLS] and at the real tokens of the second segment, 0.0 elsewhere: float32 [B, L]."""
    candidates_BL = mask_BL.float() * types_BL.float()
    candidates_BL[:, 0] += 1
    return candidates_BL


def best_span(beams: AnswerBeams, row: int, longest: int) -> tuple[int, int] | None:
    """The most probable (first, last) token of a row, or None where [CLS] is all the beams hold.

    Spans that touch [CLS], run backwards or hold more than `longest` tokens do not count.
    """
    best: tuple[float, int, int] | None = None
    starts, start_scores = beams.starts_BK[row].tolist(), beams.start_log_probs_BK[row].tolist()
    for start, start_score, ends, end_scores in zip(
        starts, start_scores, beams.ends_BKK[row].tolist(), beams.end_log_probs_BKK[row].tolist()
    ):
        for end, end_score in zip(ends, end_scores):
            if 0 < start <= end < start + longest and (best is None or start_score + end_score > best[0]):
                best = (start_score + end_score, start, end)
    return None if best is None else (best[1], best[2])
