"""Train a denoiser on noisy digits.

    python newpaper/train.py                    # configs/small.yaml: half a minute on 2 CPU cores
    python newpaper/train.py --targets clean    # any option can be overridden; --help lists them

A run folder holds config.yaml, training/ (checkpoints, logs), model.safetensors and metrics.json.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from common.cli import parse_config
from common.errors import run_main
from common.options import free_options
from newpaper.config import NewpaperRun

SMALL = Path(__file__).parent / "configs" / "small.yaml"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, keep the averaged weights, measure; returns the metrics."""
    config, text = parse_config(NewpaperRun, SMALL, __doc__.splitlines()[0], argv)
    options, folder, started = config.trainer, Path(config.run_dir), perf_counter()
    steps, batch = options.max_steps, options.batch_size
    # Torch and Lightning are imported here, so that --help and a misspelt option answer at once.
    from common.data.cache import fingerprint_tensors
    from common.data.sampling import StepDataModule
    from common.training import check_trainer, open_run_folder, train, write_metrics
    from common.weights import save_weights
    from newpaper.evaluate import digits, measure
    from newpaper.trainer import DenoiserTraining

    check_trainer(options, {"trainer.batch_size": batch}, resume=config.resume, ema_decay=config.ema_decay)
    table = digits("train")
    open_run_folder(folder, config.resume, text, free_options()).begin({"data": fingerprint_tensors(table.columns)})
    module = DenoiserTraining(config)
    data = StepDataModule(table, batch, steps, config.seed, accumulate=options.accumulate)
    stage, resume, networks = folder / "training", config.resume, [module.network]
    train(stage, module, data, options, steps=steps, batch_size=batch, resume=resume, networks=networks)
    module.ema.copy_to(module.network)
    save_weights(folder / "model.safetensors", module.network.state_dict())
    return write_metrics(folder / "metrics.json", measure(module.network, config.sigma), {}, perf_counter() - started)


if __name__ == "__main__":
    run_main(main)
