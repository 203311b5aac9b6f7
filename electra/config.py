"""Everything that `electra/train.py` can be told, as plain dataclasses; nothing heavy is imported for `--help`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from common.errors import UserError
from common.options import (
    Count,
    NotNegative,
    Portion,
    Positive,
    Range,
    Seed,
    Share,
    TrainerOptions,
    Whole,
    check_ranges,
)

Objective = Literal["electra", "electra15", "mlm", "replace_mlm", "all_tokens_mlm", "two_stage", "adversarial"]
Tying = Literal["none", "embeddings", "all"]
GeneratorKind = Literal["network", "uniform", "unigram", "uniform_official"]
Init = Literal["official", "fan_in"]


@dataclass
class DataConfig:
    """Which text to learn from.

    Args:
        corpus: a name (sotu, brown, wordnet, gcide, wikipedia), a .txt file, a folder of them, or datasets:NAME for a
            Hugging Face data set; commas join several.
        vocabulary: a vocab.txt or a transformers directory; None trains a WordPiece vocabulary on the corpus.
        vocabulary_size: pieces of the trained vocabulary, at most.
        characters: make every character a piece of the trained vocabulary, for scripts without spaces between words.
        length: longest row in tokens, [CLS] and [SEP] included.
        keep_overflow: True starts the next example with the tokens that the official builder drops.
        max_tokens: at most so many tokens are built from a stream; None means all there are.
        workers: loader processes.
    """

    corpus: str = "sotu"
    vocabulary: str | None = None
    vocabulary_size: Annotated[int, Range(100, 10**6)] = 1000
    characters: bool = False
    length: Annotated[int, Range(8, 10**6)] = 64
    keep_overflow: bool = True
    max_tokens: Annotated[int, Range(1, 10**15)] | None = None
    workers: Annotated[int, Range(0, 1024)] = 0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the discriminator and how the generator follows from them; the vocabulary's size follows from the data.

    Args:
        embedding_size: width of the embedding table, which a linear map brings to hidden_size.
        hidden_size: width of the hidden states.
        layers: of the encoder.
        heads: of each attention, into which hidden_size is divided.
        intermediate_size: width of each feed-forward layer.
        max_position: longest row in tokens.
        dropout: probability of dropping a hidden state's feature.
        attention_dropout: probability of dropping an attention weight.
        init_std: standard deviation of the official initialisation.
        relative_positions: a learned bias per head and distance in every attention, starting as ALiBi's slopes. For
            tiny budgets only, where absolute positions alone do not start to learn; no published model has it.
        init: official is a normal of std `init_std` cut at two deviations; fan_in a std of 0.7 / sqrt(fan_in).
        generator_factor: width of the generator as a fraction of the main network's.
        generator_layers: depth of the generator as a fraction of the main network's.
        generator_heads: heads of the generator's attentions; 0 keeps the width of a head, at least one head.
        generator_intermediate_size: width of the generator's feed-forward layers; 0 shrinks the main network's by the
            same factor.
        generator: what replaces tokens: a network, or uniform or unigram draws without one (paper section 3.2), which
            never draw a special token; uniform_official draws every piece of the vocabulary, special ones too, and its
            constant cross-entropy counts in the loss, as in the official code.
        tying: what generator and main network share: none, embeddings (the embedding block), all encoder weights.
    """

    embedding_size: Count = 128
    hidden_size: Count = 256
    layers: Count = 12
    heads: Count = 4
    intermediate_size: Count = 1024
    max_position: Count = 512
    dropout: Share = 0.1
    attention_dropout: Share = 0.1
    init_std: Positive = 0.02
    relative_positions: bool = False
    init: Init = "official"
    generator_factor: Portion = 0.25
    generator_layers: Portion = 1.0
    generator_heads: Whole = 0
    generator_intermediate_size: Whole = 0
    generator: GeneratorKind = "network"
    tying: Tying = "embeddings"

    def with_vocabulary(self, size: int) -> ElectraConfig:
        """What the networks take, for a vocabulary of so many pieces."""
        return ElectraConfig(vocab_size=size, **asdict(self))


@dataclass(frozen=True)
class ElectraConfig(ModelConfig):
    """The same with what the data and the published checkpoints decide; what the networks take."""

    vocab_size: Count = 30522
    type_vocab: Count = 2
    layer_norm_eps: Positive = 1e-12

    def __post_init__(self) -> None:
        check_ranges(self, "model.")
        if self.hidden_size % self.heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.heads {self.heads}; change one"
            )
        if self.tying == "all" and (
            self.generator != "network" or (self.generator_factor, self.generator_layers) != (1, 1)
        ):
            raise UserError(
                'model.tying "all" needs model.generator "network", and 1 for model.generator_factor and '
                "model.generator_layers"
            )
        if not round(self.layers * self.generator_layers):
            raise UserError(
                f"model.generator_layers {self.generator_layers} leaves the generator none of "
                f"model.layers {self.layers}"
            )

    def generator_config(self) -> ElectraConfig:
        """Configuration of the generator's encoder; the same object where all weights are shared.

        Embeddings of its own (tying "none") are as wide as its hidden states, as in the official code.
        """
        if self.tying == "all":
            return self
        hidden = round(self.hidden_size * self.generator_factor)
        heads = self.generator_heads or max(1, hidden * self.heads // self.hidden_size)
        smaller = max(1, round(self.intermediate_size * self.generator_factor))
        intermediate = self.generator_intermediate_size or smaller
        embedding = hidden if self.tying == "none" else self.embedding_size
        return replace(
            self,
            embedding_size=embedding,
            hidden_size=hidden,
            layers=round(self.layers * self.generator_layers),
            heads=heads,
            intermediate_size=intermediate,
            generator_layers=1.0,
        )

    @classmethod
    def small(cls, **changes: Any) -> ElectraConfig:
        """ELECTRA-Small of the paper (14M); the released "Small++" has `generator_factor=1`."""
        return cls(**changes)

    @classmethod
    def base(cls, **changes: Any) -> ElectraConfig:
        """ELECTRA-Base (110M)."""
        sizes = dict(embedding_size=768, hidden_size=768, heads=12, intermediate_size=3072, generator_factor=1 / 3)
        return cls(**{**sizes, **changes})

    @classmethod
    def large(cls, **changes: Any) -> ElectraConfig:
        """ELECTRA-Large (335M)."""
        sizes = dict(embedding_size=1024, hidden_size=1024, layers=24, heads=16, intermediate_size=4096)
        return cls(**{**sizes, **changes})


@dataclass
class ObjectiveConfig:
    """Masking, sampling and the weight of the discriminator's loss (section 2; official defaults).

    Args:
        mask_probability: share of the tokens that the generator predicts (0.25 for Large).
        disc_weight: lambda, the weight of the discriminator's loss.
        temperature: of the generator's samples.
        disallow_correct: never sample the true token.
        first_stage: share of the steps that train the generator alone (two_stage).
        copy_weights: start the second stage's discriminator from the generator (two_stage).
        baseline_decay: of the running mean reward (adversarial).
        mlm_weight: of the likelihood term that keeps the adversarial generator near the data (adversarial).
    """

    mask_probability: Portion = 0.15
    disc_weight: NotNegative = 50.0
    temperature: Positive = 1.0
    disallow_correct: bool = False
    first_stage: Share = 0.5
    copy_weights: bool = True
    baseline_decay: Share = 0.99
    mlm_weight: NotNegative = 0.0


@dataclass
class OptimiserConfig:
    """Adam without bias correction; warm-up and linear decay act together (appendix; official optimization.py).

    Args:
        lr: highest learning rate.
        warmup: steps over which the rate rises linearly.
        weight_decay: of all weights but biases and normalisations.
        grad_clip: largest norm of the gradient; 0 does not clip.
    """

    lr: NotNegative = 5e-4
    warmup: Whole = 10_000
    weight_decay: NotNegative = 0.01
    grad_clip: NotNegative = 1.0


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of electra; every other objective gets as many FLOPs.
        batch_size: rows of the global batch (all processes and accumulated micro-batches together).
        evaluate_every: steps between losses on held-out text (0: only at the end).
    """

    max_steps: Count = 1000
    batch_size: Count = 128
    evaluate_every: Whole = 0


@dataclass(frozen=True)
class FinetuneConfig:
    """The paper's values for ELECTRA-Small; the official code's defaults differ (lr 1e-4, weight decay 0.01).

    Args:
        lr: rate of the head; deeper layers get lr * layer_decay^(layers + 2 - depth).
        scratch_lr: rate of an encoder without pre-training, whose layers all learn at one rate; None takes `lr`.
        layer_decay: factor of the rate from each layer to the one below; 1 gives all layers the same rate.
        weight_decay: of AdamW.
        epochs: passes over the training split (the paper: 3; 10 for small tasks, 2 for SQuAD).
        batch_size: items of a step.
        warmup: share of the steps over which the rate rises.
        max_length: longest row in tokens; also bounded by the encoder's positions.
        dropout: in the encoder and before the head.
        clip: largest norm of the gradient.
        joint_ends: questions: predict an answer's last token given its first one; False predicts the two independently.
        answerable: questions: learn whether there is an answer (SQuAD 2.0); False always gives one (SQuAD 1.1).
        answerable_from_start: questions: read the predicted start too when deciding whether there is an answer.
        double_unordered: train on every pair in both orders (MRPC and STS in the paper).
        precision: bf16 runs the encoder under autocast.
        device: cpu, cuda, or auto, which takes a GPU where there is one.
    """

    lr: Positive = 3e-4
    scratch_lr: Positive | None = None
    layer_decay: Portion = 0.8
    weight_decay: NotNegative = 0.0
    epochs: Annotated[float, Range(0, 10**4, above=True)] = 3
    batch_size: Count = 32
    warmup: Share = 0.1
    max_length: Annotated[int, Range(8, 10**6)] = 128
    dropout: Share = 0.1
    clip: Positive = 1.0
    joint_ends: bool = True
    answerable: bool = True
    answerable_from_start: bool = True
    double_unordered: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class DownstreamConfig(FinetuneConfig):
    """What the pre-trained encoders are fine-tuned on when all arms are done, beside one from scratch, and how.

    Args:
        tasks: names of labelled tasks (see electra/tasks.py); empty leaves fine-tuning out.
        seeds: of fine-tuning, one run each; tables show the median.
        train_examples: at most so many training examples of a task; None means all.
        test_examples: at most so many test examples; None means all.
    """

    tasks: list[str] = field(default_factory=list)
    seeds: list[Seed] = field(default_factory=lambda: [0])
    train_examples: Count | None = None
    test_examples: Count | None = None


@dataclass
class ElectraRun:
    """One run: each arm is pre-trained, then all of them are fine-tuned and compared.

    Args:
        arms: objectives to pre-train with, each in its own folder below run_dir: electra (replaced-token detection),
            electra15 (its loss on masked tokens only), mlm (BERT), replace_mlm, all_tokens_mlm, two_stage, adversarial.
            Each gets as many training FLOPs as trainer.max_steps steps of electra take.
        run_dir: folder of this run's checkpoints, logs, encoders and metrics.
        seed: of the weights' start, the order of the data and the masks.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder; or the path of a .ckpt file.
        init_from: a transformers directory or a run's arm to continue the discriminator and generator from; its
            vocabulary comes with it.
    """

    arms: list[Objective] = field(default_factory=lambda: ["electra"])
    run_dir: str = "runs/electra"
    seed: Seed = 0
    resume: str = "auto"
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
