"""Pre-training: generator and main network together, for every objective that the paper compares.

    electra         the main network says for every token whether it was replaced            (section 2)
    electra15       the same, loss at the chosen tokens only                                 (section 3.5)
    mlm             BERT: one network, [MASK] in its input, loss at the chosen tokens
    replace_mlm     as mlm, but the input holds a generator's samples instead of [MASK]      (section 3.5)
    all_tokens_mlm  as replace_mlm, loss at all tokens, with a copy mechanism                (section 3.5)

Shapes: B rows, N packed tokens, M chosen slots, D hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.kernels.vocab_head import VocabHead, vocab_head
from electra.config import ElectraConfig
from electra.masking import Corrupted, Draws, Masked, SpecialIds, choose, corrupt, gumbel_sample
from electra.model import Batch, Embeddings, Encoder, MlmHead, OutputBias, RtdHead

Objective = Literal["electra", "electra15", "mlm", "replace_mlm", "all_tokens_mlm"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
RTD: tuple[Objective, ...] = ("electra", "electra15")

DISC_WEIGHT = 50.0  # lambda of section 2
MEAN_EPSILON = 1e-6  # the official means are sum / (weight + 1e-6)


@dataclass
class Losses:
    """Result of a step.

    Args:
        total: what to differentiate.
        mlm_sum, mlm_weight: of the generator's cross-entropy (objective mlm: of the one network's).
        main_sum, main_weight: of the main network's loss (objective mlm: 0).
        counters: sums for metrics, see `metrics`; they may be added over batches and processes.
        logits_N, labels_N: replaced-token logits and labels of the tokens in the loss, for the AUC.
        policy_sum: of the generator's policy gradient (adversarial training), a mean over the slots like mlm_sum.
    """

    total: Tensor
    mlm_sum: Tensor
    mlm_weight: Tensor
    main_sum: Tensor
    main_weight: Tensor
    counters: dict[str, Tensor] = field(default_factory=dict)
    logits_N: Tensor | None = None
    labels_N: Tensor | None = None
    policy_sum: Tensor | None = None

    @property
    def mlm(self) -> Tensor:
        return (self.mlm_sum / (self.mlm_weight + MEAN_EPSILON)).detach()

    @property
    def main(self) -> Tensor:
        return (self.main_sum / (self.main_weight + MEAN_EPSILON)).detach()


@dataclass(frozen=True)
class Generated:
    """The generator's answer at the chosen slots; all but the samples are None for a generator without a network."""

    samples_M: Tensor
    loss_M: Tensor | None = None
    predictions_M: Tensor | None = None
    hidden_ME: Tensor | None = None  # what its vocabulary head reads


class ElectraPretrainer(nn.Module):
    """Generator and main network with their heads and tied weights; a shared parameter is registered once.

    Submodules: `electra` is the main network (its directory for transformers), `generator` the generator's encoder,
    `discriminator_predictions`, `generator_predictions` and `generator_lm_head` their heads under transformers' names;
    `mlm_predictions`, `mlm_lm_head` and `copy_gate` belong to the main network of the MLM ablations. For objective mlm
    the head of the one network has the generator's names, as in the official checkpoints.

    Args:
        mask_probability: 0.15; 0.25 for Large.
        max_length: length that examples are built for (bounds the slots of a row).
        temperature, disallow_correct: of the generator's samples.
    """

    def __init__(
        self,
        config: ElectraConfig,
        special: SpecialIds,
        objective: Objective = "electra",
        mask_probability: float = 0.15,
        max_length: int = 128,
        gen_weight: float = 1.0,
        disc_weight: float = DISC_WEIGHT,
        temperature: float = 1.0,
        disallow_correct: bool = False,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UserError(f"objective {objective!r} is unknown; there are: {', '.join(OBJECTIVES)}")
        self.config, self.special, self.objective = config, special, objective
        self.mask_probability, self.max_length = mask_probability, max_length
        self.gen_weight, self.disc_weight = gen_weight, disc_weight
        self.temperature, self.disallow_correct = temperature, disallow_correct
        self.electra = Encoder(config)
        self.generator: Encoder | None = None
        self.unigram_V: Tensor
        if objective == "mlm":
            self.generator_predictions = MlmHead(config)
            self.generator_lm_head = OutputBias(config)
            return
        if config.generator == "network":
            small = config.generator_config()
            if config.tying != "all":
                self.generator = Encoder(small, own_embeddings=config.tying == "none")
            self.generator_predictions = MlmHead(small)
            self.generator_lm_head = OutputBias(small)
        elif config.generator != "uniform_official":
            self.register_buffer("unigram_V", torch.ones(config.vocab_size, dtype=torch.float64))
            self.set_unigram(torch.ones(config.vocab_size))
        if objective in RTD:
            self.discriminator_predictions = RtdHead(config)
        else:
            self.mlm_predictions = MlmHead(config)
            self.mlm_lm_head = OutputBias(config)
        if objective == "all_tokens_mlm":
            self.copy_gate = nn.Linear(config.hidden_size, 1)
            nn.init.xavier_uniform_(self.copy_gate.weight)
            nn.init.zeros_(self.copy_gate.bias)

    @torch.no_grad()
    def set_unigram(self, counts_V: Tensor) -> None:
        """Frequencies of the corpus, for the unigram generator; special tokens are never sampled.

        Raises:
            UserError: negative counts, a wrong length, or no ordinary token.
        """
        weights = counts_V.to(self.unigram_V).clone()
        if weights.shape != self.unigram_V.shape or weights.min() < 0:
            raise UserError(f"the unigram generator needs {len(self.unigram_V)} counts, none negative")
        special = self.special
        for token in (special.pad, special.unk, special.cls, special.sep, special.mask):
            weights[token] = 0
        if not weights.sum() > 0:
            raise UserError("the unigram generator needs at least one ordinary token with a positive count")
        self.unigram_V.copy_(weights / weights.sum())

    @property
    def main_embeddings(self) -> Embeddings:
        assert self.electra.embeddings is not None
        return self.electra.embeddings

    @property
    def generator_embeddings(self) -> Embeddings:
        """The block that the generator reads: its own or the main network's."""
        own = self.generator.embeddings if self.generator is not None else None
        return own if own is not None else self.main_embeddings

    def mask(self, batch: Batch, generator: torch.Generator | None = None, draws: Draws | None = None) -> Masked:
        """Choose tokens and put [MASK] there."""
        return choose(batch, self.special, self.mask_probability, self.max_length, generator, draws)

    def generator_hidden(self, batch: Batch, ids_N: Tensor, select_M: Tensor | None = None) -> Tensor:
        """Hidden states of the generator (objective mlm: of the one network)."""
        encoder = self.electra if self.generator is None else self.generator
        return encoder(batch, ids_N, self.generator_embeddings, select_M)

    def generate(
        self, batch: Batch, masked: Masked, generator: torch.Generator | None = None, draws: Draws | None = None
    ) -> Generated:
        """The generator's cross-entropy and samples at the chosen slots; no gradient flows through the samples."""
        draws = draws or Draws()
        seeds_M = draws.seeds_M
        if seeds_M is None and draws.gumbel_MV is None and self.objective != "mlm":
            device = masked.positions_M.device
            seeds_M = torch.randint(1 << 62, (len(masked.positions_M),), generator=generator, device=device)
        if self.objective != "mlm" and self.config.generator == "uniform_official":
            return self._uniform(masked, seeds_M, draws.gumbel_MV)
        if self.objective != "mlm" and self.config.generator != "network":
            return Generated(self._unigram_samples(seeds_M))
        noise = (None, None) if self.objective == "mlm" else (seeds_M, draws.gumbel_MV)
        hidden_ME = self.generator_predictions(self.generator_hidden(batch, masked.ids_N, masked.positions_M))
        result = self.generator_head(hidden_ME, masked.targets_M, *noise, self.temperature, self.disallow_correct)
        samples_M = masked.targets_M if result.sampled_M is None else result.sampled_M
        return Generated(samples_M, result.loss_M, result.argmax_M, hidden_ME)

    def generator_head(self, hidden_ME: Tensor, ids_M: Tensor, *sampling: Any) -> VocabHead:
        """Cross-entropy of `ids_M` and a sample under the generator; `sampling` as in `vocab_head`."""
        table_VE = self.generator_embeddings.word_embeddings.weight
        return vocab_head(hidden_ME, table_VE, self.generator_lm_head.bias, ids_M, *sampling)

    def _unigram_samples(self, seeds_M: Tensor | None) -> Tensor:
        if seeds_M is None:
            raise UserError("a uniform or unigram generator samples from seeds, not from Gumbel noise")
        cumulative_V = self.unigram_V.cumsum(0)
        uniform_M = (seeds_M >> 9).double() / (1 << 53)
        # right: a number that falls on a boundary belongs to the next id, so ids of weight 0 are never drawn.
        return torch.searchsorted(cumulative_V, uniform_M * cumulative_V[-1], right=True)

    def _uniform(self, masked: Masked, seeds_M: Tensor | None, gumbel_MV: Tensor | None) -> Generated:
        """The official `uniform_generator`: logits of zero for every piece of the vocabulary."""
        pieces, targets_M = self.config.vocab_size, masked.targets_M
        loss_M = masked.weights_M.new_full(targets_M.shape, math.log(pieces))
        if gumbel_MV is not None:
            logits_MV = torch.zeros_like(gumbel_MV, dtype=torch.float32)
            samples_M = gumbel_sample(logits_MV, gumbel_MV, disallow_M=targets_M if self.disallow_correct else None)
        else:
            assert seeds_M is not None
            uniform_M = (seeds_M >> 9).double() / (1 << 53)
            if self.disallow_correct:  # one of the others
                samples_M = (uniform_M * (pieces - 1)).long()
                samples_M = samples_M + (samples_M >= targets_M)
            else:
                samples_M = (uniform_M * pieces).long()
        return Generated(samples_M, loss_M, torch.zeros_like(targets_M))

    def discriminate(self, batch: Batch, ids_N: Tensor) -> Tensor:
        """Replaced-token logits [N], positive for "replaced"."""
        return self.discriminator_predictions(self.electra(batch, ids_N))

    def forward(
        self,
        batch: Batch,
        draws: Draws | None = None,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> Losses:
        """Masking, generator, corruption, main network, losses.

        Args:
            draws: random numbers to use instead of the generator's (goldens).
            objective: electra and electra15 share their modules, so either may be asked of the other's model.
            generator: on the batch's device.
            all_reduce: sums a tensor over all processes (or batches of one update). The losses are means over the
                whole batch, so `total` is this process's sum over the global weight, times `world_size`, because data
                parallelism averages gradients.
        """
        objective = objective or self.objective
        if objective != self.objective and not (objective in RTD and self.objective in RTD):
            raise UserError(f"a model built for {self.objective!r} has no modules for objective {objective!r}")
        masked = self.mask(batch, generator, draws)
        generated = self.generate(batch, masked, generator, draws)
        zero = masked.weights_M.new_zeros(())
        counters: dict[str, Tensor] = {}
        mlm_sum, mlm_weight = zero, zero
        if generated.loss_M is not None and generated.predictions_M is not None:
            mlm_weight = masked.weights_M.sum()
            mlm_sum = (generated.loss_M * masked.weights_M).sum()
            counters["mlm_correct"] = ((generated.predictions_M == masked.targets_M) * masked.weights_M).sum()
        losses = Losses(zero, mlm_sum, mlm_weight, zero, zero, counters)
        if objective != "mlm":
            hit_M = (generated.samples_M == masked.targets_M) * masked.weights_M
            counters["sample_correct"], counters["slots"] = hit_M.sum(), masked.weights_M.sum()
            corrupted = corrupt(batch, masked, generated.samples_M)
            if objective in RTD:
                self._rtd_loss(losses, batch, masked, generated, corrupted, chosen=objective == "electra15")
            elif objective == "replace_mlm":
                self._replace_mlm_loss(losses, batch, masked, corrupted)
            else:
                self._all_tokens_loss(losses, batch, corrupted)
        weights = torch.stack([losses.mlm_weight, losses.main_weight])
        if all_reduce is not None:
            weights = all_reduce(weights)
        main_factor = self.disc_weight if objective in RTD else 1.0
        mlm, main = torch.stack([losses.mlm_sum, losses.main_sum]) / (weights + MEAN_EPSILON)
        total = self.gen_weight * mlm + main_factor * main
        if losses.policy_sum is not None:
            total = total + losses.policy_sum / (weights[0] + MEAN_EPSILON)
        losses.total = world_size * total
        counters.update(
            mlm_sum=losses.mlm_sum.detach(),
            mlm_weight=losses.mlm_weight,
            main_sum=losses.main_sum.detach(),
            main_weight=losses.main_weight,
        )
        return losses

    def _rtd_loss(
        self, losses: Losses, batch: Batch, masked: Masked, generated: Generated, corrupted: Corrupted, chosen: bool
    ) -> None:
        """Binary cross-entropy over all tokens, or over those that a sample was written to."""
        logits_N = self.discriminate(batch, corrupted.ids_N)
        weights_N = corrupted.written_N.float() if chosen else torch.ones_like(logits_N)
        loss_N = F.binary_cross_entropy_with_logits(logits_N, corrupted.labels_N.float(), reduction="none")
        losses.main_sum, losses.main_weight = (loss_N * weights_N).sum(), weights_N.sum()
        losses.logits_N, losses.labels_N = logits_N.detach(), corrupted.labels_N
        losses.counters.update(rtd_counters(losses.logits_N, corrupted.labels_N))

    def _replace_mlm_loss(self, losses: Losses, batch: Batch, masked: Masked, corrupted: Corrupted) -> None:
        hidden_MD = self.electra(batch, corrupted.ids_N, select_M=masked.positions_M)
        table_VE = self.main_embeddings.word_embeddings.weight
        result = vocab_head(self.mlm_predictions(hidden_MD), table_VE, self.mlm_lm_head.bias, masked.targets_M)
        losses.main_sum, losses.main_weight = (result.loss_M * masked.weights_M).sum(), masked.weights_M.sum()
        losses.counters["main_correct"] = ((result.argmax_M == masked.targets_M) * masked.weights_M).sum()

    def _all_tokens_loss(self, losses: Losses, batch: Batch, corrupted: Corrupted) -> None:
        """-log(c [input = target] + (1 - c) softmax[target]), c the gate's sigmoid; a hit has probability above 1/2."""
        hidden_ND = self.electra(batch, corrupted.ids_N)
        table_VE = self.main_embeddings.word_embeddings.weight
        result = vocab_head(self.mlm_predictions(hidden_ND), table_VE, self.mlm_lm_head.bias, batch.ids_N)
        gate_N = self.copy_gate(hidden_ND)[:, 0].float()
        new_N = F.logsigmoid(-gate_N) - result.loss_M
        same_N = corrupted.ids_N == batch.ids_N
        log_p_N = torch.where(same_N, torch.logaddexp(F.logsigmoid(gate_N), new_N), new_N)
        losses.main_sum, losses.main_weight = -log_p_N.sum(), log_p_N.new_tensor(float(len(log_p_N)))
        losses.counters["main_correct"] = (log_p_N.detach().exp() > 0.5).float().sum()


def rtd_counters(logits_N: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Sums for accuracy, precision and recall of replaced tokens; a token is called replaced where its logit > 0."""
    called_N = logits_N > 0
    counts = torch.stack([called_N == labels_N, called_N, labels_N, called_N & labels_N]).float().sum(1)
    correct, called, fakes, found = counts.unbind()
    return {
        "rtd_tokens": correct.new_tensor(float(len(logits_N))),
        "rtd_correct": correct,
        "rtd_called": called,
        "rtd_fakes": fakes,
        "rtd_found": found,
    }


def metrics(counters: dict[str, float]) -> dict[str, float]:
    """Rates from (sums of) counters; only those that the objective has.

    mlm_loss, mlm_accuracy (arg-max at chosen slots), sample_accuracy (samples equal to the original); main_loss;
    main_accuracy (MLM ablations); rtd_accuracy (a constant "original" scores about 0.9), rtd_precision, rtd_recall.
    """

    def rate(part: str, whole: str) -> float:
        return counters[part] / max(counters[whole], 1.0)

    rates: dict[str, float] = {}
    if counters.get("mlm_weight", 0) > 0:
        rates.update(mlm_loss=rate("mlm_sum", "mlm_weight"), mlm_accuracy=rate("mlm_correct", "mlm_weight"))
    if "slots" in counters:
        rates.update(sample_accuracy=rate("sample_correct", "slots"), main_loss=rate("main_sum", "main_weight"))
    if "main_correct" in counters:
        rates["main_accuracy"] = rate("main_correct", "main_weight")
    if "rtd_tokens" in counters:
        rates.update(
            rtd_accuracy=rate("rtd_correct", "rtd_tokens"),
            rtd_precision=rate("rtd_found", "rtd_called"),
            rtd_recall=rate("rtd_found", "rtd_fakes"),
        )
    return rates


def auc(scores_N: Tensor, labels_N: Tensor) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    Returns:
        NaN where one class is empty.
    """
    scores_N, labels_N = scores_N.double().flatten(), labels_N.bool().flatten()
    positives, negatives = int(labels_N.sum()), int((~labels_N).sum())
    if not positives or not negatives:
        return float("nan")
    below_P = torch.searchsorted(scores_N[~labels_N].sort().values, scores_N[labels_N])
    up_to_P = torch.searchsorted(scores_N[~labels_N].sort().values, scores_N[labels_N], right=True)
    return float((below_P + up_to_P).sum()) / (2.0 * positives * negatives)
