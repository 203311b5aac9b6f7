"""The processes of a run: started here or by torchrun, how they meet, their groups and devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError
from common.files import write_json
from common.processes import LAUNCHER, end_all, first_failure, how_it_ended
from common.stopping import SIGNALS, Stopped
from common.stopping import command as go_on
from se_moe.communication import ParallelGroups, initialized, make_groups
from se_moe.config import TrainConfig

MEETING = "SE_MOE_RENDEZVOUS"  # names the file through which the ranks that `start_ranks` starts meet


def start_ranks(config: TrainConfig, arm: str) -> None:
    """Run one arm of the table on `parallel.ranks` processes of this machine, which end with this one.

    Raises:
        UserError: a process failed (it has said why).
        Stopped: a signal ended one, and so all.
    """
    ranks = config.parallel.ranks
    folder = Path(config.run_dir) / arm
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        options = Path(meeting) / "config.yaml"
        options.write_text(json.dumps(asdict(replace(config, arms=[arm]))), encoding="utf-8")  # JSON is YAML
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                environment = {
                    **os.environ,
                    LAUNCHER: str(os.getpid()),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    MEETING: str(Path(meeting) / "ranks"),
                    "TOKENIZERS_PARALLELISM": "false",
                }
                if config.threads:
                    environment["OMP_NUM_THREADS"] = str(config.threads)
                # Every rank would say the same; the first one speaks, and errors of the others are short.
                command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", str(options)]
                processes.append(subprocess.Popen(command, env=environment))
            write_json(folder / "workers.json", {"pids": [process.pid for process in processes]})
            while any(process.poll() is None for process in processes):
                if any(process.poll() not in (None, 0) for process in processes):
                    break
                time.sleep(0.05)
            failed = first_failure(processes, patience=2)  # the others notice by themselves, or never
        finally:
            end_all(processes)
    statuses = [process.returncode for process in processes]
    if not any(statuses):
        return
    if failed is None:
        failed = next(rank for rank, status in enumerate(statuses) if status)
    if (number := statuses[failed] - 128) in SIGNALS:
        raise Stopped(number, saved=f"{folder} has what was saved")
    raise UserError(
        f"arm {arm}: rank {failed} of {ranks} {how_it_ended(statuses[failed])}, so the others were ended too; {folder} "
        f"has what was saved. To go on: {go_on()}"
    )


def choose_device(name: str) -> torch.device:
    """auto takes the GPU of this process' local rank where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--parallel.device cuda: this machine has no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def make_run_groups(config: TrainConfig) -> ParallelGroups:
    """Expert and data parallelism of a run; two-phase AlltoAll where the switch says so."""
    if not initialized():
        return make_groups()
    expert_size = config.parallel.expert_ranks or dist.get_world_size()
    per_node = None
    if config.switches.hierarchical and expert_size > 1:
        per_node = config.parallel.per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if per_node >= expert_size:
            per_node = 1
    return make_groups(expert_size, per_node)
