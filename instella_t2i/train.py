"""Train a one-dimensional binary tokenizer in two stages, then generators in its codes.

    python instella_t2i/train.py                                     # configs/small.yaml: real artwork, on a laptop
    python instella_t2i/train.py --stages tokenizer                  # stage 1 alone
    python instella_t2i/train.py --data.name folder --data.path PICTURES --run_dir runs/mine      # own pictures
    python instella_t2i/train.py --network.tokens 8 --run_dir runs/instella-8                     # fewer tokens
    python instella_t2i/train.py --network.quantizer vq --network.bits 10 --run_dir runs/vq       # a baseline
    python instella_t2i/train.py --trainer.devices 2 --trainer.strategy ddp                       # two processes
    python instella_t2i/train.py --stages diffusion --tokenizer_from FOLDER --run_dir runs/again  # on a given tokenizer

Stages: `tokenizer` trains encoder, quantizer and decoder at one size; `decoder` trains the decoder alone on several
sizes, from the frozen encoder's codes; `diffusion` and `autoregression` train a generator each, on codes and features
of captions that are made once. Started again after an interruption, a run continues where it stopped, with the
same losses as without the interruption; finished stages are not repeated.

A run folder holds config.yaml, a folder a stage (checkpoints, logs, sample pictures, config.json, model.safetensors),
codes/, metrics.json, table.md, reconstructions.png and samples.png, where both generators stand side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import run_main
from instella_t2i.config import InstellaConfig

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from instella_t2i.config import TrainerConfig
    from instella_t2i.data import Pictures
    from instella_t2i.run import Run
    from instella_t2i.tokenizer import Tokenizer
    from instella_t2i.trainer import TokenizerTraining

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the stages and measure them; returns the metrics."""
    config, text = parse_config(InstellaConfig, CONFIGS / "small.yaml", __doc__.split("\n")[0], argv)
    started = time.perf_counter()
    # Torch and Lightning are imported here and below, so that --help and a misspelt option answer at once.
    from common.processes import is_main_process
    from common.training import write_metrics
    from instella_t2i.evaluate import evaluate_run
    from instella_t2i.run import Run, stages_of

    run = Run.open(config, text)
    for name, make in STAGES.items():
        if name in stages_of(config) and not run.is_finished(name):
            with run.timed(name):
                make(run)
    if not is_main_process():
        return {}
    metrics = evaluate_run(run)
    return write_metrics(run.folder / "metrics.json", metrics, run.seconds, time.perf_counter() - started)


def train_tokenizer(run: Run) -> None:
    """Stage 1: reconstruction, perceptual and adversarial loss; the bits' noise falls."""
    train_stage(run, "tokenizer", run.new_tokenizer(), run.pictures)


def train_decoder(run: Run) -> None:
    """Stage 2: the decoder alone, on several sizes."""
    from instella_t2i.data import open_pictures

    config = run.config
    largest = max(config.data.size, *config.decoder.sizes)
    pictures = open_pictures(config.data, "train", largest, config.seed)
    train_stage(run, "decoder", run.load_tokenizer("tokenizer"), pictures)


def train_stage(run: Run, stage: str, tokenizer: Tokenizer, pictures: Pictures) -> None:
    """Train a tokenizer as the options of a stage say, and keep it."""
    from instella_t2i.trainer import TokenizerTraining

    config = run.config
    options = config.tokenizer if stage == "tokenizer" else config.decoder
    module = TokenizerTraining(tokenizer, config.tokenizer, options, config.data, config.trainer, config.seed)
    trainer_options = config.trainer
    if module.discriminator is not None and trainer_options.strategy == "ddp":
        # Tokenizer and discriminator take turns: in every backward pass one of them has no gradients.
        trainer_options = replace(trainer_options, strategy="ddp_find_unused_parameters_true")
    trainer = fit(run, stage, module, pictures.table(), options.batch_size, options.steps, trainer_options)
    run.save_tokenizer(tokenizer.cpu().eval(), stage)
    trainer.strategy.barrier()  # the next stage of every process reads what this one has written


def fit(
    run: Run, stage: str, module: TokenizerTraining, table: Any, batch_size: int, steps: int, options: TrainerConfig
) -> Trainer:
    """Train a tokenizer on a table, with pictures on the way; returns what trained it."""
    from common.data.sampling import StepDataModule
    from common.training import EveryNSteps, train
    from instella_t2i.evaluate import sheet

    config = run.config
    shown = run.held_out.images(range(min(config.evaluation.grid, len(run.held_out))))

    def show(step: int) -> None:
        module.tokenizer.eval()
        sheet({"": module.tokenizer}, shown, run.folder / stage / "samples" / f"step_{step:06d}.png")
        module.tokenizer.train()

    return train(
        run.folder / stage,
        module,
        StepDataModule(table, batch_size, steps, config.seed),
        options,
        steps=steps,
        batch_size=batch_size,
        resume=config.resume,
        optimisers=3,  # at most; the module ends training by its own count
        callbacks=[EveryNSteps(options.sample_every, show)] if options.sample_every else [],
        networks=[module.tokenizer],
    )


def train_diffusion(run: Run) -> None:
    """Binary diffusion over the tokens."""
    train_generator(run, "diffusion")


def train_autoregression(run: Run) -> None:
    """Autoregression over the tokens."""
    train_generator(run, "autoregression")


def train_generator(run: Run, kind: str) -> None:
    """Encode pictures and captions once, train a generator on them, and keep it."""
    import torch

    from common.processes import is_main_process
    from common.training import train
    from instella_t2i.codes import MixedData, code_table, fingerprint
    from instella_t2i.generation import Trained, save_generator
    from instella_t2i.generator_trainer import GeneratorTraining
    from instella_t2i.generators import Shape, make_generator
    from instella_t2i.text import FeatureTable

    config, tokenizer, reader = run.config, run.load_tokenizer().to(run.device), run.reader()
    options = config.diffusion if kind == "diffusion" else config.autoregression
    captions = list(run.pictures.captions)
    with run.timed("codes"):
        codes = run.codes(tokenizer)
        if config.codes.synthetic:
            captions += run.synthetic.captions
        texts = FeatureTable(reader, captions)
    torch.manual_seed(config.seed)
    shape = Shape(tokenizer.config.tokens, tokenizer.config.bits, reader.width)
    network = make_generator(kind, config.stream, shape)
    trainer = config.trainer
    module = GeneratorTraining(network, texts, options, seed=config.seed, accumulate=trainer.accumulate)
    begins = round(config.codes.synthetic_from * options.steps) if config.codes.synthetic else options.steps
    data = MixedData(
        code_table(codes, config.codes.views),
        len(codes[0]),
        config.codes.synthetic_share,
        begins,
        options.batch_size,
        options.steps,
        config.seed,
        accumulate=trainer.accumulate,
    )
    train(
        run.folder / kind,
        module,
        data,
        trainer,
        steps=options.steps,
        batch_size=options.batch_size,
        resume=config.resume,
        grad_clip=options.grad_clip,
        networks=[network],
    )
    if is_main_process():
        trained = Trained(network, getattr(options, "target", "epsilon"), reader.fingerprint, fingerprint(tokenizer))
        save_generator(trained, run.folder / kind)


STAGES: dict[str, Callable[[Run], None]] = {
    "tokenizer": train_tokenizer,
    "decoder": train_decoder,
    "diffusion": train_diffusion,
    "autoregression": train_autoregression,
}

if __name__ == "__main__":
    run_main(main)
