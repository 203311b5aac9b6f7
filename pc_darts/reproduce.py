"""Measure the paper's claims at small scale; writes results/pc_darts.json and its figures.

    python pc_darts/reproduce.py                 # tier small: at least 3 seeds of every claim
    python pc_darts/reproduce.py --claims PC1 PC3 # some of them
    python pc_darts/reproduce.py --tier smoke    # what CI runs
    python pc_darts/reproduce.py --sweep pc-en   # an ablation of section 4.4: partial, pc-en, sampling, order, warm-up,
                                                 # epochs or nodes; written to runs/reproduce/pc_darts-small/sweeps

The claims, with targets, sizes and budgets, are in claims.yaml. One thread; budgets are steps, or CPU seconds where the
claim says equal time. Every search, training and finished (claim, seed) is kept in runs/reproduce/, so an interrupted
run continues where it stopped; arms are shared between claims (PC3, PC5 and PC6 use one PC-DARTS search a seed).
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import reproduction
from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically
from common.ledger import read_claims
from common.study import open_sizes
from pc_darts.drawing import draw_cell
from pc_darts.experiments import (
    PARTIALS,
    SWEEPS,
    Sizes,
    Study,
    mean_overlap,
    search_network_bytes,
    step_seconds,
    sweep,
    weight_free_share,
)
from pc_darts.searching import SearchResult


def seeds_of(claim: str) -> tuple[int, ...]:
    """Seeds of a claim that compares searches with each other."""
    return read_claims("pc_darts", "small")[claim].seeds


def pc1(study: Study, seed: int) -> dict[str, float]:
    """Bytes kept for the backward pass, by K."""
    kept = {k: search_network_bytes(study.sizes, k, seed) for k in PARTIALS}
    steps = [kept[b] / kept[a] for a, b in pairwise(PARTIALS)]
    return {
        "memory_ratio": kept[4] / kept[1],
        "largest_step": max(steps),
        **{f"megabytes_K{k}": value / 1e6 for k, value in kept.items()},
    }


def pc2(study: Study, seed: int) -> dict[str, float]:
    """Time of a step, K = 4 against K = 1."""
    taken = {k: step_seconds(study.sizes, k, seed) for k in (1, 4)}
    return {"time_ratio": taken[4] / taken[1], "seconds_K1": taken[1], "seconds_K4": taken[4]}


def pc3(study: Study, seed: int) -> dict[str, float]:
    """The searched cell against the distribution of random cells."""
    found = study.search("pc", seed)
    error = study.error(f"pc-seed{seed}", found.genotype)
    errors = study.random_errors()
    mean, spread = fmean(errors), stdev(errors)
    if seed == 0 and study.drawn:
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


def pc4(study: Study, seed: int) -> dict[str, float]:
    """Overlap of the edges of searches that differ in their data's order, with and without edge normalisation."""
    overlap = {}
    for name, normalised in (("with", True), ("without", False)):
        arms = {
            other: study.search(f"order-{name}", other, initial_seed=0, edge_normalisation=normalised).genotype
            for other in seeds_of("PC4")
        }
        overlap[name] = mean_overlap(arms, seed)
    return {
        "overlap_gain": overlap["with"] - overlap["without"],
        "overlap_with": overlap["with"],
        "overlap_without": overlap["without"],
    }


def pc5(study: Study, seed: int) -> dict[str, float]:
    """Share of weight-free operations with and without warm-up."""
    with_warmup = weight_free_share(study.search("pc", seed).genotype)
    without = weight_free_share(study.search("no-warmup", seed, warmup_epochs=0).genotype)
    return {"share_gain": without - with_warmup, "share_with": with_warmup, "share_without": without}


def pc6(study: Study, seed: int) -> dict[str, float]:
    """PC-DARTS against DARTS in the same CPU seconds, batch x K being equal."""
    seeds = seeds_of("PC6")
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


def keep_cell(found: SearchResult, study: Study) -> None:
    """The first seed's cell beside the other figures, and four moments of its search: cells and heat maps."""
    for kind in ("normal", "reduce"):
        draw_cell(found.genotype, kind == "reduce", study.figures / f"cell_{kind}.svg")
    epochs = study.sizes.search.epochs
    for moment in range(1, 5):
        epoch = moment * epochs // 4 - 1
        for kind in ("normal", "reduce", "weights"):
            source = study.folder / "searches" / "pc-seed0" / "epochs" / f"{epoch:03d}_{kind}.svg"
            if source.is_file():
                text = source.read_text(encoding="utf-8")
                target = study.figures / f"epoch{epoch + 1:03d}_{kind}.svg"
                write_atomically(target, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]


def figures(study: Study, ledger: Path) -> None:
    from pc_darts.figures import draw_figures

    draw_figures(ledger, study.figures)


def options(parser: Parser) -> None:
    parser.add_argument("--sweep", metavar="NAME", help="run an ablation of section 4.4 instead of the claims")


def run_sweep(study: Study, given: argparse.Namespace) -> bool:
    """The ablation that was asked for, over the seeds of the tier."""
    if not given.sweep:
        return False
    if given.sweep not in SWEEPS:
        raise UserError(f"--sweep {given.sweep}: expected one of {', '.join(SWEEPS)}")
    for row in sweep(study, given.sweep, read_claims("pc_darts", given.tier)["PC1"].seeds):
        print(
            f"{row['arm']}: error {row['mean']:.2f} %, search {row['cpu_seconds']:.0f} CPU s, "
            f"{row['memory_bytes'] / 1e6:.0f} MB"
        )
    return True


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "pc_darts",
        __doc__,
        (pc1, pc2, pc3, pc4, pc5, pc6),
        lambda given: Study(
            open_sizes(Sizes, "pc_darts", given.tier, given.rung), given.folder, drawn=given.tier == "small"
        ),
        figures=figures,
        options=options,
        instead=run_sweep,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
