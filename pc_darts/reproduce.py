"""Measure the paper's claims at small scale: `python reproduce.py` writes results/pc_darts.json and its figures.

    python reproduce.py                          # tier small: at least 3 seeds of every claim
    python reproduce.py --claims PC1 PC3         # some of them
    python reproduce.py --tier smoke             # what CI runs
    python reproduce.py --sweep pc-en            # an ablation of section 4.4: partial, pc-en, sampling, order, warm-up,
                                                 # epochs or nodes; written to runs/reproduce/pc_darts-small/sweeps

One thread; budgets are steps, or CPU seconds where the claim says equal time. Every search, training and finished
(claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it stopped; arms are shared between
claims (PC3, PC5 and PC6 use one PC-DARTS search a seed).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_main
from common.ledger import Claim, Condition, PaperValue, Target, Tier
from common.paths import REPOSITORY, RESULTS
from common.reproduction import chosen_claims, ledger_path, measure_claims, options_parser

if TYPE_CHECKING:
    from pc_darts.experiments import Study

FIGURES = RESULTS / "figures" / "pc_darts"
SEEDS: dict[str, tuple[int, ...]] = {"smoke": (0,), "small": (0, 1, 2)}
OVERLAP_SEEDS = (0, 1, 2, 3)  # of PC4, as in the specification
NAMES = {"smoke": ("PC1", "PC2"), "small": ("PC1", "PC2", "PC3", "PC4", "PC5", "PC6")}


def claims(tier: Tier) -> dict[str, Claim]:
    """The claims with their targets, fixed before any run (specification section 6); smoke has the counted ones."""

    def make(id: str, statement: str, paper: PaperValue, target: Target) -> Claim:
        return Claim(id, statement, paper, target, tier)

    entries = [
        make(
            "PC1",
            "Partial channel connections cut what the search network keeps for its backward pass: K = 4 at most a "
            "third of K = 1 at the paper's size, falling over K = 1, 2, 4, 8.",
            PaperValue("batch 256 instead of 64 on an 11 GB card", "section 4.2"),
            Target(
                "kept bytes at K = 4 at most 1/3 of K = 1; every doubling of K keeps less",
                "memory_ratio",
                "<=",
                1 / 3,
                (Condition("largest_step", "<", 1.0),),
            ),
        ),
        make(
            "PC2",
            "A search step at equal batch is faster: K = 4 takes at most 0.8 of the time of K = 1.",
            PaperValue("0.1 instead of 0.4 GPU-days (with the larger batch)", "tables 1 and 3"),
            Target("CPU seconds of a forward and backward pass at most 0.8x", "time_ratio", "<=", 0.8),
        ),
        make(
            "PC3",
            "Searched cells beat random cells of the same space trained alike, by at least one standard deviation of "
            "the random ones.",
            PaperValue("2.57 +- 0.07 % against DARTS 3.00 +- 0.14 %; no random cells in the paper", "table 1"),
            Target(
                "test error of the searched cells below the mean of the random cells by at least one of their "
                "standard deviations",
                "gap_in_std",
                ">=",
                1.0,
            ),
        ),
        make(
            "PC4",
            "Edge normalisation stabilises the choice of edges: searches that differ only in the order of their data "
            "agree more with it than without it.",
            PaperValue("2.67 +- 0.11 % to 2.57 +- 0.07 %, smaller deviation", "section 3.3, table 3"),
            Target("mean Jaccard overlap of the chosen edges higher by at least 0.1", "overlap_gain", ">=", 0.1),
        ),
        make(
            "PC5",
            "Warm-up keeps weight-free operations (skip, pools) from winning before the others have learned.",
            PaperValue("alphas frozen for 15 of 50 epochs", "section 4.2"),
            Target(
                "share of weight-free operations among the chosen ones higher without warm-up",
                "share_gain",
                ">",
                0.0,
            ),
        ),
        make(
            "PC6",
            "At equal time and equal memory PC-DARTS finds cells at least as good as first-order DARTS does, with a "
            "smaller spread over searches.",
            PaperValue("2.57 +- 0.07 % in 0.1 against 3.00 +- 0.14 % in 0.4 GPU-days", "table 1"),
            Target(
                "mean test error not above that of DARTS, and standard deviation over three searches smaller",
                "error_difference",
                "<=",
                0.0,
                (Condition("std_difference", "<", 0.0),),
            ),
        ),
    ]
    return {claim.id: claim for claim in entries if claim.id in NAMES[tier]}


def measure_pc1(study: Study, seed: int) -> dict[str, float]:
    """Bytes kept for the backward pass, by K."""
    from pc_darts.experiments import PARTIALS, search_network_bytes

    kept = {k: search_network_bytes(study.plan, k, seed) for k in PARTIALS}
    steps = [kept[b] / kept[a] for a, b in pairwise(PARTIALS)]
    return {
        "memory_ratio": kept[4] / kept[1],
        "largest_step": max(steps),
        **{f"megabytes_K{k}": value / 1e6 for k, value in kept.items()},
    }


def measure_pc2(study: Study, seed: int) -> dict[str, float]:
    """Time of a step, K = 4 against K = 1."""
    from pc_darts.experiments import step_seconds

    taken = {k: step_seconds(study.plan, k, seed) for k in (1, 4)}
    return {"time_ratio": taken[4] / taken[1], "seconds_K1": taken[1], "seconds_K4": taken[4]}


def measure_pc3(study: Study, seed: int) -> dict[str, float]:
    """The searched cell against the distribution of random cells."""
    from statistics import fmean, stdev

    found = study.search("pc", seed)
    error = study.error(f"pc-seed{seed}", found.genotype)
    errors = study.random_errors()
    mean, spread = fmean(errors), stdev(errors)
    if seed == 0 and study.plan.drawn:
        keep_cell(found, study)
    return {
        "gap_in_std": (mean - error) / max(spread, 1e-6),
        "gap": mean - error,
        "error_pc": error,
        "error_random": mean,
        "std_random": spread,
        "search_cpu_seconds": found.cpu_seconds,
        **{f"error_random_{n}": value for n, value in enumerate(errors)},
    }


def measure_pc4(study: Study, seed: int) -> dict[str, float]:
    """Overlap of the edges of searches that differ in their data's order, with and without edge normalisation."""
    from pc_darts.experiments import mean_overlap

    overlap = {}
    for name, normalised in (("with", True), ("without", False)):
        arms = {
            other: study.search(f"order-{name}", other, initial_seed=0, edge_normalisation=normalised).genotype
            for other in OVERLAP_SEEDS
        }
        overlap[name] = mean_overlap(arms, seed)
    return {
        "overlap_gain": overlap["with"] - overlap["without"],
        "overlap_with": overlap["with"],
        "overlap_without": overlap["without"],
    }


def measure_pc5(study: Study, seed: int) -> dict[str, float]:
    """Share of weight-free operations with and without warm-up."""
    from pc_darts.experiments import weight_free_share

    with_warmup = weight_free_share(study.search("pc", seed).genotype)
    without = weight_free_share(study.search("no-warmup", seed, warmup_epochs=0).genotype)
    return {"share_gain": without - with_warmup, "share_with": with_warmup, "share_without": without}


def measure_pc6(study: Study, seed: int) -> dict[str, float]:
    """PC-DARTS against DARTS in the same CPU seconds, batch x K being equal."""
    from statistics import stdev

    seeds = SEEDS["small"]
    pc = {s: study.error(f"pc-seed{s}", study.search("pc", s).genotype) for s in seeds}
    darts = {s: study.error(f"darts-seed{s}", study.darts(s).genotype) for s in seeds}
    ours, theirs = study.search("pc", seed), study.darts(seed)
    return {
        "error_difference": pc[seed] - darts[seed],
        "std_difference": stdev(pc.values()) - stdev(darts.values()),
        "error_pc": pc[seed],
        "error_darts": darts[seed],
        "std_pc": stdev(pc.values()),
        "std_darts": stdev(darts.values()),
        "cpu_seconds_pc": ours.cpu_seconds,
        "cpu_seconds_darts": theirs.cpu_seconds,
        "megabytes_pc": ours.memory_bytes / 1e6,
        "megabytes_darts": theirs.memory_bytes / 1e6,
        "steps_pc": float(ours.steps),
        "steps_darts": float(theirs.steps),
    }


MEASURES: dict[str, Callable[[Study, int], dict[str, float]]] = {
    "PC1": measure_pc1,
    "PC2": measure_pc2,
    "PC3": measure_pc3,
    "PC4": measure_pc4,
    "PC5": measure_pc5,
    "PC6": measure_pc6,
}


def keep_cell(found: Any, study: Study) -> None:
    """The first seed's cell beside the other figures, and four moments of its search: cells and heat maps."""
    from common.files import write_atomically
    from pc_darts.drawing import draw_cell

    for kind in ("normal", "reduce"):
        draw_cell(found.genotype, kind == "reduce", FIGURES / f"cell_{kind}.svg")
    epochs = study.plan.search.epochs
    for moment in range(1, 5):
        epoch = moment * epochs // 4 - 1
        for kind in ("normal", "reduce", "weights"):
            source = study.folder / "searches" / "pc-seed0" / "epochs" / f"{epoch:03d}_{kind}.svg"
            if source.is_file():
                text = source.read_text(encoding="utf-8")
                target = FIGURES / f"epoch{epoch + 1:03d}_{kind}.svg"
                write_atomically(target, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]


def open_study(tier: Tier) -> Study:
    """Data and arms of a tier, in one thread (budgets are CPU seconds)."""
    import torch

    from pc_darts.experiments import PLANS, Study

    torch.set_num_threads(1)
    return Study(PLANS[tier], REPOSITORY / "runs" / "reproduce" / f"pc_darts-{tier}")


def seeds_of(name: str, tier: Tier) -> tuple[int, ...]:
    """Seeds of a claim."""
    return OVERLAP_SEEDS if name == "PC4" else SEEDS[tier]


def reproduce(study: Study, tier: Tier, names: list[str], output: Path) -> list[dict[str, Any]]:
    """Measure the named claims over the tier's seeds and write the ledger after each claim."""
    known = claims(tier)
    records = measure_claims(
        [known[name] for name in names],
        lambda name: seeds_of(name, tier),
        lambda name, seed: MEASURES[name](study, seed),
        study.folder,
        output,
    )
    if tier == "small":
        from pc_darts.figures import draw_figures

        draw_figures(output, FIGURES)
    return records


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options_parser("pc_darts", __doc__)
    parser.add_argument("--sweep", metavar="NAME", help="run an ablation of section 4.4 instead of the claims")
    options = parser.parse_args(argv)
    names = chosen_claims(options, list(NAMES[options.tier]))
    study = open_study(options.tier)
    if options.sweep:
        from pc_darts.experiments import SWEEPS, sweep

        if options.sweep not in SWEEPS:
            raise UserError(f"--sweep {options.sweep}: expected one of {', '.join(SWEEPS)}")
        rows = sweep(study, options.sweep, SEEDS[options.tier])
        for row in rows:
            print(
                f"{row['arm']}: error {row['mean']:.2f} %, search {row['cpu_seconds']:.0f} CPU s, "
                f"{row['memory_bytes'] / 1e6:.0f} MB"
            )
        return []
    return reproduce(study, options.tier, names, ledger_path(options, "pc_darts"))


if __name__ == "__main__":
    run_main(main)
