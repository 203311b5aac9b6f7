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

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, run_main
from common.files import write_atomically, write_json
from se_moe.config import Switches, TrainConfig, read_config

_HEAD = [
    "arm",
    "tokens/s",
    "CPU-s per 1,000 tokens",
    "states on the device, MB a rank",
    "all tensors at the peak, MB a rank",
    "loss",
    "held-out loss",
]


def arm_config(config: TrainConfig, arm: str) -> TrainConfig:
    """The run's configuration for one arm of the table."""
    switches = config.switches
    if arm == "resident":
        switches = replace(switches, tiers=False)
    if arm == "naive":
        switches = Switches.naive()
    return replace(config, switches=switches, arms=[arm])


def work(config: TrainConfig, arm: str) -> dict[str, Any]:
    """One process' share of an arm."""
    # Torch is imported here, so that --help and a misspelt option answer at once.
    if arm == "deepspeed":
        from se_moe.deepspeed_arm import run_deepspeed

        return run_deepspeed(config)
    from se_moe.arm import run_arm

    return run_arm(arm_config(config, arm), arm)


def start_ranks(config: TrainConfig, arm: str) -> None:
    """Run one arm on `parallel.ranks` processes of this machine.

    Raises:
        UserError: a process failed (it has said why).
    """
    ranks = config.parallel.ranks
    if ranks < 1:
        raise UserError(f"--parallel.ranks is {ranks}; at least one process is needed")
    folder = Path(config.run_dir) / arm
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        options = Path(meeting) / "config.yaml"
        options.write_text(json.dumps(asdict(replace(config, arms=[arm]))), encoding="utf-8")  # JSON is YAML
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "SE_MOE_RENDEZVOUS": str(Path(meeting) / "ranks"),
                "OMP_NUM_THREADS": str(config.threads),
                "TOKENIZERS_PARALLELISM": "false",
            }
            # Every rank would say the same; the first one speaks, and errors of the others are short.
            command = [sys.executable, str(Path(__file__).resolve()), "--config", str(options)]
            processes.append(subprocess.Popen(command, env=environment))
        (folder / "workers.json").write_text(json.dumps({"pids": [p.pid for p in processes]}), encoding="utf-8")
        try:
            while any(p.poll() is None for p in processes):
                if any(p.poll() not in (None, 0) for p in processes):
                    time.sleep(2)  # the others notice by themselves, or never
                    break
                time.sleep(0.05)
        finally:
            for p in processes:
                if p.poll() is None:
                    p.terminate()
            statuses = [p.wait() for p in processes]
    if any(statuses):
        failed = next(i for i, status in enumerate(statuses) if status)
        raise UserError(
            f"arm {arm}: rank {failed} of {ranks} ended with status {statuses[failed]}; see the message above. Start "
            "again to continue from the last checkpoint"
        )


def measured(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The metrics of every arm that has ended, by its name."""
    files = {arm: Path(config.run_dir) / arm / "metrics.json" for arm in config.arms}
    return {arm: json.loads(file.read_text(encoding="utf-8")) for arm, file in files.items() if file.is_file()}


def table(config: TrainConfig) -> str:
    """The arms side by side, from their metrics files."""
    from se_moe.deepspeed_arm import INSTALL, available

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
        elif arm == "deepspeed" and not available():
            rows.append([names[arm], INSTALL, *[""] * (len(_HEAD) - 2)])
    lines = [_HEAD, ["---"] * len(_HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Train the configured arms; returns the table as Markdown."""
    config, text = read_config(argv, __doc__.splitlines()[0])
    if "RANK" in os.environ:  # one of several processes: torchrun's, or those of `start_ranks`
        work(config, config.arms[0])
        return ""
    from se_moe.deepspeed_arm import available

    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    record, started = folder / "metrics.json", time.perf_counter()
    earlier = json.loads(record.read_text(encoding="utf-8"))["seconds"] if record.is_file() else 0.0
    for arm in config.arms:
        if arm == "deepspeed" and not available():
            continue
        start_ranks(config, arm)
        write_json(record, {"seconds": earlier + time.perf_counter() - started, "arms": measured(config)})
    result = table(config)
    write_atomically(folder / "table.md", lambda path: path.write_text(result + "\n", encoding="utf-8"))
    print(result)
    return result


if __name__ == "__main__":
    run_main(main)
