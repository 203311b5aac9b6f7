"""Everything `scenesplat/pretrain.py` and `scenesplat/finetune.py` can be told, as plain dataclasses; imports nothing
heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, NotNegative, Portion, Positive, Range, Seed, Share, TrainerOptions, Whole
from scenesplat.config import NetworkConfig, OptimiserConfig, TextConfig, TrainerConfig
from scenesplat.data_config import DataConfig


@dataclass
class CropConfig:
    """What teacher and student see of a scene: two global crops, which share their voxels, and some local ones.

    Args:
        locals: local crops; they share their voxels too.
        global_least: least share of a scene's voxels in a global crop; at most it is all of them.
        local_least: least share of them in a local crop.
        local_most: largest share of them in a local crop.
        recolour: jitter, grey out and solarize each crop by itself.
        masked: share of the scenes of a batch whose global crops are masked; half of them in the released code.
        ratio_least: least share of a crop's patches that is hidden; near 0.6 in the paper, 0.1 in the released code.
        ratio_most: largest share of them; 0.5 in the released code.
        patch: side in metres of what is hidden together; at most a voxel hides each voxel by itself, which is what the
            released code does.
    """

    locals: Whole = 3
    global_least: Portion = 0.4
    local_least: Portion = 0.1
    local_most: Portion = 0.4
    recolour: bool = True
    masked: Share = 1.0
    ratio_least: Share = 0.6
    ratio_most: Share = 0.6
    patch: Positive = 0.2


@dataclass
class TermsConfig:
    """The four terms of GaussianSSL (section 3.4), as weights, and how each is asked.

    Args:
        masked: weight of masked modelling (MGM): the attributes of hidden Gaussians.
        distillation: weight of the teacher's pooled answers to other crops (SimDINO).
        patches: weight of the teacher's answers at hidden voxels (iBOT).
        language: weight of the language alignment (LA): codes of the lifted features of hidden Gaussians.
        hide: before the first convolution, so that nothing hidden leaks, or after it, as the released code does.
        activations: end the masked head in the ranges of its attributes (tanh, sigmoid, unit length), as the paper
            says; the released head has none.
        train_heads: the heads are trained; in the released code they stay as they were drawn.
        hidden: width inside the heads of distillation and patches.
        bottleneck: width of their answers.
        coefficient: of the alignment beside the coding rate.
        epsilon: distortion of the coding rate.
        codes: widths of the language codes, each made of the one before; 16 or 64, or 64 and then 16.
        autoencoder: one for all scenes together, or each scene's own.
        codes_from: the autoencoder learns from lifted features, or from those of the pictures' masks.
    """

    masked: NotNegative = 1.0
    distillation: NotNegative = 1.0
    patches: NotNegative = 1.0
    language: NotNegative = 1.0
    hide: Literal["before", "after"] = "before"
    activations: bool = True
    train_heads: bool = True
    hidden: Count = 2048
    bottleneck: Count = 256
    coefficient: NotNegative = 0.1
    epsilon: Positive = 0.05
    codes: list[Count] = field(default_factory=lambda: [16])
    autoencoder: Literal["together", "each"] = "together"
    codes_from: Literal["lifted", "pictures"] = "lifted"


@dataclass
class SelfOptimiserConfig(OptimiserConfig):
    """AdamW under one cycle; weight decay and the teacher's momentum move along half a cosine.

    Args:
        lr: highest rate of what is no block.
        block_lr: highest rate of the blocks.
        weight_decay: at first.
        decay_last: weight decay in the end.
        eps: of AdamW.
        momentum: of the teacher at first; 1 in the end.
    """

    lr: Positive = 0.001
    block_lr: Positive = 0.0001
    weight_decay: NotNegative = 0.04
    decay_last: NotNegative = 0.4
    eps: Positive = 1e-4
    momentum: Share = 0.9


@dataclass
class PretrainTrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps.
        batch_size: scenes of a step, over all processes and accumulated micro-batches; the coding rate wants several.
    """

    max_steps: Count = 400
    batch_size: Count = 4
    checkpoint_every: Count = 50


@dataclass
class PretrainConfig:
    """One run of self-supervised pre-training (GaussianSSL): an encoder that has seen no class.

    Args:
        run_dir: folder of this run's checkpoints, logs, metrics and encoder.
        seed: of the rooms, the order of the data and everything drawn in training.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
    """

    run_dir: str = "runs/scenesplat-pretrain"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(pooling="max", mask_token=True))
    crops: CropConfig = field(default_factory=CropConfig)
    terms: TermsConfig = field(default_factory=TermsConfig)
    optimiser: SelfOptimiserConfig = field(default_factory=SelfOptimiserConfig)
    trainer: PretrainTrainerConfig = field(default_factory=PretrainTrainerConfig)


@dataclass
class LabelConfig:
    """What fine-tuning asks: cross-entropy and Lovasz of the classes.

    Args:
        entropy: weight of the cross-entropy.
        lovasz: weight of Lovasz-softmax.
        frozen: train the linear head alone (a linear probe).
    """

    entropy: NotNegative = 1.0
    lovasz: NotNegative = 1.0
    frozen: bool = False


@dataclass
class MeasureConfig:
    """What is measured at the end, on scenes that were never seen.

    Args:
        neighbours: nearest Gaussians whose majority a point takes.
        fragments: passes over a scene at most; 0 sees every Gaussian.
        views: of a scene whose answers are added up: 1 sees it as it is, 13 is the released test (four turns at three
            sizes, and a mirror).
    """

    neighbours: Count = 25
    fragments: Whole = 0
    views: Annotated[int, Range(1, 13)] = 1


@dataclass
class FinetuneConfig:
    """One run of fine-tuning with labels: a linear head on the encoder's features.

    Args:
        run_dir: folder of this run's checkpoints, logs, metrics and model.
        seed: of the rooms, the order of the data and everything drawn in training.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        init_from: folder of the encoder that it starts from (encoder/ of a run of pretrain.py, or a model folder);
            None starts from scratch.
    """

    run_dir: str = "runs/scenesplat-finetune"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    init_from: str | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig(rooms=4))
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(pooling="max"))
    loss: LabelConfig = field(default_factory=LabelConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
