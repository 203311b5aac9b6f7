"""Floating-point operations of training and inference, counted as the authors count them (flops_computation.py).

The conventions behind the paper's tables: a multiply-add is 2; training costs twice the forward pass; looking up an
embedding counts as a dense product with the vocabulary; a softmax is computed at 15.625 % of the tokens; the LayerNorm
after attention counts 5 in all instead of 5 per channel. Every arm of a comparison is counted with them, so "equal
FLOPs" means what the paper means. `vocab` and the share of tokens may be set, which the official code keeps fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from electra.config import ElectraConfig
from electra.objectives import RTD, Objective

# Operations per element: compare, draw and twice multiply; mean, variance, bias and scale; the tanh form of gelu;
# maximum, difference, exponential, sum and division.
DROPOUT, LAYER_NORM, GELU, SOFTMAX = 4, 5, 8, 5
OFFICIAL_VOCABULARY = 30522
OFFICIAL_OUTPUT_SHARE = 0.15625


@dataclass(frozen=True)
class Transformer:
    """Sizes that the count depends on; every count below is one forward pass of one sequence."""

    hidden: int
    layers: int
    length: int = 512
    embedding: int | None = None  # None: as wide as the hidden states
    intermediate: int | None = None  # None: 4 x hidden
    heads: int | None = None  # None: heads of width 64
    vocabulary: int = OFFICIAL_VOCABULARY
    output_share: float = OFFICIAL_OUTPUT_SHARE

    @property
    def _embedding(self) -> int:
        return self.hidden if self.embedding is None else self.embedding

    def block(self) -> int:
        """One transformer block."""
        h, s = self.hidden, self.length
        inner = 4 * h if self.intermediate is None else self.intermediate
        heads = max(h // 64, 1) if self.heads is None else self.heads
        projections = 3 * (2 * h * h + h)
        scores = 2 * h * s + (SOFTMAX + DROPOUT + 1) * s * heads  # 1: the scale 1 / sqrt(head width)
        values = 2 * h * s
        output = 2 * h * h + h + DROPOUT * h + h + LAYER_NORM
        feed_forward = 4 * h * inner + (GELU + 1) * inner + h + DROPOUT * h + h + LAYER_NORM * h
        return s * (projections + scores + values + output + feed_forward)

    def input_embeddings(self) -> int:
        """Token, position and type lookups, sum, LayerNorm, dropout, projection to the hidden size."""
        e, h, s = self._embedding, self.hidden, self.length
        count = 2 * e * self.vocabulary + 2 * e * (s + 2) + 2 * e + (LAYER_NORM + DROPOUT) * e
        if e != h:
            count += 2 * h * e + h
        return s * count

    def masked_lm_head(self) -> float:
        """Hidden layer and softmax of the vocabulary, at `output_share` of the tokens."""
        e, h, v = self._embedding, self.hidden, self.vocabulary
        count = 2 * e * v + 2 * h * e + e + (GELU + LAYER_NORM) * e + (SOFTMAX + 2) * v
        return self.output_share * self.length * count

    def binary_head(self) -> int:
        """Hidden layer and one logit, at all tokens."""
        h = self.hidden
        return self.length * (2 * h * h + h + GELU * h + 2 * h)

    def encoder(self) -> int:
        """Embeddings and blocks."""
        return self.layers * self.block() + self.input_embeddings()


def bert_training_flops(network: Transformer, batch: int, steps: float) -> float:
    """Masked language modelling with one network."""
    return 2 * batch * steps * (network.encoder() + network.masked_lm_head())


def electra_training_flops(discriminator: Transformer, generator: Transformer, batch: int, steps: float) -> float:
    """Library. Replaced-token detection: discriminator with its binary head, generator with its vocabulary head."""
    disc = 2 * batch * steps * (discriminator.encoder() + discriminator.binary_head())
    return disc + bert_training_flops(generator, batch, steps)


def classifier_inference_flops(network: Transformer) -> int:
    """The official inference figure: encoder and binary head."""
    return network.encoder() + network.binary_head()


def _networks(config: ElectraConfig, length: int, output_share: float) -> list[Transformer]:
    """Main network and generator of a configuration."""
    return [
        Transformer(
            c.hidden_size, c.layers, length, c.embedding_size, c.intermediate_size, c.heads, c.vocab_size, output_share
        )
        for c in (config, config.generator_config())
    ]


def training_flops(
    config: ElectraConfig,
    objective: Objective,
    steps: float,
    batch: int,
    length: int,
    mask_probability: float = 0.15,
    output_share: float | None = None,
) -> float:
    """Training of one arm: generator, every softmax and the All-Tokens softmax included.

    Args:
        length: of a sequence; with packed rows, the mean length may be given.
        output_share: share of tokens with a softmax; by default the official 0.15625 for 15 %, in proportion else.

    The relative-position bias adds one operation a score, which is left out: it is the same in every arm. A uniform or
    unigram generator costs nothing.
    """
    share = OFFICIAL_OUTPUT_SHARE / 0.15 * mask_probability if output_share is None else output_share
    main, generator = _networks(config, length, share)
    if objective == "mlm":
        return bert_training_flops(main, batch, steps)
    total = bert_training_flops(generator, batch, steps) if config.generator == "network" else 0.0
    head: float = main.masked_lm_head()
    if objective in RTD:
        head = main.binary_head()
    elif objective == "all_tokens_mlm":
        # The softmax at every token, and the gate: one logit from the hidden state.
        head = replace(main, output_share=1.0).masked_lm_head() + length * 2 * main.hidden
    return total + 2 * batch * steps * (main.encoder() + head)


def inference_flops(config: ElectraConfig, length: int = 128) -> int:
    """Forward pass for one sequence, as Table 1 (length 128) counts it."""
    return classifier_inference_flops(_networks(config, length, OFFICIAL_OUTPUT_SHARE)[0])


def steps_for(
    config: ElectraConfig, objective: Objective, flops: float, batch: int, length: int, mask_probability: float = 0.15
) -> int:
    """Steps that a budget of training FLOPs pays for, at least one."""
    return max(1, round(flops / training_flops(config, objective, 1, batch, length, mask_probability)))
