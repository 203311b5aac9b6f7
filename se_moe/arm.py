"""One arm of the table from its start, or its last checkpoint, to its metrics."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.data.lines import read_lines
from common.errors import UserError
from common.files import write_json
from common.ledger import peak_resident
from common.paths import existing_path
from se_moe import checkpoint
from se_moe.communication import ParallelGroups, barrier, initialized
from se_moe.config import TrainConfig
from se_moe.data import TextData
from se_moe.homes import ResidentHome, TieredHome
from se_moe.measuring import peak_tensor_bytes
from se_moe.training import StepLog, Trainer, choose_device, make_run_groups, start_process_group


def text_data(config: TrainConfig) -> TextData:
    """The run's text; the first process makes the cached files, the others wait for them."""
    data = config.data
    names = [str(existing_path(n)) if existing_path(n).exists() else n for n in data.tasks]
    if initialized() and dist.get_rank() != 0:
        barrier()
    found = TextData(names, data.shares, data.vocabulary, data.sequence)
    if initialized() and dist.get_rank() == 0:
        barrier()
    return found


@contextlib.contextmanager
def log_file(path: Path, first_step: int, write: bool) -> Iterator[Any]:
    """Append to a log of JSON lines, of which steps from `first_step` on (made before an interruption) are dropped."""
    if not write:
        yield lambda entry: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.is_file():
        for _, line in read_lines(path):
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut off
                if json.loads(line)["step"] < first_step:
                    kept.append(line)
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)
    with path.open("a", encoding="utf-8") as file:

        def add(entry: Mapping[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield add


def run_arm(config: TrainConfig, arm: str = "ours") -> dict[str, Any]:
    """Train one arm of the table to its end (or from its last checkpoint on); returns its metrics.

    Raises:
        UserError: bad options, or a checkpoint in run_dir that belongs to other ones.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config.parallel.device)
    start_process_group(device)
    groups = make_run_groups(config)
    data = text_data(config)
    folder = Path(config.run_dir) / arm
    metrics_file = folder / "metrics.json"
    tiers = existing_path(config.storage.folder) if config.storage.folder else folder
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None and config.resume == "never":
        raise UserError(f"{folder} holds an earlier run; choose another --run_dir or --resume auto")
    trainer = checkpoint.open_trainer(config, data, device, groups, tiers / "tiers", found)
    barrier()
    if metrics_file.is_file() and trainer.done >= config.steps:
        trainer.close()
        return json.loads(metrics_file.read_text(encoding="utf-8"))
    main, tokens = groups.rank == 0, config.batch * config.data.sequence
    peak = 0
    with log_file(folder / "log.jsonl", trainer.done, main) as write:
        while trainer.done < config.steps:
            log: list[StepLog] = []
            if peak == 0 and trainer.done % config.checkpoint_every == 2:
                if isinstance(trainer.home, TieredHome):
                    # Gradients that wait for their update are gone before this step's exist, but on another thread,
                    # whose memory is not seen.
                    trainer.home.store.flush()
                exclude = host_pointers(trainer)
                peak = peak_tensor_bytes(lambda: log.append(trainer.step()), device, exclude)  # noqa: B023
                write(asdict(log[0]) | {"profiled": True})
            else:
                log.append(trainer.step())
                write(asdict(log[0]))
            entry = log[0]
            if main and (entry.step % config.log_every == 0 or trainer.done == config.steps):
                print(
                    f"[{arm}] step {entry.step:5d}  loss {entry.loss:.4f}  lm {entry.lm_loss:.4f}  "
                    f"{tokens / entry.seconds:,.0f} tokens/s  {entry.cpu_seconds:.2f} CPU-s",
                    file=sys.stderr,
                    flush=True,
                )
            if trainer.done % config.checkpoint_every == 0 or trainer.done == config.steps:
                checkpoint.save(trainer, folder / "checkpoints", config.keep)
    held_out = trainer.evaluate(config.eval_sequences)
    metrics = summary(folder / "log.jsonl", tokens, groups.world_size) if main else {}
    metrics |= {
        "arm": arm,
        "held_out_loss": held_out,
        "peak_bytes": highest(peak, groups),
        "peak_resident_bytes": highest(peak_resident(), groups),
        "device_budget_bytes": trainer.arena.budget_bytes,
        "device_peak_bytes": highest(trainer.arena.peak_bytes, groups),
        "parameters": trainer.dense_count + trainer.split_count * groups.world_size,
        "expert_parameters": trainer.sparse_count * groups.expert_size,
        "ranks": groups.world_size,
        **tier_metrics(trainer),
    }
    trainer.close()
    if main:
        checkpoint.export_model(
            folder / "checkpoints",
            Path(config.run_dir) / "model" if arm == "ours" else folder / "model",
            data.tokenizer.to_str(),
        )
        write_json(metrics_file, metrics)
    barrier()
    return metrics


def host_pointers(trainer: Trainer) -> list[int]:
    """Storages of the expert cache: host memory, which on a CPU only looks like device memory."""
    if isinstance(trainer.home, ResidentHome):
        return []
    buffers = trainer.home.store.host_buffers() + [slot.buffer for slot in trainer.home.host._free]
    return [buffer.untyped_storage().data_ptr() for buffer in buffers]


def tier_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the tiers did on this rank."""
    if isinstance(trainer.home, ResidentHome):
        return {}
    store, files = trainer.home.store, trainer.home.files
    found: dict[str, Any] = {
        "bytes_read": files.statistics.bytes_read,
        "bytes_written": files.statistics.bytes_written,
        "fetch_seconds": store.statistics.fetch_seconds,
        "wait_seconds": store.statistics.wait_seconds,
        "hidden_fraction": store.statistics.hidden_fraction,
        "predicted": store.statistics.predicted,
        "missed": store.statistics.missed,
        "unused": store.statistics.unused,
        "host_bytes": trainer.home.host.peak_bytes,
        "file_bytes": files.live_bytes,
    }
    if trainer.home.cache is not None:
        found["cache_hit_rate"] = trainer.home.cache.statistics.hit_rate
    return found


def highest(value: int, groups: ParallelGroups) -> int:
    """The largest `value` of all ranks; a collective call."""
    if groups.world_size == 1:
        return value
    found = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=groups.world)
    return int(found)


def summary(log: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Speed and loss from a log: medians of the steps after the first ten, mean loss of the last tenth."""
    entries = [json.loads(line) for _, line in read_lines(log)]
    timed = [e for e in entries[10:] if "profiled" not in e] or entries
    seconds = sorted(e["seconds"] for e in timed)[len(timed) // 2]
    cpu = sorted(e["cpu_seconds"] for e in timed)[len(timed) // 2]
    last = entries[-max(1, len(entries) // 10) :]
    return {
        "steps": len(entries),
        "tokens_per_second": tokens / seconds,
        "cpu_seconds_per_1000_tokens": 1000 * cpu * ranks / tokens,
        "loss": sum(e["lm_loss"] for e in last) / len(last),
        "first_loss": entries[0]["lm_loss"],
        "alpha": sum(e["alpha"] for e in entries) / len(entries),
        "losses": [e["loss"] for e in entries],
    }
