"""Train a latent diffusion model: first stage, denoiser in its latent space, samples and metrics.

    python ldm/train.py                                    # configs/small.yaml: captions to emoji on a laptop
    python ldm/train.py --config ldm/configs/class.yaml        # another task; every task has a ready-made file
    python ldm/train.py --trainer.max_steps 500 --data.size 64 # any option can be overridden; --help lists them
    python ldm/train.py --data.name folder --data.path PHOTOS # your own images
    python ldm/train.py --data.name shards --data.path "DIR/*.parquet"               # data that do not fit one disk
    python ldm/train.py --trainer.devices 2 --trainer.strategy ddp                   # one machine, two processes
    torchrun --nnodes 2 --nproc-per-node 8 ... ldm/train.py --trainer.num_nodes 2 --trainer.devices 8 \\
        --trainer.strategy ddp

Started again after an interruption, it continues where it stopped, with the same losses as without the interruption.
A run folder holds config.yaml, first_stage/, diffusion/ (checkpoints, logs, sample grids), metrics.json, table.md and
pipeline/.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import UserError, run_main
from common.processes import is_main_process
from ldm.config import FirstStageConfig, LdmConfig, TrainerConfig

# Torch and Lightning are imported where they are needed, so that --help and a misspelt option answer at once.
if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

    from common.data.sampling import Table
    from ldm.autoencoder import FirstStage
    from ldm.diffusion import LatentDiffusion
    from ldm.run import Run
    from ldm.streaming import ShardStream

CONFIGS = Path(__file__).parent / "configs"
MASKS = 2000  # inpainting masks drawn once and picked from at random


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the configured stages; returns the metrics."""
    config, text = parse_config(LdmConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    if not config.stages:
        raise UserError("--stages is empty; choose from first_stage, diffusion, evaluate")
    started = time.perf_counter()
    from common.training import write_metrics
    from ldm.evaluate import evaluate_run
    from ldm.run import Run

    run, ldm, seconds = Run.open(config, text), None, {}
    if run.finished:
        print(f"{run.folder}: trained already", file=sys.stderr)
        if is_main_process() and not run.exported:
            ldm = run.load()
            run.export(ldm)
    elif config.stages != ["evaluate"]:
        began = time.perf_counter()
        first_stage = first_stage_of(run)
        seconds["first_stage"] = time.perf_counter() - began
        if "diffusion" in config.stages:
            began = time.perf_counter()
            ldm = train_diffusion(run, first_stage)
            seconds["diffusion"] = time.perf_counter() - began
    if "evaluate" not in config.stages or not is_main_process():
        return {}
    metrics = evaluate_run(ldm or run.load(), run.task, config, run.folder)
    total = time.perf_counter() - started
    return write_metrics(run.folder / "metrics.json", metrics, seconds, total, trained=bool(seconds))


def first_stage_of(run: Run) -> FirstStage:
    """The run's autoencoder: trained, gone on with, or read."""
    config, folder = run.config, run.folder / "first_stage"
    trained = folder / "first_stage.safetensors"
    needed = config.first_stage.kind != "pixels" and not config.first_stage.weights
    if needed and "first_stage" not in config.stages and not trained.is_file():
        raise UserError(
            f"--stages lacks first_stage, but {trained} does not exist: add it, or give --first_stage.weights"
        )
    return train_first_stage(
        config.first_stage,
        config.trainer,
        run.task.train,
        config.data.size,
        folder,
        config.seed,
        resume=config.resume != "never",
    )


def train_first_stage(
    config: FirstStageConfig,
    trainer_config: TrainerConfig,
    images: Table | ShardStream,
    size: int,
    folder: Path,
    seed: int,
    resume: bool = True,
    callbacks: list[pl.Callback] | None = None,
    save: bool = True,
    checkpoints: bool | None = None,
) -> FirstStage:
    """Train (or load) the first stage: reconstruction, a mild regulariser, a patch discriminator (appendix G).

    Args:
        images: table or stream with a uint8 column `image` [N, 3, H, W].
        folder: gets `first_stage.safetensors`, logs, checkpoints and reconstruction grids.
        save: False leaves all of them out; checkpoints: True writes these all the same, and goes on from them.

    Returns:
        The first stage, in eval mode with gradients off.
    """
    import torch

    from common.images import save_grid, to_uint8, to_unit
    from common.training import EveryNSteps, train
    from common.weights import save_weights
    from ldm.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
    from ldm.first_stage import build_first_stage, describe, freeze, load_first_stage
    from ldm.streaming import data_module
    from ldm.trainer import FirstStageTrainer, StopAtCount

    weights = folder / "first_stage.safetensors"
    if config.kind == "pixels":
        return IdentityFirstStage()
    if config.weights:
        return freeze(load_first_stage(Path(config.weights), config, size))
    if resume and save and weights.is_file():
        return freeze(load_first_stage(weights, config, size))
    torch.manual_seed(seed)
    model: FirstStage
    if config.init_from:
        model = load_first_stage(Path(config.init_from), config, size, option="first_stage.init_from")
    else:
        model = build_first_stage(config, size)
    assert isinstance(model, (AutoencoderKL, VQModel))
    module = FirstStageTrainer(model, config, seed, config.batch_size)
    preview = first_rows(images, 16)

    def draw(step: int) -> None:
        with module.averaged(), torch.no_grad():
            restored = model.decode_latent(model.encode_latent(to_unit(preview.to(module.device))))
        path = folder / "samples" / f"reconstruction_{step:06d}.png"
        save_grid(torch.cat([preview, to_uint8(restored).cpu()]), path, columns=16)

    adversarial = config.disc_weight > 0
    options = trainer_config
    if options.precision == "16-mixed":  # the step clips gradients by hand, which a scaler would have multiplied
        options = replace(options, precision="bf16-mixed")
    if adversarial and options.strategy == "ddp":  # the discriminator has no gradient before disc_start
        options = replace(options, strategy="ddp_find_unused_parameters_true")
    trainer = train(
        folder,
        module,
        data_module(images, config.batch_size, config.steps, seed),
        options,
        steps=config.steps,
        optimisers=2 if adversarial else 1,
        batch_size=config.batch_size,
        resume="auto" if resume else "never",
        logs=save,
        checkpoints=checkpoints,
        callbacks=[
            StopAtCount(config.steps),
            *([EveryNSteps(max(1, config.steps // 4), draw)] if save else []),
            *(callbacks or []),
        ],
    )
    if save and trainer.is_global_zero:
        draw(config.steps)
        with module.averaged():
            save_weights(weights, model.state_dict(), {"config": json.dumps({"first_stage": describe(model, size)})})
    if module.ema is not None:
        module.ema.copy_to(model)
    # With the strides it would have if read from its file: a resumed run, which reads it, encodes to the same bits.
    for parameter in model.cpu().parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return freeze(model)


def train_diffusion(run: Run, first_stage: FirstStage) -> LatentDiffusion:
    """Train or resume the denoiser in the latent space of a first stage (equations 2 and 3).

    Returns:
        The model with averaged weights, which the run's folder now holds too.
    """
    import torch

    from common.data.cache import fingerprint_module
    from common.data.sampling import TensorTable
    from common.training import EveryNSteps, record_inputs, train
    from ldm.run import build_latent_diffusion, load_second_stage, not_exportable
    from ldm.sample import task_grid
    from ldm.streaming import data_module
    from ldm.tasks import mask_bank
    from ldm.trainer import DiffusionTrainer

    config, trainer = run.config, run.config.trainer
    torch.manual_seed(config.seed)
    ldm = build_latent_diffusion(config, run.task, first_stage)
    if config.init_from:
        load_second_stage(ldm, Path(config.init_from))
    if config.export_pipeline and config.task == "text" and (reason := not_exportable(ldm, run.task)):
        print(f"{run.folder}/pipeline will not be written: {reason}", file=sys.stderr)
    latent = config.first_stage.kind != "pixels"
    cached = latent and config.data.cache_latents and isinstance(run.task.train, TensorTable)
    table = run.latents(first_stage) if cached else run.task.train
    if latent and config.diffusion.scale_by_std and config.init_from is None:  # whose scale comes with it
        ldm.set_scale_factor(first_batch_scale(config, run.task.train, first_stage))
    holes = mask_bank(config.data.size, MASKS, config.seed) if config.task == "inpaint" else None
    module = DiffusionTrainer(ldm, config, holes)
    unet: Any = ldm.model.diffusion_model
    folder = run.folder / "diffusion"
    record_inputs(folder, config.resume, {"first stage": lambda: fingerprint_module(first_stage)})

    def draw(step: int) -> None:
        with module.ema.swapped_into(ldm) if module.ema else torch.no_grad():
            task_grid(ldm, run.task, config, folder / "samples" / f"step_{step:06d}.png")

    train(
        folder,
        module,
        data_module(table, trainer.batch_size, trainer.max_steps, config.seed, config.data.workers, trainer.accumulate),
        trainer,
        steps=trainer.max_steps,
        batch_size=trainer.batch_size,
        resume=config.resume,
        grad_clip=config.optimiser.grad_clip,
        callbacks=[EveryNSteps(trainer.sample_every, draw)] if trainer.sample_every else [],
        networks=[unet],
    )
    if module.ema is not None:
        module.ema.copy_to(ldm)
    ldm = ldm.cpu().eval()
    if is_main_process():
        run.save(ldm)
    return ldm


def first_rows(table: Table | ShardStream, n: int) -> Tensor:
    """The first n images uint8 [n, 3, H, W] of a table or stream."""
    from ldm.streaming import ShardStream

    if isinstance(table, ShardStream):
        return table.head(n)["image"]
    return table.__getitems__(range(min(n, len(table))))["image"]


def first_batch_scale(config: LdmConfig, train: Table | ShardStream, first_stage: FirstStage) -> Tensor:
    """Unscaled latents of the run's first batch, from which `scale_by_std` takes the factor (appendix G)."""
    import torch

    from common.data.sampling import StepBatchSampler
    from common.images import to_unit
    from ldm.streaming import ShardStream

    size = config.trainer.batch_size
    if isinstance(train, ShardStream):
        images = train.head(size)["image"]
    else:
        images = train.__getitems__(StepBatchSampler(len(train), size, 1, config.seed).batch(0))["image"]
    with torch.no_grad():
        moments = first_stage.moments(to_unit(images))
        shape = (len(images), first_stage.embed_dim, *moments.shape[2:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
        return first_stage.latent_from_moments(moments, noise)


if __name__ == "__main__":
    run_main(main)
