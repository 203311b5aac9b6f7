"""Everything that `electra/train.py` can be told, as plain dataclasses; nothing heavy is imported for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.options import TrainerOptions

Objective = Literal["electra", "electra15", "mlm", "replace_mlm", "all_tokens_mlm", "two_stage", "adversarial"]


@dataclass
class DataConfig:
    """Which text to learn from.

    Args:
        corpus: a name (sotu, brown, wordnet, gcide, wikipedia), a .txt file, a folder of them, or datasets:NAME for a
            Hugging Face data set; commas join several.
        vocabulary: a vocab.txt or a transformers directory; None trains a WordPiece vocabulary on the corpus.
        vocabulary_size: of the trained vocabulary.
        length: longest row in tokens, [CLS] and [SEP] included.
        keep_overflow: True starts the next example with the tokens that the official builder drops.
        max_tokens: at most so many tokens are built from a stream; None means all there are.
        workers: loader processes.
    """

    corpus: str = "sotu"
    vocabulary: str | None = None
    vocabulary_size: int = 1000
    length: int = 64
    keep_overflow: bool = True
    max_tokens: int | None = None
    workers: int = 0


@dataclass
class ModelConfig:
    """The discriminator and how the generator follows from it; the vocabulary's size follows from the data.

    Args:
        relative_positions: a learned bias per head and distance; tiny budgets need it, published sizes have none.
        init: official (truncated normal of `init_std`) or fan_in (0.7 / sqrt(fan-in), for tiny budgets).
        generator_factor: width of the generator beside the discriminator; its depth is the same.
        generator_heads, generator_intermediate_size: 0 follows from the factor.
        generator: network, or uniform or unigram samples without a network (section 3.2).
        tying: what the two networks share: none, embeddings, all.
    """

    embedding_size: int = 128
    hidden_size: int = 256
    layers: int = 12
    heads: int = 4
    intermediate_size: int = 1024
    max_position: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    relative_positions: bool = False
    init: Literal["official", "fan_in"] = "official"
    generator_factor: float = 0.25
    generator_heads: int = 0
    generator_intermediate_size: int = 0
    generator: Literal["network", "uniform", "unigram"] = "network"
    tying: Literal["none", "embeddings", "all"] = "embeddings"


@dataclass
class ObjectiveConfig:
    """Masking, sampling and the weight of the discriminator's loss (section 2; official defaults).

    Args:
        mask_probability: share of the tokens that the generator predicts (0.25 for Large).
        disc_weight: lambda, the weight of the discriminator's loss.
        temperature: of the generator's samples; disallow_correct: never sample the true token.
        first_stage: share of the steps that train the generator alone (two_stage).
        copy_weights: start the second stage's discriminator from the generator (two_stage).
        baseline_decay: of the running mean reward (adversarial).
        mlm_weight: of the likelihood term that keeps the adversarial generator near the data (adversarial).
    """

    mask_probability: float = 0.15
    disc_weight: float = 50.0
    temperature: float = 1.0
    disallow_correct: bool = False
    first_stage: float = 0.5
    copy_weights: bool = True
    baseline_decay: float = 0.99
    mlm_weight: float = 0.0


@dataclass
class OptimiserConfig:
    """Adam without bias correction; warm-up and linear decay act together (appendix; official optimization.py)."""

    lr: float = 5e-4
    warmup: int = 10_000
    weight_decay: float = 0.01
    grad_clip: float = 1.0


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps of the first arm; the others get as many FLOPs.
        batch_size: rows of the global batch (all processes and accumulated micro-batches together).
        evaluate_every: steps between losses on held-out text (0: only at the end).
    """

    max_steps: int = 1000
    batch_size: int = 128
    evaluate_every: int = 0


@dataclass
class DownstreamConfig:
    """What the pre-trained encoders are fine-tuned on when all arms are done, beside one from scratch.

    Args:
        tasks: names of labelled tasks (see electra/tasks.py); empty leaves fine-tuning out.
        seeds: of fine-tuning, one run each; tables show the median.
        lr: of fine-tuning; epochs: passes over the task's training examples.
        scratch_lr: of the encoder from scratch; None takes lr.
        train_examples, test_examples: at most so many; None means all.
    """

    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    lr: float = 3e-4
    scratch_lr: float | None = None
    layer_decay: float = 0.8
    epochs: float = 3
    batch_size: int = 32
    dropout: float = 0.1
    train_examples: int | None = None
    test_examples: int | None = None


@dataclass
class ElectraRun:
    """One run: each arm is pre-trained, then all of them are fine-tuned and compared.

    Args:
        arms: objectives to pre-train with, each in its own folder below run_dir: electra (replaced-token detection),
            electra15 (its loss on masked tokens only), mlm (BERT), replace_mlm, all_tokens_mlm, two_stage, adversarial.
            Arms after the first get as many training FLOPs as the first.
        run_dir: folder of this run's checkpoints, logs, encoders and metrics.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder; or the path of a .ckpt file.
        init_from: a transformers directory or a run's arm to continue the discriminator and generator from.
    """

    arms: list[Objective] = field(default_factory=lambda: ["electra"])
    run_dir: str = "runs/electra"
    seed: int = 0
    resume: str = "auto"
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
