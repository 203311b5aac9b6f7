"""Measure the paper's claims at small scale: `python se_moe/reproduce.py` writes results/se_moe.json and its figures.

    python se_moe/reproduce.py                          # tier small: 3 seeds of every claim
    python se_moe/reproduce.py --claims M1 M8           # some of them
    python se_moe/reproduce.py --tier smoke             # what CI runs

The claims, with targets, sizes and budgets, are in claims.yaml. One thread a process. Every finished (claim, seed) is
kept in runs/reproduce/, so an interrupted run continues where it stopped. M9 needs DeepSpeed; without it the small tier
leaves M9 out and says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import reproduction
from common.errors import UserError, run_main
from common.files import read_object
from common.study import open_sizes
from se_moe.config import DataConfig, ModelOptions, Switches, TrainConfig
from se_moe.data import TextData
from se_moe.deepspeed_arm import INSTALL, available
from se_moe.experiments import (
    BATCHES,
    CACHE_RULES,
    Sizes,
    Study,
    alternate,
    compute_seconds,
    elastic_layouts,
    embeddings,
    exchanges,
    fused_against_per_tensor,
    median,
    merged_state,
    on_ranks,
    opened,
    replay,
    timed_steps,
    train_layout,
    zipf_trace,
)
from se_moe.homes import TieredHome
from se_moe.inference import distil, expert_usage, student_of
from se_moe.launch import start_ranks
from se_moe.model import MoELanguageModel, initialise
from se_moe.planner import FLOAT32, Machine, storage_plan
from se_moe.ring import RingOffload
from se_moe.storage import DeviceArena, Throttle


def m1(study: Study, seed: int) -> dict[str, float]:
    """Fused against per-tensor collectives."""
    return on_ranks(2, fused_against_per_tensor, study.sizes.repeats, seed)[0]


def m2(study: Study, seed: int) -> dict[str, float]:
    """Tokens a second with neither, either and both of prefetch and cache, on a drive as slow as the computation.

    The drive's speed is set so that what the arm without both moves in a step takes as long as a resident step does.
    """
    arms = {"none": (False, False), "prefetch": (True, False), "cache": (False, True), "both": (True, True)}

    def arm_config(switches: Switches, **storage: Any) -> TrainConfig:
        # Many tokens a step: the machine's own drive must be faster than the pretended one.
        return replace(study.config(seed, switches, **storage), batch=study.sizes.tier_batch)

    tokens = study.sizes.tier_batch * 32
    with opened(arm_config(Switches(tiers=False))) as resident:
        expected, seconds = timed_steps(resident, study.sizes.tier_steps)
        compute = median(seconds[1:])
    off = Switches(prefetch=False, cache=False)
    with opened(arm_config(off)) as probe:
        assert isinstance(probe.home, TieredHome)
        probe.step()
        before = probe.home.files.statistics.bytes_read + probe.home.files.statistics.bytes_written
        probe.step()
        moved = probe.home.files.statistics.bytes_read + probe.home.files.statistics.bytes_written - before
    rate = moved / compute / 1e6
    result = {"drive_mb_s": rate, "compute_seconds": compute, "losses_equal": 1.0}
    speed, hidden = {}, {}
    for name, (prefetch, cache) in arms.items():
        switches = Switches(prefetch=prefetch, cache=cache)
        with opened(arm_config(switches, read_mb_s=rate, cached_share=0.5)) as trainer:
            losses, seconds = timed_steps(trainer, study.sizes.tier_steps)
            assert isinstance(trainer.home, TieredHome)
            statistics_ = trainer.home.store.statistics
            speed[name] = tokens / median(seconds[1:])
            hidden[name] = statistics_.hidden_fraction
            if losses != expected:
                result["losses_equal"] = 0.0
            if trainer.home.cache is not None:
                result[f"hit_rate_{name}"] = trainer.home.cache.statistics.hit_rate
            result[f"fetch_seconds_{name}"] = statistics_.fetch_seconds
            result[f"wait_seconds_{name}"] = statistics_.wait_seconds
    return {
        "speedup": speed["both"] / speed["none"],
        "hidden": hidden["prefetch"],
        **result,
        "speed_resident": tokens / compute,
        **{f"speed_{name}": value for name, value in speed.items()},
        **{f"hidden_{name}": value for name, value in hidden.items()},
    }


def m3(study: Study, seed: int) -> dict[str, float]:
    """Hit rates and writes of the cache rules on recorded gates and on shifting popularity."""
    traces = {"gates": study.gate_trace(seed), "shift": zipf_trace(64, study.sizes.trace_requests, seed)}
    result: dict[str, float] = {}
    for name, trace in traces.items():
        capacity = max(2, len(set(trace)) // 2)  # as the tiers do by default
        for rule, options in CACHE_RULES.items():
            rate, writes = replay(trace, capacity, **options)
            result[f"hit_rate_{rule}_{name}"] = rate
            result[f"writes_{rule}_{name}"] = writes / len(trace)
    best = max(result["hit_rate_lfu_gates"], result["hit_rate_lru_gates"])
    return {
        "gain_under_shift": result["hit_rate_decayed_shift"] - result["hit_rate_lfu_shift"],
        "gap_on_gates": result["hit_rate_decayed_gates"] - best,
        "writes_per_request": max(result["writes_decayed_gates"], result["writes_decayed_shift"]),
        **result,
    }


def m4(study: Study, seed: int) -> dict[str, float]:
    """Equation (1) against the bytes that the tiers really held, for three models; half the memory, equal losses."""
    result: dict[str, float] = {}
    worst = 0.0
    shapes = {"a": (8, 128, 64), "b": (16, 128, 64), "c": (8, 256, 96)}
    for name, (experts, wide, hidden) in shapes.items():
        base = study.config(seed, Switches(prefetch=False), cached_share=1.0, period=0)
        model = replace(base.model, experts=experts, expert_hidden=wide, hidden=hidden)
        with opened(replace(base, model=model, batch=32)) as trainer:
            for _ in range(2):
                log = trainer.step()
            assert isinstance(trainer.home, TieredHome)
            layers = len(trainer.model.moe_layers())
            planned = storage_plan(
                trainer.dense_count, trainer.sparse_count, layers, log.alpha, Machine(1e12, 1e12, 1e12), FLOAT32
            )
            home = trainer.home
            gradients = home.store.statistics.gradient_peak_bytes
            used = len(home.cache.keys()) * home.layout.slot_bytes if home.cache is not None else 0
            measured = {
                "device": (trainer.arena.peak_bytes, planned.device_bytes),
                "host": (used + gradients, planned.host_bytes),
                "file": (home.files.live_bytes, planned.file_bytes),
            }
            result[f"alpha_{name}"] = log.alpha
        for tier, (bytes_, formula) in measured.items():
            error = abs(bytes_ / formula - 1)
            result[f"{tier}_megabytes_{name}"], result[f"{tier}_error_{name}"] = bytes_ / 1e6, error
            worst = max(worst, error)
    config = study.config(seed, Switches(tiers=False))
    with opened(config) as resident:
        expected, _ = timed_steps(resident, 4)
        half = resident.resident_bytes() / 2
        full = resident.arena.peak_bytes
    budget = study.config(seed, Switches(), device_mb=half / 1e6)
    with opened(budget) as trainer:
        losses, _ = timed_steps(trainer, 4)
        peak = trainer.arena.peak_bytes
    return {
        "largest_error": worst,
        "device_share": peak / full,
        "losses_equal": float(losses == expected),
        **result,
    }


def m5(study: Study, seed: int) -> dict[str, float]:
    """Samples a second and rank of the layouts, and the parameters that they lead to."""
    layouts = elastic_layouts()
    result: dict[str, float] = {}
    speed = {}
    for name, layout in layouts.items():
        seconds = compute_seconds(layout, study.sizes.elastic_repeats, seed)
        speed[name] = sum(BATCHES) / layout.ranks / max(seconds)
        result[f"samples_per_second_{name}"] = speed[name]
        result[f"utilisation_{name}"] = layout.allocation.utilisation
    with tempfile.TemporaryDirectory(dir=study.folder) as work:
        states = {}
        for name, layout in layouts.items():
            on_ranks(layout.ranks, train_layout, name, study.sizes.elastic_steps, seed, work)
            states[name] = merged_state(Path(work), name, layout.ranks)
    first = states["one_each"]
    difference = max(
        float((state[key] - first[key]).abs().max()) for state in states.values() for key in first.keys() & state.keys()
    )
    same_names = all(state.keys() == first.keys() for state in states.values())
    return {
        "gain": speed["balanced"] / speed["one_each"] - 1,
        "parameter_difference": difference if same_names else float("inf"),
        **result,
    }


def m6(study: Study, seed: int) -> dict[str, float]:
    """Both exchanges on 2 x 2 and 2 x 3 ranks."""
    result: dict[str, float] = {}
    for per_node in (2, 3):
        per_rank = on_ranks(2 * per_node, exchanges, 2, per_node, study.sizes.repeats, seed, 0.002)
        flat, two = (max(r[f"{k}_seconds"] for r in per_rank) for k in ("flat", "two_phase"))
        messages = [sum(r[f"{k}_messages"] for r in per_rank) for k in ("flat", "two_phase")]
        name = f"2x{per_node}"
        result |= {
            f"speedup_{name}": flat / two,
            f"fewer_messages_{name}": messages[0] / messages[1] / per_node,
            f"equal_{name}": min(r["equal"] for r in per_rank),
            f"flat_ms_{name}": 1000 * flat,
            f"two_phase_ms_{name}": 1000 * two,
        }
    return {
        "speedup": min(result["speedup_2x2"], result["speedup_2x3"]),
        "fewer_messages": min(result["fewer_messages_2x2"], result["fewer_messages_2x3"]),
        "equal": min(result["equal_2x2"], result["equal_2x3"]),
        **result,
    }


def m7(study: Study, seed: int) -> dict[str, float]:
    """Two ranks, hidden 64."""
    per_rank = on_ranks(
        2, embeddings, study.sizes.vocabulary, 64, study.sizes.embedding_tokens, study.sizes.repeats, seed
    )
    worst = {key: max(r[key] for r in per_rank) for key in per_rank[0]}
    return {
        "speedup": worst["cpu_replicated"] / worst["cpu_columns"],
        "speedup_wall": worst["wall_replicated"] / worst["wall_columns"],
        "speedup_rows": worst["cpu_replicated"] / worst["cpu_rows"],
        "memory_share": worst["bytes_columns"] / worst["bytes_replicated"],
        "loss_difference": worst["loss_difference"],
        "milliseconds_replicated": 1000 * worst["wall_replicated"],
        "milliseconds_columns": 1000 * worst["wall_columns"],
    }


def m8(study: Study, seed: int) -> dict[str, float]:
    """A pass through 12 layers: resident, offloaded one after the other, rings of 2 and 4; copy = half the compute."""
    torch.manual_seed(seed)
    layers, repeats = 12, study.sizes.repeats
    d, f = study.sizes.ring_hidden, 4 * study.sizes.ring_hidden
    host = [{"fc1": torch.randn(f, d) / d**0.5, "fc2": torch.randn(d, f) / f**0.5} for _ in range(layers)]
    x_ND = torch.randn(study.sizes.ring_rows, d)

    def forward(ring: RingOffload) -> Tensor:
        y_ND = x_ND
        with torch.no_grad():
            for index in range(layers):
                with ring.layer(index) as p:
                    y_ND = y_ND + F.linear(F.gelu(F.linear(y_ND, p["fc1"])), p["fc2"])
        return y_ND

    layer_bytes = sum(t.nbytes for t in host[0].values())
    started = DeviceArena(2 * layers * layer_bytes)
    with RingOffload(host, layers, started) as resident:
        expected = forward(resident)
        compute = alternate({"resident": lambda: forward(resident)}, repeats)["resident"][0] / layers
    throttle = {"bytes_per_second": layer_bytes / (0.5 * compute)}
    specs = {"resident": (layers, True), "serial": (1, False), "ring2": (2, True), "ring4": (4, True)}
    arenas = {name: DeviceArena(2 * layers * layer_bytes) for name in specs}
    rings = {
        name: RingOffload(host, k, arenas[name], overlap, None if k == layers else Throttle(**throttle))
        for name, (k, overlap) in specs.items()
    }
    try:
        equal = all(torch.equal(forward(ring), expected) for ring in rings.values())
        arms = {name: (lambda ring=ring: forward(ring)) for name, ring in rings.items()}  # type: ignore[misc]
        wall = {name: t[0] for name, t in alternate(arms, repeats).items()}
    finally:
        for ring in rings.values():
            ring.close()
    exposed = {name: wall[name] - wall["resident"] for name in ("ring2", "ring4")}
    serial = wall["serial"] - wall["resident"]
    return {
        "time_ratio": wall["ring4"] / wall["resident"],
        "hidden": 1 - exposed["ring4"] / serial,
        "device_share": arenas["ring4"].peak_bytes / arenas["resident"].peak_bytes,
        "equal": float(equal),
        "time_ratio_ring2": wall["ring2"] / wall["resident"],
        "time_ratio_serial": wall["serial"] / wall["resident"],
        "hidden_ring2": 1 - exposed["ring2"] / serial,
        "device_share_ring2": arenas["ring2"].peak_bytes / arenas["resident"].peak_bytes,
        "compute_ms": 1000 * compute,
    }


def m9(study: Study, seed: int) -> dict[str, float]:
    """The same model by ours (experts resident) and by DeepSpeed, ZeRO 0 and 2, on two ranks; arms take turns.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if not available():
        raise UserError(f"M9 compares with DeepSpeed. {INSTALL}")
    found: dict[str, list[dict[str, Any]]] = {"resident": [], "zero0": [], "zero2": []}
    for turn in range(3 if study.sizes.deepspeed_steps >= 50 else 1):
        for name, measured in found.items():
            arm = "resident" if name == "resident" else "deepspeed"
            run = TrainConfig(
                run_dir=str(study.workplace(f"M9-{name}-seed{seed}-{turn}", study.settings)),
                seed=seed,
                steps=study.sizes.deepspeed_steps,
                arms=[arm],
                log_every=10**6,
                checkpoint_every=10**6,
                data=DataConfig(tasks=[study.sizes.corpus]),
                # With a small vocabulary and many tokens a split table costs more than it saves; slices of the dense
                # parameters stand against ZeRO's.
                switches=Switches(partition=False, shard_dense=True),
            )
            run.parallel.zero_stage = 0 if name == "zero0" else 2
            file = Path(run.run_dir) / arm / "metrics.json"
            if not file.is_file():
                start_ranks(run, arm)
            measured.append(read_object(file))
    cpu = {name: median(m["cpu_seconds_per_1000_tokens"] for m in rows) for name, rows in found.items()}
    speed = {name: median(m["tokens_per_second"] for m in rows) for name, rows in found.items()}
    peak = {name: median(m["peak_bytes"] for m in rows) for name, rows in found.items()}
    losses = {name: rows[0]["losses"] for name, rows in found.items()}

    def apart(a: str, b: str, steps: int | None = None) -> float:
        return max(abs(x - y) for x, y in zip(losses[a][:steps], losses[b][:steps], strict=True))

    return {
        "cpu_ratio": cpu["resident"] / min(cpu["zero0"], cpu["zero2"]),
        "memory_ratio": peak["resident"] / min(peak["zero0"], peak["zero2"]),
        "loss_difference": max(apart("resident", "zero0"), apart("resident", "zero2")),
        "loss_difference_first_10_steps": max(apart("resident", "zero0", 10), apart("resident", "zero2", 10)),
        "loss_difference_zero0_zero2": apart("zero0", "zero2"),
        "throughput_gain": speed["resident"] / max(speed["zero0"], speed["zero2"]) - 1,
        **{f"cpu_{name}": value for name, value in cpu.items()},
        **{f"tokens_per_second_{name}": value for name, value in speed.items()},
        **{f"peak_megabytes_{name}": value / 1e6 for name, value in peak.items()},
    }


def m10(study: Study, seed: int) -> dict[str, float]:
    """A teacher of 8 experts, a student of 2 taught by it, and the same student from scratch, at equal steps."""
    options = ModelOptions(hidden=64, layers=4, heads=4, dense_hidden=128, experts=8, expert_hidden=128, top_k=1)
    data = TextData([study.sizes.corpus], [], 600, 32)
    config = TrainConfig(seed=seed, model=options, data=DataConfig(sequence=32, vocabulary=600))

    def batches(first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (data.batch(seed, step, 32) for step in range(first, first + steps))

    def held_out(model: MoELanguageModel) -> float:
        ids_NL, targets_NL = data.held_out(128)
        with torch.no_grad():
            return float(model.eval()(ids_NL, targets_NL).lm_loss)

    def fresh(experts: int, number: int) -> MoELanguageModel:
        small = replace(config, model=replace(options, experts=experts))
        model = MoELanguageModel(small.network(data.vocabulary))
        initialise(model, seed * 10 + number)
        return model

    def arm(
        name: str,
        start: Callable[[], MoELanguageModel],
        teacher: MoELanguageModel,
        first: int,
        steps: int,
        weight: float = 0.5,
    ) -> MoELanguageModel:
        def train(network: MoELanguageModel, folder: Path) -> tuple[MoELanguageModel, dict[str, Any]]:
            torch.manual_seed(seed)
            distil(teacher, network, batches(first, steps), weight=weight, checkpoint=folder / "last.ckpt")
            return network, {"steps": steps}

        return study.arm(f"M10-{name}", seed, start, train, study.settings).network

    teacher = arm("teacher", lambda: fresh(8, 0), fresh(8, 0), 0, study.sizes.teacher_steps, weight=0.0)
    usage_ME = expert_usage(teacher, [ids for ids, _ in batches(10**6, 4)])
    rest = (teacher, 2 * 10**6, study.sizes.student_steps)
    taught = arm("student", lambda: student_of(teacher, 2, usage_ME), *rest)
    scratch = arm("scratch", lambda: fresh(2, 1), *rest, weight=0.0)
    taught_from_scratch = arm("student_random_start", lambda: fresh(2, 1), *rest)
    losses = {
        "teacher": held_out(teacher),
        "student": held_out(taught),
        "scratch": held_out(scratch),
        "student_random_start": held_out(taught_from_scratch),
    }
    gap = losses["scratch"] - losses["teacher"]
    return {
        "gap_closed": (losses["scratch"] - losses["student"]) / gap,
        "gap": gap,
        "gap_closed_random_start": (losses["scratch"] - losses["student_random_start"]) / gap,
        **{f"loss_{name}": value for name, value in losses.items()},
    }


def figures(study: Study, ledger: Path) -> None:
    from se_moe.figures import draw_figures

    draw_figures(ledger, study.figures)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "se_moe",
        __doc__,
        (m1, m2, m3, m4, m5, m6, m7, m8, m9, m10),
        lambda given: Study(open_sizes(Sizes, "se_moe", given.tier, given.rung), given.folder),
        figures=figures,
        without={} if available() else {"M9": INSTALL},
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
