"""Where the time of our small steps goes on a CPU: products, attention, normalisation, copies, optimiser, the rest.

    python -m benchmarks.profile                     # writes results/profile.json and benchmarks/PROFILE.md; minutes
    python -m benchmarks.profile --papers pixart ldm

Each piece of work is the one that the paper's benchmark measures as ours, in float32 and, where the processor has it,
in bf16; torch's profiler counts the time of every operator without what it calls. `dispatch` is the rest of the wall
time: Python, autograd's bookkeeping, waiting. The record of a machine keeps its first numbers beside the latest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.arms import Step, mixed, training_step
from common.cli import Parser
from common.cpu import tune_allocator
from common.errors import run_main
from common.files import read_object, write_atomically, write_json
from common.ledger import commit, hardware
from common.options import Count, Threads
from common.paths import REPOSITORY, RESULTS
from common.precision import bf16_possible

# The first group one of whose words is in an operator's name takes it.
GROUPS = {
    "attention": ("scaled_dot_product", "_flash_attention"),
    "products": ("mm", "linear", "convolution", "conv2d", "conv3d", "einsum", "matmul"),
    "normalisation": ("norm", "batch_norm", "rsqrt", "var_mean"),
    "copies": (
        "copy_",
        "clone",
        "_to_copy",
        "cat",
        "stack",
        "index",
        "gather",
        "scatter",
        "fill_",
        "zero_",
        "contiguous",
    ),
    "activations": ("gelu", "silu", "relu", "softmax", "sigmoid", "tanh", "exp", "dropout"),
    "elementwise": (
        "mul",
        "add",
        "sub",
        "div",
        "neg",
        "pow",
        "sqrt",
        "where",
        "clamp",
        "lerp",
        "foreach",
        "sum",
        "mean",
    ),
}
COLUMNS = (
    "attention",
    "products",
    "normalisation",
    "copies",
    "activations",
    "elementwise",
    "optimiser",
    "other",
    "dispatch",
)
WARM_UP, STEPS = 3, 4

Make = Callable[[bool, Path], Step]  # bf16, a folder to work in -> the step


def _pixart(kind: str) -> Make:
    def make(bf16: bool, folder: Path) -> Step:
        from benchmarks import pixart

        return pixart.make_step(
            pixart.Arm("ours", kind, "small16", "cpu", bf16, 4 if kind == "sampling" else 0), folder
        )

    return make


def _ldm_training(bf16: bool, folder: Path) -> Step:
    from benchmarks import ldm

    return ldm.our_core(ldm.configuration("emoji64"), "cpu", bf16)


def _ldm_sampling(bf16: bool, folder: Path) -> Step:
    from benchmarks import ldm

    config = ldm.configuration("emoji64")
    ldm.prepare(config, folder)
    return ldm.our_sampling(config, ldm.Arm("our sampling", "emoji64", "cpu", bf16, 1), folder, 20)


def _instaflow_sampling(bf16: bool, folder: Path) -> Step:
    from benchmarks import instaflow
    from common.teacher import Teacher

    pipeline = instaflow.student_pipeline(Teacher.load(instaflow.TEACHER), None, torch.float32)

    @torch.inference_mode()
    def step(index: int) -> None:
        with mixed("cpu", bf16):
            pipeline(instaflow.PROMPTS[0])

    return step


def _electra_training(bf16: bool, folder: Path) -> Step:
    from benchmarks import electra

    arm = electra.Arm("ours", "small", "full", "cpu", bf16)
    network = electra.build(arm.size)
    batches = electra.our_batches(arm.size, arm.rows, arm.rows_of_a_step)

    def loss_of(index: int) -> torch.Tensor:
        given = batches[index % 4]
        with mixed("cpu", bf16):
            return network(given.batch, given.draws).total

    return training_step(network, loss_of, electra.LEARNING_RATE, 0.01, fused=True)


def _pc_darts_search(bf16: bool, folder: Path) -> Step:
    from benchmarks import pc_darts

    return pc_darts.make_step(pc_darts.Arm("fused", "small", "cpu"))


def _se_moe_training(bf16: bool, folder: Path) -> Step:
    from benchmarks import se_moe
    from se_moe.model import MoELanguageModel

    arm = se_moe.deepspeed_arms()["resident"]
    config = se_moe.configuration(arm, folder, 1, "cpu", 32)
    torch.manual_seed(0)
    model = MoELanguageModel(config.network(1000))
    ids = torch.randint(1000, (config.batch // config.parallel.ranks, config.data.sequence + 1))

    def loss_of(index: int) -> torch.Tensor:
        with mixed("cpu", bf16):
            return model(ids[:, :-1], ids[:, 1:]).loss

    return training_step(model, loss_of, 1e-3, 0.01, fused=True)


def _ours(module: str, *given: Any) -> Make:
    """`module.ours(module.Arm("ours", *given))` in the precision."""

    def make(bf16: bool, folder: Path) -> Step:
        from importlib import import_module

        bench = import_module(f"benchmarks.{module}")
        return bench.ours(replace(bench.Arm("ours", *given, "cpu"), bf16=bf16))

    return make


def _eeea_net(bf16: bool, folder: Path) -> Step:
    from benchmarks import eeea_net

    return eeea_net.make_step(eeea_net.Arm("ours", "small", "cpu"))


def _scenesplat(part: str) -> Make:
    def make(bf16: bool, folder: Path) -> Step:
        from benchmarks import scenesplat

        return scenesplat.ARMS["ours", part](scenesplat.Arm("ours", part, "cpu", scenesplat.PARTS[part][0]))

    return make


WORKS: dict[tuple[str, str], Make] = {
    ("pixart", "training step, 256 tokens"): _pixart("training"),
    ("pixart", "20 guided sampling steps, batch 4"): _pixart("sampling"),
    ("instaflow", "one step, caption to image"): _instaflow_sampling,
    ("ldm", "training step of the U-Net, emoji64"): _ldm_training,
    ("ldm", "20 guided DDIM steps, batch 1"): _ldm_sampling,
    ("hipa", "training step of the adaptors"): _ours("hipa", "shapes32"),
    ("slam", "training step of the student"): _ours("slam", "shapes32"),
    ("lightgen", "training step"): _ours("lightgen", "small"),
    ("instella_t2i", "training step of the tokenizer"): _ours("instella_t2i", "small"),
    ("instella_t2i", "training step of the denoiser"): _ours("instella_generators", "small"),
    ("scenesplat", "forward and backward of a picture"): _scenesplat("render"),
    ("scenesplat", "forward pass of a scene"): _scenesplat("forward"),
    ("eeea_net", "a network trained for the search"): _eeea_net,
    ("pc_darts", "search step"): _pc_darts_search,
    ("eagan", "step of the search"): _ours("eagan", "small", "search"),
    ("electra", "pre-training step"): _electra_training,
    ("se_moe", "training step, one rank's batch"): _se_moe_training,
}
FLOAT32_ONLY = ("pc_darts", "eeea_net", "scenesplat")


def group_of(event: Any) -> str:
    """The group of an operator; everything below `Optimizer.step` is the optimiser's."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "optimiser"
        above = above.cpu_parent
    name = event.name.removeprefix("aten::").lower()
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "other")


def measured(step: Step) -> dict[str, float]:
    """Milliseconds of a step, and the share of each column of `COLUMNS` in it."""
    for index in range(WARM_UP):
        step(index)
    times = []
    for index in range(STEPS):
        started = time.perf_counter()
        step(WARM_UP + index)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for index in range(STEPS):
            step(WARM_UP + STEPS + index)
    wall = (time.perf_counter() - started) * 1e6
    spent = dict.fromkeys(COLUMNS, 0.0)
    for event in record.events():
        if event.name.startswith(("aten::", "mkldnn", "torch_ipex")):
            spent[group_of(event)] += event.self_cpu_time_total
    spent["dispatch"] = max(0.0, wall - sum(spent.values()))
    whole = sum(spent.values())
    return {"milliseconds": 1e3 * min(times)} | {name: microseconds / whole for name, microseconds in spent.items()}


def rendered(records: Sequence[Mapping[str, Any]]) -> str:
    """PROFILE.md."""
    lines = [
        "# Where the time of a step goes",
        "",
        "Written by `python -m benchmarks.profile`. Shares of the wall time under torch's profiler, which makes short",
        "operators look longer; the milliseconds are the fastest step without it. Where a row was measured again, the",
        "machine's first numbers stand in brackets.",
    ]
    for machine in dict.fromkeys(record["hardware"] for record in records):
        lines += ["", f"## {machine}", "", "| paper | work | precision | ms | " + " | ".join(COLUMNS) + " |"]
        lines.append("|---|---|---|---:|" + "---:|" * len(COLUMNS))
        for record in records:
            if record["hardware"] != machine:
                continue
            first, now = record["first"], record["latest"]
            again = first["commit"] != now["commit"]

            def cell(key: str, text: Callable[[float], str]) -> str:
                shown = text(now[key])  # noqa: B023
                return f"{shown} ({text(first[key])})" if again else shown  # noqa: B023

            cells = [
                cell("milliseconds", lambda ms: f"{ms:.1f}"),
                *(cell(name, lambda x: f"{x:.0%}") for name in COLUMNS),
            ]
            lines.append(
                f"| {record['paper']} | {record['work']} | {record['precision']} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines) + "\n"


def merged(
    old: Sequence[Mapping[str, Any]], new: Mapping[str, Any], numbers: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The records with one that is new, or measured again; in the order of `WORKS`, machine by machine."""
    kept = [dict(record) for record in old]
    same = [record for record in kept if all(record[key] == value for key, value in new.items())]
    for record in same:
        record["latest"] = dict(numbers)
    if not same:
        kept.append({**new, "first": dict(numbers), "latest": dict(numbers)})
    order = [(paper, work) for paper, work in WORKS]

    def place(record: Mapping[str, Any]) -> tuple[str, int, str]:
        key = (record["paper"], record["work"])
        return record["hardware"], order.index(key) if key in order else len(order), record["precision"]

    return sorted(kept, key=place)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    papers = list(dict.fromkeys(paper for paper, _ in WORKS))
    parser.add_argument("--papers", nargs="+", choices=papers, default=papers, help="whose work is profiled")
    parser.add_argument("--threads", type=Threads, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "profile.json", help="JSON file that the records go to"
    )
    parser.add_argument("--page", type=Path, default=REPOSITORY / "benchmarks" / "PROFILE.md", help="the table")
    parser.add_argument("--rounds", type=Count, default=1, help="the fastest of so many is kept")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    tune_allocator()
    precisions = [True, False] if bf16_possible("cpu") else [False]
    for (paper, work), make in WORKS.items():
        if paper not in options.papers:
            continue
        for bf16 in precisions if paper not in FLOAT32_ONLY else [False]:
            with tempfile.TemporaryDirectory() as folder:
                step = make(bf16, Path(folder))
                numbers = min((measured(step) for _ in range(options.rounds)), key=lambda found: found["milliseconds"])
            named = {"paper": paper, "work": work, "precision": "bf16" if bf16 else "float32"}
            shares = ", ".join(f"{name} {numbers[name]:.0%}" for name in COLUMNS)
            print(f"{paper}, {work}, {named['precision']}: {numbers['milliseconds']:.1f} ms; {shares}", flush=True)
            machine = f"{hardware()}, {options.threads} thread{'s' * (options.threads > 1)}"
            old = read_object(options.output, kinds={"records": list})["records"] if options.output.is_file() else []
            records = merged(old, {**named, "hardware": machine}, {**numbers, "commit": commit()})
            write_json(options.output, {"records": records})
            write_atomically(options.page, lambda path: path.write_text(rendered(records), encoding="utf-8"))  # noqa: B023


if __name__ == "__main__":
    run_main(main)
