"""Everything a run of `scenesplat/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.errors import UserError
from common.options import Count, NotNegative, Portion, Positive, Range, Seed, TrainerOptions, Whole
from scenesplat.data_config import DataConfig

Patch = Annotated[int, Range(1, 65536)]


@dataclass
class NetworkConfig:
    """The Point Transformer; defaults are the released language model (91,712,800 weights).

    Args:
        in_channels: 11 (colour, opacity, quaternion, scale) or 14 (and the normal).
        orders: curves that blocks follow in turn.
        strides: of the poolings between stages.
        enc_depths: blocks of each stage of the encoder.
        enc_channels: their widths.
        enc_heads: their heads of attention.
        enc_patch: voxels that attend to each other.
        dec_depths: blocks of each stage of the decoder, the finest first.
        dec_channels: their widths; the first is that of the output.
        dec_heads: heads of its attention.
        dec_patch: voxels that attend to each other in the decoder. The released decoder goes on with the encoder's
            patches, whatever it is told; its configurations have the same numbers twice.
        mlp_ratio: width of the hidden layer over that of the block.
        qkv_bias: queries, keys and values have biases.
        qk_scale: factor of the scores; None: (width of a head)^-0.5.
        attn_drop: probability that a weight of attention is set to zero in training.
        proj_drop: the same of what attention and the MLP give out, and of the MLP's hidden values.
        drop_path: stochastic depth of the last block, rising from 0.
        pre_norm: normalise before attention and MLP, not after them.
        patches: variable (small clouds form short patches: what the released weights were trained with) or shrinking
            (all patches as small as the smallest cloud).
        rpe: learned relative positions (for shrinking patches only).
        pooling: mean (language model), max (self-supervised), min or sum.
        shuffle: draw anew in each training step which curve comes first.
        norm_momentum: of batch normalisation's averages; 0.01 in the released code.
        mask_token: a learned token for masked voxels (self-supervised).
        convolution: gather (ours) or spconv (the library, inference only on CPUs).
    """

    in_channels: Annotated[int, Range(1, 1024)] = 11
    orders: list[Literal["z", "z-trans", "hilbert", "hilbert-trans"]] = field(
        default_factory=lambda: ["z", "z-trans", "hilbert", "hilbert-trans"]
    )
    strides: list[Annotated[int, Range(1, 64)]] = field(default_factory=lambda: [2, 2, 2])
    enc_depths: list[Count] = field(default_factory=lambda: [2, 2, 2, 6])
    enc_channels: list[Count] = field(default_factory=lambda: [32, 64, 128, 256])
    enc_heads: list[Count] = field(default_factory=lambda: [2, 4, 8, 16])
    enc_patch: list[Patch] = field(default_factory=lambda: [1024, 1024, 1024, 1024])
    dec_depths: list[Count] = field(default_factory=lambda: [2, 2, 2])
    dec_channels: list[Count] = field(default_factory=lambda: [768, 512, 256])
    dec_heads: list[Count] = field(default_factory=lambda: [16, 16, 16])
    dec_patch: list[Patch] = field(default_factory=lambda: [1024, 1024, 1024])
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = True
    qk_scale: Positive | None = None
    attn_drop: Annotated[float, Range(0, 0.99)] = 0.0
    proj_drop: Annotated[float, Range(0, 0.99)] = 0.0
    drop_path: Annotated[float, Range(0, 0.99)] = 0.3
    pre_norm: bool = True
    patches: Literal["variable", "shrinking"] = "variable"
    rpe: bool = False
    pooling: Literal["mean", "max", "min", "sum"] = "mean"
    shuffle: bool = True
    norm_momentum: Annotated[float, Range(0, 1)] = 0.01
    mask_token: bool = False
    convolution: Literal["gather", "spconv"] = "gather"


@dataclass
class LossConfig:
    """Vision-language losses; the sum is cosine + l2 + contrastive.

    Args:
        cosine: weight of 1 - cos.
        l2: weight of the squared distance, which for unit vectors is twice the cosine loss.
        contrastive: weight of the aggregated contrastive loss.
        schedule: when the contrastive loss counts: all, skip (never), or the last percent of the steps.
        temperature: of the contrastive loss, fixed.
        least: Gaussians of a class in a batch, below which it takes no part; 100 in the released code.
        classes: whose classes the contrastive loss goes by: truth (the released code) or pseudo, the nearest text to
            each target, which needs no labels.
    """

    cosine: NotNegative = 1.0
    l2: NotNegative = 1.0
    contrastive: NotNegative = 0.02
    schedule: Literal["all", "skip", "last_75", "last_50", "last_25"] = "last_75"
    temperature: Positive = 0.2
    least: Annotated[int, Range(2)] = 100
    classes: Literal["truth", "pseudo"] = "truth"


@dataclass
class OptimiserConfig:
    """AdamW under one cycle.

    Args:
        lr: highest rate of what is no block.
        block_lr: highest rate of the blocks; a tenth in the released code.
        weight_decay: of AdamW.
        rise: share of the steps over which the rates rise; they fall over the rest.
        grad_clip: largest norm of the gradient; 0 does not clip.
    """

    lr: Positive = 0.006
    block_lr: Positive = 0.0006
    weight_decay: NotNegative = 0.05
    rise: Portion = 0.05
    grad_clip: NotNegative = 1.0


@dataclass
class TextConfig:
    """The space of the text features.

    Args:
        encoder: a transformers folder (SigLIP2 is the paper's; any sentence encoder), or a table of names
            (.safetensors); None: the packaged MiniLM.
        width: directions of centred names that are kept; None: the encoder's own space. The network's output has as
            many channels.
    """

    encoder: str | None = None
    width: Annotated[int, Range(2, 4096)] | None = None


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        max_steps: optimiser steps.
        batch_size: scenes of a step, over all processes and accumulated micro-batches.
    """

    max_steps: Count = 600
    batch_size: Count = 2
    checkpoint_every: Count = 50


@dataclass
class EvaluationConfig:
    """What is measured at the end, on rooms that were never seen.

    Args:
        neighbours: nearest Gaussians whose majority a point takes; the paper's 25.
        fragments: passes over a scene, each with another Gaussian of every voxel; 0 takes as many as it needs to see
            every Gaussian.
        queries: texts that are asked of an unseen scene, for the pictures.
    """

    neighbours: Count = 25
    fragments: Whole = 0
    queries: list[str] = field(default_factory=lambda: ["a couch", "a plant", "a television"])


@dataclass
class SceneSplatConfig:
    """One run: scenes with lifted labels, vision-language pre-training, queries and metrics on unseen scenes.

    Args:
        run_dir: folder of this run's checkpoints, logs, metrics, pictures and model.
        seed: of the rooms, the order of the data and everything drawn in training.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
        init_from: a model folder whose weights the network starts from (pre-trained, or converted).
    """

    run_dir: str = "runs/scenesplat"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# The released segmentation and self-supervised encoder (46,186,272 weights with 11 attributes).
FIVE_STAGES = NetworkConfig(
    strides=[2, 2, 2, 2],
    enc_depths=[2, 2, 2, 6, 2],
    enc_channels=[32, 64, 128, 256, 512],
    enc_heads=[2, 4, 8, 16, 32],
    enc_patch=[1024] * 5,
    dec_depths=[2, 2, 2, 2],
    dec_channels=[64, 64, 128, 256],
    dec_heads=[4, 4, 8, 16],
    dec_patch=[1024] * 4,
)


def check_network(network: NetworkConfig) -> None:
    """Refuse lists that do not fit each other.

    Raises:
        UserError: naming the option.
    """
    stages = len(network.enc_depths)
    if stages < 2 or not network.orders:
        raise UserError("--network.enc_depths, --network.orders: expected two stages and one curve at least")
    for name, count in {
        **{"strides": stages - 1, "enc_channels": stages, "enc_heads": stages, "enc_patch": stages},
        **{"dec_depths": stages - 1, "dec_channels": stages - 1, "dec_heads": stages - 1, "dec_patch": stages - 1},
    }.items():
        if len(getattr(network, name)) != count:
            raise UserError(f"--network.{name}: expected {count} numbers for the {stages} stages of enc_depths")
    for stride in network.strides:
        if stride & (stride - 1):
            raise UserError(f"--network.strides {stride}: voxels are joined along each axis by 1, 2, 4, 8, ...")
    for side in ("enc", "dec"):
        for channels, heads in zip(getattr(network, f"{side}_channels"), getattr(network, f"{side}_heads")):
            if channels % heads:
                raise UserError(f"--network.{side}_heads: {channels} channels cannot be divided among {heads} heads")
    if network.rpe and network.patches == "variable":
        raise UserError(
            "--network.rpe: learned positions need patches of one size; expected --network.patches shrinking"
        )
