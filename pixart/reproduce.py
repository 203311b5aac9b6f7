"""Measure the paper's claims at small scale; writes results/pixart.json and its figures.

    python pixart/reproduce.py                   # tier small: 3 seeds of every claim, about 45 minutes of one core
    python pixart/reproduce.py --claims P2 P3    # some of them
    python pixart/reproduce.py --tier smoke      # what CI runs, under a minute
    python pixart/reproduce.py --calibrate       # how the learning rates were chosen: candidates on an unused seed

The claims, with targets and budgets, are in claims.yaml. One thread. Arms are equal in optimiser steps where the claim
says so, else in CPU seconds. Every trained arm and every finished (claim, seed) is kept in runs/reproduce/, so an
interrupted run continues where it stopped; arms are shared between claims (P1, P2, P3, P5 and P6 use one model trained
on dense captions).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from common import reproduction
from common.cli import Parser
from common.errors import run_main
from common.files import write_atomically
from common.metrics.alignment import AlignmentScorer
from common.study import open_sizes
from pixart.experiments import (
    GRID,
    HeldOut,
    Sampler,
    Sizes,
    Study,
    alignment,
    full_size_parameters,
    poor_captions,
    resized,
    training_bytes,
)
from pixart.model import PixArt
from pixart.noun_density import noun_density, table


def p1(study: Study, seed: int) -> dict[str, float]:
    """adaLN-single against an adaLN MLP a block: counts, bytes, and at the small tier quality after equal steps."""
    sizes, held_out = study.sizes, study.scenes
    result: dict[str, float] = {}
    counted = open_sizes(Sizes, "pixart", "small")
    for name in ("single", "block"):
        torch.manual_seed(seed)
        shape = study.shape(adaln=name, width=counted.width, depth=counted.depth, heads=counted.heads)
        network = PixArt(shape)
        result[f"parameters_{name}"] = float(sum(p.numel() for p in network.parameters()))
        result[f"bytes_{name}"] = float(training_bytes(network, held_out, sizes.batch))
        result[f"full_size_{name}_millions"] = full_size_parameters(name) / 1e6  # type: ignore[arg-type]
    result["parameter_ratio"] = result["parameters_single"] / result["parameters_block"]
    result["memory_ratio"] = result["bytes_single"] / result["bytes_block"]
    if not sizes.ablation:
        return result
    dense, block = study.dense(seed), study.block(seed)
    result["mse_single"], result["mse_block"] = dense.at(sizes.ablation)["mse"], block.last["mse"]
    single = study.snapshot("dense", seed, sizes.ablation, study.shape())
    for name, trained in (("single", single), ("block", block.network)):
        images = held_out.draw(trained, sizes.judged)
        result |= study.judged(seed, name, images, held_out, figure=f"adaln_{name}")
    result["mse_ratio"] = result["mse_single"] / result["mse_block"]
    result["fid_ratio"] = result["fid_single"] / result["fid_block"]
    return result


def p2(study: Study, seed: int) -> dict[str, float]:
    """Re-parameterised, from scratch, and with random tables."""
    sizes, held_out = study.sizes, study.scenes
    stage1 = study.stage1(seed)
    network = study.from_stage1(seed)().eval()
    with torch.no_grad():
        x_BCHW, t_B = held_out.x0_NCHW[:8], torch.full((8,), 500.0)
        ours = network(x_BCHW, t_B, held_out.caption_NLD[:8].float(), held_out.mask_NL[:8])
        theirs = stage1.network(x_BCHW, t_B)
    reparam, scratch, random = study.reparam(seed), study.dense(seed), study.random_tables(seed)
    more = sizes.text + sizes.stage1
    strong = scratch.at(more)["mse"]
    result = {
        "mse_ratio_equal_steps": reparam.last["mse"] / scratch.at(sizes.text)["mse"],
        "mse_ratio_random_tables": reparam.at(sizes.early)["mse"] / random.last["mse"],
        "mse_ratio_strong": reparam.last["mse"] / strong,
        "difference_at_500": float((ours - theirs).abs().max()),
        "mse_reparam": reparam.last["mse"],
        "mse_scratch": scratch.at(sizes.text)["mse"],
        "mse_scratch_extra_steps": strong,
        "mse_reparam_early": reparam.at(sizes.early)["mse"],
        "mse_random_tables_early": random.last["mse"],
        "penalty_reparam": reparam.last["penalty"],
        "penalty_scratch": scratch.at(sizes.text)["penalty"],
        "stage1_seconds": stage1.seconds,
        "step_seconds": scratch.seconds / scratch.steps,
    }
    if sizes.judged:
        starts = {"scratch": sizes.text, "scratch_extra_steps": more}
        networks = {name: study.snapshot("dense", seed, step, study.shape()) for name, step in starts.items()}
        for name, trained in {"reparam": reparam.network, **networks}.items():
            result |= study.judged(seed, name, held_out.draw(trained, sizes.judged), held_out, aligned=False)
    return result


def p3(study: Study, seed: int) -> dict[str, float]:
    """Dense against LAION-like captions on the same pictures; at the small tier also on captioned emoji."""
    sizes, held_out = study.sizes, study.scenes
    arms = {"dense": study.dense(seed), "web": study.web(seed)}
    result = penalties({name: arm.last for name, arm in arms.items()})
    if sizes.judged:
        web = study.held_out("web", study.data(captions="web"))
        result["penalty_web_own_captions"] = web.losses(arms["web"].network)["penalty"]
        for name, arm in arms.items():
            images = held_out.draw(arm.network, sizes.judged)
            result |= study.judged(seed, name, images, held_out, figure=f"captions_{name}")
        result["alignment_gain"] = result["alignment_dense"] - result["alignment_web"]
        result |= limits(held_out, sizes.judged)
    captions = {"dense": study.captions_of_scenes(), "web": study.captions_of_scenes(captions="web")}
    if sizes.emoji:
        result |= p3_on_emoji(study, seed)
        captions |= study.emoji_captions()
    for name, texts in captions.items():
        density = noun_density(texts)
        result[f"nouns_per_caption_{name}"] = density.nouns_per_caption
        result[f"valid_noun_share_{name}"] = density.valid_share
    if seed == 0 and sizes.judged:
        keep_noun_table(study, captions)
    return result


def p3_on_emoji(study: Study, seed: int) -> dict[str, float]:
    """The same comparison on artwork, whose captions are poor by lost and foreign words."""
    sizes, held_out = study.sizes, study.held_out("emoji", study.emoji_data())
    arms = {name: study.emoji(name, seed) for name in ("dense", "web")}
    result = {f"emoji_{key}": value for key, value in penalties({n: a.last for n, a in arms.items()}).items()}
    result["emoji_penalty_gain"] = result["emoji_penalty_dense"] - result["emoji_penalty_web"]
    poor = held_out.with_captions(poor_captions(held_out.pictures.captions, 1), study.encoder)
    result["emoji_penalty_web_own_captions"] = poor.losses(arms["web"].network)["penalty"]
    for name, arm in arms.items():
        images = held_out.draw(arm.network, sizes.judged)
        result |= study.judged(seed, f"emoji_{name}", images, held_out, aligned=False)
        score = AlignmentScorer().score(images, held_out.pictures.captions[: sizes.judged])
        result[f"emoji_right_beats_random_{name}"] = float(score["right_beats_random"])
    return result


def penalties(last: dict[str, dict[str, float]]) -> dict[str, float]:
    """Loss and wrong-caption penalty of the two arms of P3, and the penalties' ratio (of at least a thousandth)."""
    result = {f"{key}_{name}": values[key] for name, values in last.items() for key in ("mse", "penalty")}
    result["penalty_ratio"] = result["penalty_dense"] / max(result["penalty_web"], 1e-3)
    return result


def limits(held_out: HeldOut, count: int) -> dict[str, float]:
    """Alignment of real pictures with their own captions, and with those of the next picture."""
    specs = held_out.pictures.specs
    assert specs is not None
    real = held_out.images[:count]
    return {
        "alignment_real": alignment(real, specs[:count])["alignment"],
        "alignment_chance": alignment(real.roll(1, 0), specs[:count])["alignment"],
    }


def keep_noun_table(study: Study, captions: dict[str, list[str]]) -> None:
    """Table 1 for the caption sets that P3 trains on, as text beside the other results."""
    names = {"dense": "scenes, dense", "web": "scenes, LAION-like"}
    names |= {"emoji_dense": "emoji, dense", "emoji_web": "emoji, LAION-like"}
    text = table({names[name]: noun_density(texts) for name, texts in captions.items()}) + "\n"
    path = study.results / "noun_density_pixart.txt"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def p4(study: Study, seed: int) -> dict[str, float]:
    """Stages 1 and 2 of P2, then high-quality scenes; against one stage on a mixture for the same CPU seconds."""
    sizes = study.sizes
    hq = study.data(scenes="hq")
    held_out = study.held_out("hq", hq)
    stage1, stage2 = study.stage1(seed), study.reparam(seed)
    aligned = study.train(
        "stage2",
        seed,
        lambda: stage2.network,
        lambda: study.dense_table,
        study.scenes.losses,
        steps=sizes.stage3,
    )
    stage3 = study.train(
        "stage3",
        seed,
        lambda: aligned.network,
        lambda: study.table("hq", hq),
        held_out.losses,
        steps=sizes.stage3,
        checkpoints=range(sizes.stage3 // 4, sizes.stage3, max(1, sizes.stage3 // 4)),
    )
    seconds = stage1.seconds + stage2.seconds + aligned.seconds + stage3.seconds
    mixed = study.train(
        "mixed",
        seed,
        lambda: PixArt(study.shape()),
        lambda: study.table("all", study.data(scenes="all", images=2 * sizes.images)),
        held_out.losses,
        seconds=seconds,
    )
    result = {"seconds_stages": seconds, "seconds_mixed": mixed.seconds, "steps_mixed": float(mixed.steps)}
    for name, arm in (("stages", stage3), ("mixed", mixed)):
        result |= {f"mse_{name}": arm.last["mse"], f"penalty_{name}": arm.last["penalty"]}
        images = held_out.draw(arm.network, sizes.judged)
        result |= study.judged(seed, name, images, held_out, figure=f"hq_{name}")
    result["fid_drop"] = 1 - result["fid_stages"] / result["fid_mixed"]
    result["alignment_gain"] = result["alignment_stages"] - result["alignment_mixed"]
    return result


def p5(study: Study, seed: int) -> dict[str, float]:
    """Twice the resolution with and without interpolated positions; square against bucketed training on 2:1."""
    sizes = study.sizes
    start = study.dense(seed).network
    result: dict[str, float] = {}
    large = study.data(size=64, images=sizes.images // 4)
    held_out = study.held_out("64px", large, sizes.held_out // 2)
    for name, scale in (("s2", 2.0), ("s1", 1.0)):
        network = resized(start, input_size=2 * start.config.input_size, interpolation_scale=scale)
        result[f"mse_before_{name}"] = held_out.losses(network.eval())["mse"]
        arm = study.train(
            f"64px-{name}",
            seed,
            lambda network=network: network,  # type: ignore[misc]
            lambda: study.table("64px", large),
            held_out.losses,
            steps=sizes.tune,
            checkpoints=[sizes.tune // 4, sizes.tune // 2],
        )
        result[f"mse_after_{name}"], result[f"penalty_after_{name}"] = arm.last["mse"], arm.last["penalty"]
        study.samples(seed, f"64px_{name}", held_out.draw(arm.network, GRID), held_out)
    tall = study.held_out("2to1", study.data(ratios=[2.0]), sizes.judged)
    for name, ratios in (("square", [1.0]), ("buckets", [0.5, 1.0, 2.0])):
        data = study.data(ratios=ratios)
        arm = study.train(
            name,
            seed,
            lambda: resized(start),
            lambda name=name, data=data: study.dense_table if name == "square" else study.table(name, data),  # type: ignore[misc]
            tall.losses,
            steps=sizes.buckets,
        )
        images = tall.draw(arm.network, sizes.judged)
        result |= study.judged(seed, name, images, tall, figure=f"2to1_{name}")
        result[f"mse_2to1_{name}"] = arm.last["mse"]
    return {
        "mse_ratio_before": result["mse_before_s2"] / result["mse_before_s1"],
        "mse_ratio_after": result["mse_after_s2"] / result["mse_after_s1"],
        "fid_ratio_buckets": result["fid_buckets"] / result["fid_square"],
        **result,
    }


SAMPLERS: dict[str, tuple[Sampler, int]] = {"iddpm": ("iddpm", 100), "sa": ("sa-solver", 25)}
GUIDANCE = {"1": 1.0, "3": 3.0, "4p5": 4.5, "7": 7.0}


def p6(study: Study, seed: int) -> dict[str, float]:
    """Three samplers at guidance 3 and four guidance scales with the first, on P3's dense model."""
    judged, held_out = study.sizes.judged, study.scenes
    network = study.dense(seed).network
    result: dict[str, float] = {}
    for name, (sampler, steps) in SAMPLERS.items():
        images = held_out.draw(network, judged, 3.0, sampler, steps)
        result |= study.judged(seed, name, images, held_out, figure=f"sampler_{name}")
        result[f"calls_{name}"] = float(steps)
    for name, scale in GUIDANCE.items():
        result |= study.judged(seed, f"guidance_{name}", held_out.draw(network, judged, scale), held_out)
    return {
        "fid_ratio": result["fid_guidance_3"] / result["fid_iddpm"],
        "calls_ratio": 20 / result["calls_iddpm"],
        "fid_ratio_sa": result["fid_sa"] / result["fid_iddpm"],
        "alignment_gain_guidance": result["alignment_guidance_3"] - result["alignment_guidance_1"],
        "recall_drop_guidance": result["recall_guidance_1"] - result["recall_guidance_7"],
        **result,
    }


def figures(study: Study, ledger: Path) -> None:
    from pixart.figures import draw_figures

    draw_figures(ledger, study.figures, study.folder / "arms")


def calibrate(study: Study, given: argparse.Namespace) -> bool:
    if given.calibrate:
        study.calibrate()
    return bool(given.calibrate)


def options(parser: Parser) -> None:
    parser.add_argument("--calibrate", action="store_true", help="compare learning rates on an unused seed and stop")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "pixart",
        __doc__,
        (p1, p2, p3, p4, p5, p6),
        lambda given: Study(open_sizes(Sizes, "pixart", given.tier, given.rung), given.folder),
        figures=figures,
        options=options,
        instead=calibrate,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
