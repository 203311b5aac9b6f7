"""Train a mixture-of-experts language model with experts in tiers, beside DeepSpeed and the naive way.

    python se_moe/train.py                                  # configs/small.yaml: two processes on this machine
    python se_moe/train.py --config se_moe/configs/smoke.yaml
    python se_moe/train.py --switches.cache false --switches.prefetch false      # any part of the paper can be off
    python se_moe/train.py --data.tasks '[my_text/]' --storage.device_mb 16      # your own text, a harder budget
    python se_moe/train.py --arms '[ours]' --parallel.ranks 1
    torchrun --nproc-per-node 8 se_moe/train.py --arms '[ours]' --config se_moe/configs/paper.yaml

Started again after an interruption (kill -9 too), a run continues where it stopped, with the same losses; with another
number of ranks as well. The run folder holds a folder per arm (checkpoints, log.jsonl, metrics.json), model/ for
serve.py, table.md, and metrics.json: the arms' metrics and the wall seconds of all starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError, run_main, stop_if_not_finite
from common.files import read_object, write_atomically, write_json
from common.run_clock import clock_of
from se_moe.config import FREE_OPTIONS, TrainConfig, read_config


def train_arm(config: TrainConfig, arm: str) -> dict[str, Any]:
    """One process' share of an arm, from its start or its last checkpoint to its metrics.

    Raises:
        UserError: bad options, a checkpoint in run_dir that belongs to other ones, a loss that is not finite.
    """
    # Torch is imported here, so that --help and a misspelt option answer at once.
    import torch

    from common.choices import Choices
    from common.events import Board
    from common.kernels import products
    from common.paths import existing_path
    from common.processes import start_process_group
    from common.stopping import Steps
    from se_moe import checkpoint
    from se_moe.communication import barrier
    from se_moe.deepspeed_arm import DeepSpeedTrainer
    from se_moe.launch import MEETING, choose_device, make_run_groups
    from se_moe.measuring import peak_tensor_bytes
    from se_moe.run import log_file, summary, text_data
    from se_moe.trainer import ArmTrainer, StepLog, Trainer

    config = config.of_arm(arm)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.parallel.device)
    start_process_group("nccl" if device.type == "cuda" else "gloo", meeting=os.environ.get(MEETING))
    groups, data = make_run_groups(config), text_data(config)
    run, main = Path(config.run_dir), groups.rank == 0
    folder = run / arm
    checkpoints, metrics_file = folder / "checkpoints", folder / "metrics.json"
    products.use_choices(Choices(folder))  # a run that goes on takes the form that it began with
    last = checkpoint.newest_sound(checkpoints, groups)
    if arm == "deepspeed":
        trainer: ArmTrainer = DeepSpeedTrainer(config, data, device, groups)  # always from the start
    else:
        if last is not None and config.resume == "never":
            raise UserError(f"{folder} holds an earlier run; choose another --run_dir or --resume auto")
        tiers = existing_path(config.storage.folder) if config.storage.folder else folder
        trainer = checkpoint.open_trainer(config, data, device, groups, tiers / "tiers", last)
    barrier()

    def export() -> None:
        if main and isinstance(trainer, Trainer):
            model = run / "model" if arm == "ours" else folder / "model"
            checkpoint.export_model(checkpoints, model, data.tokenizer.to_str())

    if metrics_file.is_file() and trainer.done >= config.steps:
        trainer.close()
        export()
        return read_object(metrics_file)
    first, peak, tokens = trainer.done, 0, config.batch * config.data.sequence

    def save() -> str:
        nonlocal last
        if isinstance(trainer, Trainer):
            if last is None or checkpoint.step_of(last) != trainer.done:
                last = checkpoint.save(trainer, checkpoints, config.keep)
            return f"step {trainer.done} is saved in {last}"
        return ""

    board = Board(folder, config.logger, first, main)
    with log_file(folder / "log.jsonl", first, main) as write, board, Steps() as steps:
        while trainer.done < config.steps:
            profiled: dict[str, bool] = {}
            if trainer.done == first + 2:
                logs: list[StepLog] = []
                pointers = trainer.host_pointers()
                peak = peak_tensor_bytes(lambda: logs.append(trainer.step()), device, pointers)  # noqa: B023
                log, profiled = logs[0], {"profiled": True}
            else:
                log = trainer.step()
            write(asdict(log) | profiled)
            for what, value in (("loss", log.loss), ("gradient norm", log.grad_norm)):
                kept = last or checkpoints / "step-000000"
                stop_if_not_finite(value, trainer.done, kept, advice="a lower optimiser.lr", what=what)
            shown = log.step % config.log_every == 0 or trainer.done == config.steps
            if shown:
                board.keep([asdict(log)], log.step)
            if main and config.progress and shown:
                print(
                    f"[{arm}] step {log.step:5d}  loss {log.loss:.4f}  lm {log.lm_loss:.4f}  "
                    f"{tokens / log.seconds:,.0f} tokens/s  {log.cpu_seconds:.2f} CPU-s",
                    file=sys.stderr,
                    flush=True,
                )
            if trainer.done % config.checkpoint_every == 0 or trainer.done == config.steps:
                save()
            steps.ended(save)
    held_out = trainer.evaluate(config.eval_sequences)
    metrics = summary(folder / "log.jsonl", tokens, groups.world_size) if main else {}
    metrics |= {"arm": arm, "held_out_loss": held_out, "peak_bytes": trainer.highest(peak), **trainer.metrics()}
    trainer.close()
    export()
    if main:
        write_json(metrics_file, metrics)
    barrier()
    return metrics


def main(argv: Sequence[str] | None = None) -> str:
    """Train the configured arms one after the other; returns their table as Markdown."""
    config, text = read_config(argv, __doc__.splitlines()[0])
    from common.data.cache import fingerprint_strings
    from common.training import open_run_folder
    from se_moe import deepspeed_arm
    from se_moe.launch import MEETING, choose_device, start_ranks
    from se_moe.run import measured, table, text_data

    folder = Path(config.run_dir)
    if MEETING not in os.environ:  # else `start_ranks` has started this process
        config.check_ranks(int(os.environ.get("WORLD_SIZE", config.parallel.ranks)))
        choose_device(config.parallel.device)
        opened = open_run_folder(folder, config.resume, text, FREE_OPTIONS, {"data": ["data.tasks"]})
        data = text_data(config)  # which also puts it into the cache for all processes
        opened.begin({"data": data.fingerprint, "tokenizer": fingerprint_strings([data.tokenizer.to_str()])})
    if "RANK" in os.environ:  # one of several processes: torchrun's, or those of `start_ranks`
        train_arm(config, config.arms[0])
        return ""
    record = folder / "metrics.json"
    for arm in config.arms:
        if arm == "deepspeed" and not deepspeed_arm.available():
            continue
        start_ranks(config, arm)
        write_json(record, {"seconds": clock_of(folder).keep(), "arms": measured(config)})
    result = table(config)
    write_atomically(folder / "table.md", lambda path: path.write_text(result + "\n", encoding="utf-8"))
    print(result)
    return result


if __name__ == "__main__":
    run_main(main)
