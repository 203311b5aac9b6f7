"""The processes of a run: started here or by torchrun, how they meet, their groups and devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError
from se_moe.communication import ParallelGroups, initialized, make_groups
from se_moe.config import TrainConfig


def start_ranks(config: TrainConfig, arm: str) -> None:
    """Run one arm of the table on `parallel.ranks` processes of this machine.

    Raises:
        UserError: a process failed (it has said why).
    """
    ranks = config.parallel.ranks
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
                "TOKENIZERS_PARALLELISM": "false",
            }
            if config.threads:
                environment["OMP_NUM_THREADS"] = str(config.threads)
            # Every rank would say the same; the first one speaks, and errors of the others are short.
            command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", str(options)]
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


def start_process_group(device: torch.device, seconds: float = 600.0) -> None:
    """Join the other ranks, if there are any: RANK and WORLD_SIZE say so, as torchrun sets them.

    `SE_MOE_RENDEZVOUS` names a file through which ranks of one machine meet without a port. Workers that torchrun
    starts again meet under the number of their attempt: its store still holds the addresses of those that died.
    """
    if initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank, ranks, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = os.environ.get("SE_MOE_RENDEZVOUS")
    if meeting:
        dist.init_process_group(backend, f"file://{meeting}", timeout=timeout, rank=rank, world_size=ranks)
        return
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not hosted,
        timeout=timeout,
        multi_tenant=not hosted,
    )
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, timeout=timeout, rank=rank, world_size=ranks)


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
