"""The head-to-head table of the accelerators: `python -m benchmarks.acceleration --budget B1`.

    python -m benchmarks.acceleration --budget B1                     # 20k forward-equivalents a method, 3 seeds
    python -m benchmarks.acceleration --budget B2 --methods instaflow direct_distillation
    python -m benchmarks.acceleration --budget B3 --device cuda
    python -m benchmarks.acceleration --list

Writes results/acceleration.json (merged over budgets and methods), results/bench_acceleration.json (the expected order)
and the pictures in results/figures/acceleration/. Finished (method, seed) pieces are kept in runs/acceleration/ and not
repeated. The number that each method may tune (learning rate, or the teacher's guidance) is chosen among four tries on
other prompts than those reported; a try of a learning rate gets a quarter of the budget.
"""

from __future__ import annotations

from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Portion, Seed, Threads, device
from common.paths import REPOSITORY, RESULTS

TEACHER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"
IMAGES = {"B1": 1024, "B2": 2048, "B3": 5000}
GUIDANCE = 1.5


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.acceleration", description=__doc__)
    parser.add_argument(
        "--budget",
        choices=tuple(IMAGES),
        default="B1",
        help="U-Net forward passes of a method: B1 20 thousand, B2 200 thousand, B3 2 million",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="which are compared; default: all")
    parser.add_argument("--seeds", nargs="+", type=Seed, default=[0, 1, 2], help="of the methods, a column each")
    parser.add_argument(
        "--teacher", type=Path, default=TEACHER, help="a diffusers directory that knows Shapes captions"
    )
    parser.add_argument("--guidance", type=NotNegative, default=GUIDANCE, help="of the teacher in the shared pairs")
    parser.add_argument("--images", type=Count, help=f"samples of every column (default: {IMAGES})")
    parser.add_argument("--tuning-share", type=Portion, default=0.25, help="part of the budget that each try gets")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=Threads, default=1, help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files and pictures")
    parser.add_argument("--list", action="store_true", help="print the methods and stop")
    options = parser.parse_args(argv)

    import torch

    from benchmarks.acceleration import report
    from benchmarks.acceleration.protocol import Bench
    from benchmarks.acceleration.runner import EVALUATION_SEED, SHOWN, Runner, Settings, known_methods, write_results
    from common.cpu import tune_allocator
    from common.files import write_json
    from common.ledger import write_rows
    from common.teacher import Teacher

    known = known_methods()
    if options.list:
        for name, method in known.items():
            print(f"{name:28}{method.title}: {', '.join(map(str, method.steps))} steps; trains {method.trains}")
        return
    names = options.methods or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"--methods {name}: there is no such method; choose from {', '.join(known)}")
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
        tune_allocator()
    teacher = Teacher.load(options.teacher, options.device)
    bench = Bench(teacher, options.budget, options.guidance, "cpu" if options.device == "cpu" else "gpu")
    settings = Settings(
        images=options.images or IMAGES[options.budget], tuning_share=options.tuning_share, seeds=tuple(options.seeds)
    )
    runner = Runner(bench, settings)
    figures = options.results / "figures" / "acceleration"
    for name in names:  # results are written after every method
        runs = runner.run([name])
        content = write_results(options.results / "acceleration.json", runs, runner)
    shown = runner.yardstick(EVALUATION_SEED, settings.images).prompts.prompts[:SHOWN]
    write_json(runner.folder / "shown.json", shown)
    report.draw_curves(content, figures)
    report.draw_sheets(runner, list(known), {n: m.title for n, m in known.items()}, figures)
    rows = report.expected_order(content)
    if rows:
        write_rows(options.results / "bench_acceleration.json", rows)
    print(report.table(content, options.budget))


if __name__ == "__main__":
    run_main(main)
