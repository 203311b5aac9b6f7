"""What a run folder holds beside checkpoints: each arm's log and metrics, and the table of all arms."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.data.lines import read_lines
from common.files import read_object, write_atomically
from common.paths import existing_path
from se_moe import deepspeed_arm
from se_moe.communication import barrier, initialized
from se_moe.config import TrainConfig
from se_moe.data import TextData

_HEAD = [
    "arm",
    "tokens/s",
    "CPU-s per 1,000 tokens",
    "states on the device, MB a rank",
    "all tensors at the peak, MB a rank",
    "loss",
    "held-out loss",
]


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
    kept = []
    if path.is_file():
        for _, line in read_lines(path):
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut off
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("step", first_step) < first_step:
                    kept.append(line)
    text = "".join(line + "\n" for line in kept)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    with path.open("a", encoding="utf-8") as file:

        def add(entry: Mapping[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield add


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


def measured(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The metrics of every arm that has ended, by its name."""
    files = {arm: Path(config.run_dir) / arm / "metrics.json" for arm in config.arms}
    return {arm: read_object(file) for arm, file in files.items() if file.is_file()}


def table(config: TrainConfig) -> str:
    """The arms side by side, from their metrics files."""
    rows = []
    names = {
        "ours": "ours, experts in tiers" if config.switches.tiers else "ours",
        "resident": "ours, experts resident",
        "deepspeed": f"DeepSpeed, ZeRO-{config.parallel.zero_stage}",
        "naive": "naive, every switch off",
    }
    found = measured(config)
    for arm in config.arms:
        if m := found.get(arm):
            numbers = [f"{m['tokens_per_second']:,.0f}", f"{m['cpu_seconds_per_1000_tokens']:.3f}"]
            states = m.get("device_peak_bytes")
            numbers.append(f"{states / 1e6:.1f}" if states else "-")
            numbers += [f"{m['peak_bytes'] / 1e6:.1f}", f"{m['loss']:.4f}", f"{m['held_out_loss']:.4f}"]
            rows.append([names[arm], *numbers])
        elif arm == "deepspeed" and not deepspeed_arm.available():
            rows.append([names[arm], deepspeed_arm.INSTALL, *[""] * (len(_HEAD) - 2)])
    lines = [_HEAD, ["---"] * len(_HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
