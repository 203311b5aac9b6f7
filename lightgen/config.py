"""Everything a run of `lightgen/train.py` can be told, as plain dataclasses; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, Decay, NotNegative, Positive, Range, Seed, Share, TrainerOptions, Whole

Side = Annotated[int, Range(1, 1024)]
Blocks = Annotated[int, Range(1, 128)]


@dataclass
class DataConfig:
    """The synthetic set that is learned from (section 4.3), and the pictures that preferences are made of.

    Args:
        name: teacher (pictures that `teacher` draws of `captions`), shapes (drawn scenes: the renderer as the teacher),
            emoji (captioned artwork), or folder (the user's pictures, or those that lightgen/distil.py wrote).
        path: an image folder with captions, a parquet file or a data set's name; for name folder.
        image_column: of a table, with the pictures; found by itself where there is one candidate.
        text_column: of a table, with the captions; found by itself where there is one candidate.
        captions: what the teacher draws: shapes (captions of scenes), emoji, or a file with one prompt a line.
        world: of the captions and scenes: full (8 shapes, 10 colours, 3 textures) or small (4, 6 and 1 of them).
        images: how many training pictures are drawn, or at most taken; 0 takes all of emoji and folder.
        teacher_steps: DDIM steps of the teacher.
        teacher_guidance: scale of the teacher's guidance.
        flip: learn from mirrored pictures as well, as the paper does (it harms left and right); never in preferences.
    """

    name: Literal["teacher", "shapes", "emoji", "folder"] = "teacher"
    path: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    captions: str = "shapes"
    world: Literal["full", "small"] = "full"
    images: Whole = 4000
    teacher_steps: Annotated[int, Range(1, 1000)] = 10
    teacher_guidance: Annotated[float, Range(1, 100)] = 2.0
    flip: bool = True


@dataclass
class TextConfig:
    """The frozen text encoder, whose states are cached.

    Args:
        encoder: a transformers directory (FLAN-T5 in the paper); None is the packaged MiniLM.
        length: tokens that every caption is padded to; padding is masked nowhere (128 in the released scripts).
    """

    encoder: str | None = None
    length: Annotated[int, Range(2, 4096)] = 24


@dataclass
class NetworkConfig:
    """The masked autoregressive network and its head (section 4.1).

    Args:
        width: of encoder, decoder, cross stage and text aligner.
        encoder_depth: blocks over the known tokens.
        decoder_depth: blocks over all positions.
        cross_depth: blocks that read the text.
        text_depth: blocks of the text aligner.
        encoder_heads: of the encoder's and the aligner's attention.
        decoder_heads: of the decoder's attention.
        cross_heads: of the cross stage's attention.
        mlp_ratio: hidden width of the blocks over their width.
        dropout: of attention and projections.
        patch: latent pixels a side of a token.
        grid: tokens a side of the learned position tables, which are resized for other pictures.
        head: diffusion (Equation 6) or regression (the mean alone, an ablation).
        head_width: of the diffusion head.
        head_depth: residual blocks of the head.
        order: random (masked) or raster (causal, a token at a time).
    """

    width: Annotated[int, Range(8, 16384)] = 1024
    encoder_depth: Blocks = 16
    decoder_depth: Blocks = 16
    cross_depth: Blocks = 16
    text_depth: Blocks = 6
    encoder_heads: Blocks = 16
    decoder_heads: Blocks = 16
    cross_heads: Blocks = 16
    mlp_ratio: Positive = 4.0
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    patch: Side = 2
    grid: Side = 16
    head: Literal["diffusion", "regression"] = "diffusion"
    head_width: Annotated[int, Range(8, 16384)] = 1536
    head_depth: Blocks = 8
    order: Literal["random", "raster"] = "random"


@dataclass
class StagesConfig:
    """Training at rising resolution; the lists have one entry a stage.

    Args:
        sizes: side of the pictures in pixels.
        steps: optimiser steps.
        lr: learning rate after warm-up; the released scripts have 1e-4 times batch size / 256.
        batch_mul: independent (t, noise) drawn for each masked token.
        mask_min: least share of masked tokens, from which to 1 the law of masks goes.
        drop_text: share of captions that the learned null text takes the place of.
    """

    sizes: list[Annotated[int, Range(4, 8192)]] = field(default_factory=lambda: [256, 512])
    steps: list[Count] = field(default_factory=lambda: [100_000, 10_000])
    lr: list[NotNegative] = field(default_factory=lambda: [8e-4, 1e-5])
    batch_mul: Annotated[int, Range(1, 64)] = 4
    mask_min: Annotated[float, Range(0, 0.999)] = 0.7
    drop_text: Share = 0.1


@dataclass
class PreferenceConfig:
    """DPO on (given picture, own sample) pairs of one caption (Equation 7).

    Args:
        pairs: how many; 0 leaves preferences out.
        steps: optimiser steps.
        lr: constant learning rate.
        batch_size: pairs of a step.
        beta: strength of the tie to the reference (5000 in the paper, for its scale of errors).
        per_token: draw t for every token, as in pre-training; else one t a pair, as the paper has it.
        baseline: train as many steps of the last stage on the winners as well, to compare with.
    """

    pairs: Whole = 1000
    steps: Count = 300
    lr: NotNegative = 1e-8
    batch_size: Count = 64
    beta: Positive = 5000.0
    per_token: bool = False
    baseline: bool = True


@dataclass
class OptimiserConfig:
    """AdamW; one-dimensional weights, biases and the head do not decay.

    Args:
        name: muon takes orthogonalised steps for weight matrices instead (common/muon.py); preferences keep AdamW.
        weight_decay: of all other weights.
        beta2: of AdamW (0.99 in the paper's text, 0.95 in its code).
        warmup: steps of each stage over which the learning rate rises linearly.
        schedule: constant (released) or cosine down to `min_lr` at each stage's last step.
        min_lr: at which the cosine ends.
        grad_clip: largest norm of the gradient; 0 does not clip.
        ema_decay: of the averaged weights, which are handed from stage to stage; 0 keeps none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: NotNegative = 0.02
    beta2: Annotated[float, Range(0, 0.9999)] = 0.95
    warmup: Whole = 100
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: NotNegative = 0.0
    grad_clip: NotNegative = 3.0
    ema_decay: Decay = 0.9999


@dataclass
class SamplingConfig:
    """How pictures are decoded (section 5.1).

    Args:
        iterations: K, in which all tokens are drawn; as many as tokens is one token at a time.
        head_steps: steps of the head's diffusion in the first iterations.
        last_head_steps: of the last iterations, to which they fall as tokens fill in; None keeps them constant.
        head_chain: instead of head_steps, as the released code writes it: ddim25 (a whole stride) or 10,15 (a count for
            each section of the chain).
        sampler: ancestral (released) or ddim.
        guidance: scale of classifier-free guidance; 1 leaves the null text out.
        guidance_schedule: constant, or linear from 1 up with the share of known tokens.
        temperature: of the head's noise.
        clip: largest absolute value of an estimated token; 0 does not clip (released).
    """

    iterations: Annotated[int, Range(1, 16384)] = 64
    head_steps: Annotated[int, Range(1, 1000)] = 100
    last_head_steps: Annotated[int, Range(1, 1000)] | None = None
    head_chain: str = ""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    guidance: Annotated[float, Range(1, 100)] = 4.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    temperature: Annotated[float, Range(0, 10)] = 1.0
    clip: NotNegative = 0.0


@dataclass
class TrainerConfig(TrainerOptions):
    """How to run.

    Args:
        batch_size: of a step, over all processes and accumulated micro-batches.
        recompute: compute the blocks again in the backward pass instead of keeping them: less memory, more time.
        sample_every: steps between sample grids; 0 draws none on the way.
    """

    batch_size: Count = 2048
    recompute: bool = False
    checkpoint_every: Count = 100
    sample_every: Whole = 500


@dataclass
class EvaluationConfig:
    """What is measured at the end.

    Args:
        per_task: prompts of each of GenEval's six tasks (shapes), or 6 times as many captions (other data).
        batch_size: pictures drawn at once.
        grid: prompts shown side by side.
    """

    per_task: Count = 100
    batch_size: Count = 100
    grid: Count = 8


@dataclass
class LightgenConfig:
    """One run: a synthetic set, stages of rising resolution, preference pairs, DPO, the six columns before and after.

    Args:
        teacher: a diffusers text-to-image directory, for data.name teacher.
        autoencoder: a diffusers directory whose vae/ makes the latents; pixels for none.
        run_dir: folder of this run's checkpoints, logs, samples, metrics and models.
        seed: of the order of the data and of everything drawn in training.
        resume: auto continues an unfinished run in run_dir; never refuses a used folder.
    """

    teacher: str = "ldm/pretrained/shapes32-v"
    autoencoder: str = "ldm/pretrained/shapes32-v"
    run_dir: str = "runs/lightgen"
    seed: Seed = 0
    resume: Literal["auto", "never"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
