"""SE-MoE's trainer beside DeepSpeed and the naive way, and every switch off one at a time.

    python -m benchmarks.se_moe                   # writes results/bench_se_moe.json and results/ablation_se_moe.txt
    python -m benchmarks.se_moe --parts ablation --steps 20 --rounds 1
    python -m benchmarks.se_moe --device cuda     # one GPU: tiers against resident, ring offload, DeepSpeed

Every arm is a run of `se_moe/train.py` with the same model, initial weights and batches; the arms take turns, round
after round, and a row holds medians over rounds. CPU seconds are summed over the ranks; peak bytes are tensors at the
highest point of one step, host memory of the expert cache left out. Without DeepSpeed its rows are left out.
32 experts are the trainer's default model; with 8 DeepSpeed's dispatch, whose cost grows with experts times the fullest
one's tokens, weighs least. About 25 minutes on 2 idle cores.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import read_object, write_atomically
from common.ledger import bench_row, write_rows
from common.options import Count, Range
from common.paths import RESULTS
from se_moe.config import DataConfig, ModelOptions, Switches, TrainConfig
from se_moe.deepspeed_arm import INSTALL, available
from se_moe.launch import start_ranks
from se_moe.ring import RingOffload
from se_moe.storage import DeviceArena

PARTS = ("deepspeed", "ablation", "ring")
ABLATED = ("prefetch", "cache", "fusion", "overlap", "partition", "hierarchical")
# Name, metric, scale, unit and target; the paper: a third more tokens a second, 18 % less memory.
BESIDE_PEERS = (
    ("CPU seconds per 1,000 tokens", "cpu_seconds_per_1000_tokens", 1, "s", 1 / 0.75),
    ("training throughput", "tokens_per_second", 1, "tokens/s", None),
    ("peak tensor memory of a rank", "peak_bytes", 2**20, "MiB", 1 / 0.82),
)


class Arm(NamedTuple):
    """A run: which of train.py's arms, with which switches or ZeRO stage."""

    arm: str
    switches: Switches | None = None
    zero_stage: Literal[0, 2] = 2


def deepspeed_arms() -> dict[str, Arm]:
    """Ours with resident experts, DeepSpeed's two stages, and the naive way.

    Tokens outnumber the small vocabulary, so the table stays whole; slices of the dense parameters
    stand against ZeRO's.
    """
    arms = {"resident": Arm("resident", Switches(partition=False, shard_dense=True)), "naive": Arm("naive")}
    if available():
        arms |= {"zero0": Arm("deepspeed", zero_stage=0), "zero2": Arm("deepspeed", zero_stage=2)}
    return arms


def ablation_arms() -> dict[str, Arm]:
    """Everything on, each switch off by itself, everything off but the tiers, everything resident."""
    on = Switches()
    arms = {"everything on": Arm("ours", on)}
    arms |= {f"without {name}": Arm("ours", replace(on, **{name: False})) for name in ABLATED}
    none = replace(Switches.naive(), tiers=True)
    return arms | {"tiers alone": Arm("ours", none), "experts resident": Arm("resident", on)}


def configuration(arm: Arm, folder: Path, steps: int, device: str, experts: int) -> TrainConfig:
    """The run of an arm: 4 layers of hidden 128, 2,048 tokens a step (a larger model on a GPU)."""
    gpu = device == "cuda"
    model = ModelOptions(experts=experts)
    if gpu:
        model = ModelOptions(
            hidden=1024, layers=8, heads=16, dense_hidden=4096, experts=experts, expert_hidden=4096, moe_every=2
        )
    config = TrainConfig(
        run_dir=str(folder),
        arms=[arm.arm],
        steps=steps,
        batch=64 if gpu else 32,
        checkpoint_every=10**6,
        log_every=10**6,
        eval_sequences=32,
        data=DataConfig(sequence=256 if gpu else 64),
        model=model,
        switches=arm.switches or Switches(),
    )
    config.parallel.ranks = 1 if gpu else 2
    config.parallel.device = "cuda" if gpu else "cpu"
    config.parallel.zero_stage = arm.zero_stage
    return config


def measure(arms: Mapping[str, Arm], steps: int, rounds: int, device: str, experts: int) -> dict[str, dict[str, Any]]:
    """Median metrics of every arm over rounds in which each has its turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as work:
        for turn in range(rounds):
            for index, (name, arm) in enumerate(arms.items()):
                config = configuration(arm, Path(work) / f"{turn}-{index}", steps, device, experts)
                start_ranks(config, arm.arm)
                file = Path(config.run_dir) / arm.arm / "metrics.json"
                found[name].append(read_object(file))
                print(f"round {turn + 1}: {name} {found[name][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    keys = ("tokens_per_second", "cpu_seconds_per_1000_tokens", "peak_bytes", "loss")
    return {
        name: {key: statistics.median(m[key] for m in rows) for key in keys} | {"losses": rows[0]["losses"]}
        for name, rows in found.items()
    }


def deepspeed_rows(measured: Mapping[str, Mapping[str, Any]], size: str) -> list[dict[str, Any]]:
    """Ours beside each peer: CPU time, throughput, memory and the loss curve."""
    rows = []
    ours = measured["resident"]
    peers = {"zero0": "DeepSpeed ZeRO-0", "zero2": "DeepSpeed ZeRO-2", "naive": "every switch off"}
    for key, peer in peers.items():
        if key not in measured:
            continue
        theirs, against = measured[key], f"against {peer} ({size})"
        for name, metric, scale, unit, target in BESIDE_PEERS:
            of_ours, of_theirs = ours[metric] / scale, theirs[metric] / scale
            target, higher = None if key == "naive" else target, metric == "tokens_per_second"
            name = f"{name}, experts resident, {against}"
            rows.append(bench_row(name, of_ours, of_theirs, unit, target=target, higher_is_better=higher))
        apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"]))
        row = bench_row(f"quality: mean loss of the last tenth, {against}", ours["loss"], theirs["loss"], "nats",
                        target=0.999, higher_is_better=False)  # fmt: skip
        rows.append({**row, "note": f"largest difference of any step's loss: {apart:.2e}"})
    return rows


def ablation_table(measured: Mapping[str, Mapping[str, Any]], size: str) -> str:
    """The cross-wise comparison as text: throughput, CPU time and peak bytes of every arm."""
    head = f"{'arm':<24}{'tokens/s':>10}{'CPU-s/1000 tok':>16}{'peak MiB a rank':>17}{'loss':>10}"
    lines = [size, head, "-" * len(head)]
    for name, m in measured.items():
        lines.append(
            f"{name:<24}{m['tokens_per_second']:>10,.0f}{m['cpu_seconds_per_1000_tokens']:>16.3f}"
            f"{m['peak_bytes'] / 2**20:>17.1f}{m['loss']:>10.5f}"
        )
    return "\n".join(lines) + "\n"


def ablation_rows(measured: Mapping[str, Mapping[str, Any]], size: str) -> list[dict[str, Any]]:
    """Everything on beside each arm with less."""
    full = measured["everything on"]
    return [
        bench_row(
            f"training throughput, everything on against {name} ({size})",
            full["tokens_per_second"],
            m["tokens_per_second"],
            "tokens/s",
        )
        for name, m in measured.items()
        if name != "everything on"
    ]


def ring_rows(device: str, rounds: int) -> list[dict[str, Any]]:
    """A pass through 12 expert layers on this machine's own link: resident, serial offload, rings of 2 and 4."""
    from se_moe.experiments import alternate

    gpu = device == "cuda"
    layers, hidden, rows = 12, 4096 if gpu else 256, 8192 if gpu else 1024
    kind = torch.bfloat16 if gpu else torch.float32
    host = [
        {
            "fc1": torch.randn(4 * hidden, hidden, dtype=kind) / hidden**0.5,
            "fc2": torch.randn(hidden, 4 * hidden, dtype=kind) / (4 * hidden) ** 0.5,
        }
        for _ in range(layers)
    ]
    if gpu:
        host = [{name: tensor.pin_memory() for name, tensor in layer.items()} for layer in host]
    x_ND = torch.randn(rows, hidden, dtype=kind).to(device)

    def forward(ring: RingOffload) -> None:
        y_ND = x_ND
        with torch.no_grad():
            for index in range(layers):
                with ring.layer(index) as p:
                    y_ND = y_ND + F.linear(F.gelu(F.linear(y_ND, p["fc1"])), p["fc2"])
        if gpu:
            torch.cuda.synchronize()

    size = sum(t.nbytes for t in host[0].values())
    specs = {"resident": (layers, True), "serial": (1, False), "K = 2": (2, True), "K = 4": (4, True)}
    arenas = {name: DeviceArena((k + 1) * size, device) for name, (k, _) in specs.items()}
    rings = {name: RingOffload(host, k, arenas[name], overlap) for name, (k, overlap) in specs.items()}
    try:
        arms = {name: (lambda ring=ring: forward(ring)) for name, ring in rings.items()}  # type: ignore[misc]
        wall = {name: times[0] for name, times in alternate(arms, 3 * rounds).items()}
    finally:
        for ring in rings.values():
            ring.close()
    shape = f"12 layers of {size / 1e6:.0f} MB, {rows:,} rows"
    return [
        bench_row(
            f"a pass through ring offload, {name}, against {peer} ({shape})", 1 / wall[name], 1 / wall[peer], "passes/s"
        )
        for name in ("K = 2", "K = 4")
        for peer in ("serial", "resident")
    ]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--steps", type=Annotated[int, Range(3)], default=50, help="of every run")
    parser.add_argument("--rounds", type=Count, default=3, help="turns of each arm")
    parser.add_argument(
        "--experts", type=Count, nargs="+", default=[32, 8], help="beside DeepSpeed, a model each; the first is ablated"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ranks compute")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_se_moe.json", help="JSON file that the rows go to"
    )
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    where = "one GPU" if options.device == "cuda" else "2 ranks"
    sizes = {count: f"{count} experts, {options.steps} steps, {where}" for count in options.experts}
    rows: list[dict[str, Any]] = []
    if "deepspeed" in options.parts:
        if not available():
            print(f"without DeepSpeed: {INSTALL}", flush=True)
        for count, size in sizes.items():
            measured = measure(deepspeed_arms(), options.steps, options.rounds, options.device, count)
            rows += deepspeed_rows(measured, size)
            write_rows(options.output, rows)
    if "ablation" in options.parts:
        count, size = next(iter(sizes.items()))
        measured = measure(ablation_arms(), options.steps, options.rounds, options.device, count)
        text = ablation_table(measured, size)
        path = options.output.parent / "ablation_se_moe.txt"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(text)
        rows += ablation_rows(measured, size)
        write_rows(options.output, rows)
    if "ring" in options.parts:
        torch.set_num_threads(1)
        rows += ring_rows(options.device, options.rounds)
        write_rows(options.output, rows)
    return rows


if __name__ == "__main__":
    run_main(main)
