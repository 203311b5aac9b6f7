"""Measure the paper's claims at small scale: `python instella_t2i/reproduce.py` writes results/instella_t2i.json.

    python instella_t2i/reproduce.py                          # tier small: 3 seeds of every claim
    python instella_t2i/reproduce.py --claims A B             # some of them
    python instella_t2i/reproduce.py --ablations              # the table of quantizers and switches
    python instella_t2i/reproduce.py --tier smoke             # what CI runs

The claims, with targets, sizes and budgets (optimiser steps), are in claims.yaml. Every finished (claim, seed) is kept
in runs/reproduce/, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
from math import isnan
from pathlib import Path
from typing import Any

from common import reproduction
from common.cpu import tune_allocator
from common.errors import run_main
from common.files import write_atomically
from common.publishing import markdown_table
from common.study import labelled, open_sizes
from instella_t2i.experiments import ABLATIONS, ARMS, Sizes, Study
from instella_t2i.figures import draw_figures

KEYS = ("psnr", "ssim", "lpips", "rkid", "joint_share")


def a(study: Study, seed: int) -> dict[str, float]:
    """8 tokens of 32 bits against 8 one-hot codes of 1024."""
    binary, vq = study.measures("binary", seed), study.measures("vq", seed)
    both = labelled(binary, "binary", *KEYS) | labelled(vq, "vq", *KEYS, "used")
    return {"psnr_gain": binary["psnr"] - vq["psnr"], **both}


def b(study: Study, seed: int) -> dict[str, float]:
    """16 tokens in a line against 16 pooled into a 4 x 4 grid, of as many bits."""
    line, grid = study.measures("line", seed), study.measures("grid", seed)
    both = labelled(line, "line", *KEYS) | labelled(grid, "grid", *KEYS)
    return {"psnr_gain": line["psnr"] - grid["psnr"], **both}


def e(study: Study, seed: int) -> dict[str, float]:
    """One code decoded at the whole size against the same code decoded at half of it and scaled up."""
    found = study.sizes_of_one_code("line", seed)
    return {"psnr_gain": found["psnr_whole"] - found["psnr_scaled_up"], **found}


def c(study: Study, seed: int) -> dict[str, float]:
    """Binary diffusion against autoregression: same tokenizer, blocks, steps and tuning."""
    return {**against(study, seed, "diffusion", "autoregression"), "accuracy_ceiling": study.generators.ceiling()}


def d(study: Study, seed: int) -> dict[str, float]:
    """The network says which bits were flipped, or which are set."""
    return against(study, seed, "diffusion", "x")


def f(study: Study, seed: int) -> dict[str, float]:
    """Every block reads its own layer of the language model, or all read the last."""
    return against(study, seed, "diffusion", "last")


def g(study: Study, seed: int) -> dict[str, float]:
    """A training step of the generator with 8 tokens against the 64 of a grid, same width and batch."""
    found = study.generators.seconds_a_step()
    return {"speedup": found["seconds_64"] / found["seconds_8"], **found}


def h(study: Study, seed: int) -> dict[str, float]:
    """Accuracy over the number of steps, in three protocols."""
    generators, found = study.generators, {}
    for protocol in ("renoise", "approximate", "exact"):
        for steps in (1, 5, 20, 50):
            accuracy = generators.measures("diffusion", seed, steps=steps, protocol=protocol)["accuracy"]
            found[f"accuracy_{protocol}_{steps}"] = accuracy
    twenty = found["accuracy_renoise_20"]
    return {
        "lost_to_50": found["accuracy_renoise_50"] - twenty,
        "gained_on_1": twenty - found["accuracy_renoise_1"],
        **found,
    }


def s(study: Study, seed: int) -> dict[str, float]:
    """Times moved towards noise, or the released law."""
    return against(study, seed, "shifted", "diffusion")


def against(study: Study, seed: int, ours: str, other: str) -> dict[str, float]:
    """Accuracy gained over another arm, the six columns of both, what was chosen for each."""
    generators = study.generators
    found = {name: generators.measures(name, seed) for name in (ours, other)}
    result = {"accuracy_gain": found[ours]["accuracy"] - found[other]["accuracy"]}
    for name, values in found.items():
        result |= labelled(values, name) | {f"guidance_{name}": generators.guidance(name, seed)}
        result[f"held_out_loss_{name}"] = float(generators.generator(name, seed).record["held_out_loss"])
    return result


def ablations(study: Study, given: argparse.Namespace) -> bool:
    """With --ablations: quantizers at equal bits and the recipe's switches, one seed, equal tuning."""
    if not given.ablations:
        return False
    rows = []
    for name in ("binary", "vq", "line", "grid", *ABLATIONS):
        network, found = study.network(name), study.measures(name, 0)
        size = [str(network.tokens), str(network.bits), str(network.tokens * network.bits)]
        used = "-" if isnan(found["used"]) else f"{found['used']:.0%}"
        told = [name, _difference(name), *size, f"{study.learning_rate(name):g}"]
        rows.append([*told, *(f"{found[key]:.4g}" for key in KEYS), used])
    head = ["arm", "differs in", "tokens", "bits", "bits a picture", "learning rate"]
    head += ["PSNR", "SSIM", "LPIPS form", "r-KID", "share of joint entropy", "codes used"]
    foot = f"{study.sizes.steps} steps of {study.sizes.batch}, one seed; learning rates chosen with equal tries.\n"
    text = f"{markdown_table(head, rows)}\n\n{foot}"
    path = study.results / "ablations_instella_t2i.md"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(text)
    return True


def _difference(name: str) -> str:
    """The options of an arm, without those that have columns of their own."""
    changed = {**ARMS[name]["network"], **ARMS[name].get("tokenizer", {})}
    told = [f"{key} {str(value).lower()}" for key, value in changed.items() if key not in ("tokens", "bits")]
    return ", ".join(told) or "-"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ablations", action="store_true", help="measure the table of ablations instead of the claims")


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(open_sizes(Sizes, "instella_t2i", given.tier, given.rung), given.folder)


def draw(study: Study, ledger: Path) -> None:
    draw_figures(ledger, study.figures)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "instella_t2i",
        __doc__,
        (a, b, c, d, e, f, g, h, s),
        open_study,
        figures=draw,
        options=options,
        instead=ablations,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
