"""Golden cases of the storage formulas, the cache rules, task allocation and the ring's completion times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from se_moe.cache import SparseCache
from se_moe.elastic import allocate
from se_moe.planner import Machine, storage_plan
from se_moe.ring import completion_times
from tests.golden_case import Case, Check, assert_close


def check_storage(case: Case) -> None:
    (rows,) = case.group("in").values()
    (expected,) = case.group("out").values()
    actual = []
    for dense, sparse, layers, alpha, devices, device, host, file in rows.double().tolist():
        p = storage_plan(dense, sparse, layers, alpha, Machine(device, host, file, int(devices)))
        actual.append(
            [p.device_bytes, p.host_bytes, p.file_bytes, float(p.fits_device), float(p.fits_host), float(p.fits_file)]
        )
    ours = torch.tensor(actual, dtype=torch.float64)
    assert torch.equal(ours[:, 3:], expected[:, 3:].double()), f"{case.stem}: which tiers fit"
    assert_close(ours[:, :3] / expected[:, :3].double(), torch.ones_like(ours[:, :3]), f"{case.stem} bytes", 1e-6)


def run_cache(case: Case, rule: str) -> dict[str, Tensor]:
    config = case.config
    requests = [int(r) for r in case.tensors["in/requests"].tolist()]
    cache: SparseCache[int] = SparseCache(
        config["capacity"],
        rule,
        threshold=config["threshold"],
        beta=config["beta"],
        period=config["K"],
        write_through_evictions=True,
    )
    decisions = [cache.request(r) for r in requests]
    return {
        "hit": torch.tensor([float(d.hit) for d in decisions]),
        "bypassed": torch.tensor([float(d.bypass) for d in decisions]),
        "victim": torch.tensor([-1.0 if d.victim is None else float(d.victim) for d in decisions]),
        "final_hits": torch.tensor([cache.hits_of(p) if p in cache else -1.0 for p in range(config["num_params"])]),
        "ssd_reads_writes": torch.tensor([float(cache.statistics.reads), float(cache.statistics.writes)]),
    }


def check_cache(case: Case) -> None:
    rules = {"text": "text", "pseudocode": "pseudocode", "reference_lru": "lru", "reference_lfu": "lfu"}
    runs: dict[str, dict[str, Tensor]] = {}
    for name, expected in case.group("out").items():
        reading, what = name.split("/")
        if reading not in runs:
            runs[reading] = run_cache(case, rules[reading])
        actual = runs[reading][what]
        if what == "final_hits":
            assert_close(actual, expected, f"{case.stem} {name}", 1e-6)
        else:
            assert torch.equal(actual, expected.float()), f"{case.stem} {name}"


def check_allocation(case: Case) -> None:
    given, out = case.group("in"), case.group("out")
    numbers = sorted({int(name.split(".")[0]) for name in given})
    assert numbers, f"{case.stem}: no cases"
    for n in numbers:
        batches = [int(b) for b in given[f"{n}.task_batch"].tolist()]
        ranks = int(given[f"{n}.ranks"])
        allocation = allocate(batches, ranks)
        assert allocation.makespan == int(out[f"{n}.best_makespan"]), f"{case.stem} {n}: {allocation}"
        utilisation = torch.tensor([allocation.utilisation])
        assert_close(utilisation, out[f"{n}.utilisation"], f"{case.stem} {n} utilisation", 1e-6)
        # The recorded assignment is one of several; ours must explain its own makespan.
        loads = [sum(share.values()) for share in allocation.shares]
        assert max(loads) == allocation.makespan and len(loads) == ranks
        for task, batch in enumerate(batches):
            assert sum(share.get(task, 0) for share in allocation.shares) == batch
        if ranks >= len(batches):
            assert all(len(share) == 1 for share in allocation.shares)
            widest = [math.ceil(batch / len(allocation.ranks_of(task))) for task, batch in enumerate(batches)]
            assert max(widest) == allocation.makespan


def check_ring(case: Case) -> None:
    (rows,) = case.group("in").values()
    (expected,) = case.group("out").values()
    actual = []
    for layers, sections, compute, copy, preloaded in rows.double().tolist():
        times = completion_times(int(layers), int(sections), compute, copy, preloaded=bool(preloaded))
        actual.append([times.total, times.compute, times.serial, float(times.copies_during_pass)])
    assert_close(torch.tensor(actual, dtype=torch.float64), expected.double(), case.stem, 1e-6)


def _kind(stem: str, run) -> Check:  # type: ignore[no-untyped-def]
    """Cases whose stem starts with `stem` and that were evaluated from the paper's text."""
    return Check(stem, lambda case: case.stem.startswith(stem) and "paper text" in case.source, run)


CHECKS = [
    _kind("storage_", check_storage),
    _kind("cache_", check_cache),
    _kind("elastic_", check_allocation),
    _kind("ring_", check_ring),
]
