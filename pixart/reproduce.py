"""Measure the paper's claims at small scale: `python reproduce.py` writes results/pixart.json and its figures.

    python reproduce.py                          # tier small: 3 seeds of every claim, about 45 minutes of one core
    python reproduce.py --claims P2 P3           # some of them
    python reproduce.py --tier smoke             # what CI runs, under a minute
    python reproduce.py --calibrate              # how the learning rates were chosen: candidates on an unused seed

One thread. Arms are equal in optimiser steps where the claim says so, else in CPU seconds. Every trained arm and every
finished (claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it stopped; arms are shared
between claims (P1, P2, P3, P5 and P6 use one model trained on dense captions).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import run_main
from common.ledger import Claim, Condition, PaperValue, Target, Tier
from common.paths import REPOSITORY, RESULTS
from common.reproduction import chosen_claims, ledger_path, measure_claims, options_parser

if TYPE_CHECKING:
    from pixart.experiments import HeldOut, Study

GRID = 8  # samples of a grid
FIGURES = RESULTS / "figures" / "pixart"
SEEDS = {"smoke": (0,), "small": (0, 1, 2)}
NAMES = {"smoke": ("P1", "P2", "P3"), "small": ("P1", "P2", "P3", "P4", "P5", "P6")}


def claims(tier: Tier) -> dict[str, Claim]:
    """The claims with their targets, fixed before any run (specification section 6); the smoke tier has weaker ones."""
    small = tier == "small"

    def make(id: str, statement: str, paper: PaperValue, target: Target) -> Claim:
        return Claim(id, statement, paper, target, tier)

    counts = (
        Condition("full_size_single_millions", "<", 611.4),
        Condition("full_size_block_millions", ">", 825.0),
        Condition("memory_ratio", "<", 1.0),
    )
    entries = [
        make(
            "P1",
            "adaLN-single (one MLP for all blocks, a table a block) saves a quarter of the parameters of adaLN (an MLP "
            "a block on time and pooled text)" + (", at equal steps at no visible loss." if small else "."),
            PaperValue("833M to 611M parameters (-26 %), 29 to 23 GB (-21 %), FID slightly higher", "F 6"),
            Target(
                "full size: 611.35M against over 825M; small: parameters at most 0.80x, held-out eps-MSE at most "
                "1.03x, FID at most 1.10x, fewer bytes of weights, optimiser and activations",
                "mse_ratio",
                "<=",
                1.03,
                (Condition("parameter_ratio", "<=", 0.80), Condition("fid_ratio", "<=", 1.10), *counts),
            )
            if small
            else Target(
                "full size: 611.35M against over 825M; small: parameters at most 0.80x, fewer bytes of weights, "
                "optimiser and activations",
                "parameter_ratio",
                "<=",
                0.80,
                counts,
            ),
        ),
        make(
            "P2",
            "A text-to-image model initialised from a class-conditional DiT by re-parameterisation beats one from "
            "scratch at equal steps"
            + (", and also one from scratch that gets stage 1's steps on top." if small else "; the tables matter."),
            PaperValue('"w/o re-param": distorted images in spite of 200K extra iterations', "F 6"),
            Target(
                "held-out eps-MSE at equal text-to-image steps at most 0.85x scratch; early at most 0.8x DiT weights "
                "with random tables; equal to the DiT at t = 500 to 1e-4"
                + ("; strong form: below scratch with stage 1's steps on top" if small else ""),
                "mse_ratio_equal_steps",
                "<=",
                0.85,
                (
                    Condition("mse_ratio_random_tables", "<=", 0.8),
                    Condition("difference_at_500", "<=", 1e-4),
                    *((Condition("mse_ratio_strong", "<", 1.0),) if small else ()),
                ),
            ),
        ),
        make(
            "P3",
            "Dense captions speed up text-image alignment: same pictures and steps, dense against LAION-like captions.",
            PaperValue("SAM-LLaVA: 18.6 % valid nouns, 29.3 nouns an image; LAION: 8.5 %, 6.4", "S 2.4, T 1"),
            Target(
                "wrong-caption penalty of the dense arm at least 0.03 and at least 5x that of the LAION-like arm"
                + ("; alignment higher by at least 0.3; on captioned emoji the dense arm's penalty is higher too")
                * small,
                "penalty_dense",
                ">=",
                0.03,
                (
                    Condition("penalty_ratio", ">=", 5.0),
                    *((Condition("alignment_gain", ">=", 0.3),) if small else ()),
                    *((Condition("emoji_penalty_gain", ">", 0.0),) if small else ()),
                ),
            ),
        ),
        make(
            "P4",
            "Three stages (pixels, alignment, aesthetics) beat one stage on all data mixed, at equal compute.",
            PaperValue("753 A100 days in three stages; SD v1.5 took 6,250", "S 2.2, T 2, T 4"),
            Target(
                "FID on the high-quality set at least 10 % lower and alignment not lower",
                "fid_drop",
                ">=",
                0.10,
                (Condition("alignment_gain", ">=", 0.0),),
            ),
        ),
        make(
            "P5",
            "Position interpolation and aspect buckets make a change of resolution cheap.",
            PaperValue(
                "256 to 512 to 1024 px in 100K and 16K steps; positions interpolated by 2 at 1024 px", "A.5, T 4"
            ),
            Target(
                "32 to 64 px: held-out MSE with interpolated positions (s = 2) below s = 1 before any step and after "
                "100; FID on 2:1 pictures lower after bucketed than after square training",
                "mse_ratio_after",
                "<",
                1.0,
                (Condition("mse_ratio_before", "<", 1.0), Condition("fid_ratio_buckets", "<", 1.0)),
            ),
        ),
        make(
            "P6",
            "20 steps of DPM-Solver are as good as 100 of iDDPM; guidance trades diversity for alignment.",
            PaperValue(
                "three samplers similar, 20 DPM-Solver steps chosen; FID against CLIP over guidance", "A.5, A.6"
            ),
            Target(
                "FID(20 DPM-Solver) at most 1.05x FID(100 iDDPM) at a fifth of the calls; alignment at guidance 3 "
                "above that at 1",
                "fid_ratio",
                "<=",
                1.05,
                (Condition("calls_ratio", "<=", 0.2), Condition("alignment_gain_guidance", ">", 0.0)),
            ),
        ),
    ]
    return {claim.id: claim for claim in entries if claim.id in NAMES[tier]}


def measure_p1(study: Study, seed: int) -> dict[str, float]:
    """adaLN-single against an adaLN MLP a block: counts, bytes, and at the small tier quality after equal steps."""
    import torch

    from pixart import experiments as x
    from pixart.model import PixArt

    plan, held_out = study.plan, study.scenes
    result: dict[str, float] = {}
    counted = x.PLANS["small"]
    size: dict[str, Any] = {"width": counted.width, "depth": counted.depth, "heads": counted.heads}
    for name in ("single", "block"):
        torch.manual_seed(seed)
        network = PixArt(study.shape(adaln=name, **size))
        result[f"parameters_{name}"] = float(sum(p.numel() for p in network.parameters()))
        result[f"bytes_{name}"] = float(x.training_bytes(network, held_out, plan.batch))
    result["parameter_ratio"] = result["parameters_single"] / result["parameters_block"]
    result["memory_ratio"] = result["bytes_single"] / result["bytes_block"]
    result["full_size_single_millions"] = x.full_size_parameters("single") / 1e6
    result["full_size_block_millions"] = x.full_size_parameters("block") / 1e6
    if not plan.ablation:
        return result
    dense, block = study.dense(seed), study.block(seed)
    result["mse_single"], result["mse_block"] = dense.at(plan.ablation)["mse"], block.last["mse"]
    single = study.snapshot("dense", seed, plan.ablation, study.shape())
    for name, trained in (("single", single), ("block", block.network)):
        images = held_out.draw(trained, plan.judged)
        result |= judged(name, images, held_out, with_alignment=True)
        if seed == 0:
            keep_samples(study, f"adaln_{name}", images, held_out)
    result["mse_ratio"] = result["mse_single"] / result["mse_block"]
    result["fid_ratio"] = result["fid_single"] / result["fid_block"]
    return result


def measure_p2(study: Study, seed: int) -> dict[str, float]:
    """Re-parameterised, from scratch, and with random tables."""
    import torch

    plan, held_out = study.plan, study.scenes
    stage1 = study.stage1(seed)
    network = study.from_stage1(seed)().eval()
    with torch.no_grad():
        x_BCHW, t_B = held_out.x0_NCHW[:8], torch.full((8,), 500.0)
        ours = network(x_BCHW, t_B, held_out.caption_NLD[:8].float(), held_out.mask_NL[:8])
        theirs = stage1.network(x_BCHW, t_B)
    reparam, scratch, random = study.reparam(seed), study.dense(seed), study.random_tables(seed)
    strong = scratch.at(plan.text + plan.stage1)["mse"]
    result = {
        "mse_ratio_equal_steps": reparam.last["mse"] / scratch.at(plan.text)["mse"],
        "mse_ratio_random_tables": reparam.at(plan.early)["mse"] / random.last["mse"],
        "mse_ratio_strong": reparam.last["mse"] / strong,
        "difference_at_500": float((ours - theirs).abs().max()),
        "mse_reparam": reparam.last["mse"],
        "mse_scratch": scratch.at(plan.text)["mse"],
        "mse_scratch_extra_steps": strong,
        "mse_reparam_early": reparam.at(plan.early)["mse"],
        "mse_random_tables_early": random.last["mse"],
        "penalty_reparam": reparam.last["penalty"],
        "penalty_scratch": scratch.at(plan.text)["penalty"],
        "stage1_seconds": stage1.seconds,
        "step_seconds": scratch.seconds / scratch.steps,
    }
    if plan.judged:
        for name, trained in (
            ("reparam", reparam.network),
            ("scratch", study.snapshot("dense", seed, plan.text, study.shape())),
            ("scratch_extra_steps", study.snapshot("dense", seed, plan.text + plan.stage1, study.shape())),
        ):
            images = held_out.draw(trained, plan.judged)
            result |= judged(name, images, held_out)
            if seed == 0:
                keep_samples(study, name, images, held_out)
    return result


def measure_p3(study: Study, seed: int) -> dict[str, float]:
    """Dense against LAION-like captions on the same pictures; at the small tier also on captioned emoji."""
    from pixart.experiments import poor_captions
    from pixart.model import PixArt
    from pixart.noun_density import noun_density

    plan, held_out = study.plan, study.scenes
    arms = {"dense": study.dense(seed), "web": study.web(seed)}
    result = penalties({name: arm.last for name, arm in arms.items()})
    if plan.judged:
        web = study.held_out("web", study.data(captions="web"))
        result["penalty_web_own_captions"] = web.losses(arms["web"].network)["penalty"]
        for name, arm in arms.items():
            images = held_out.draw(arm.network, plan.judged)
            result |= judged(name, images, held_out, with_alignment=True)
            if seed == 0:
                keep_samples(study, f"captions_{name}", images, held_out)
        result["alignment_gain"] = result["alignment_dense"] - result["alignment_web"]
        result |= limits(held_out, plan.judged)
    captions = {
        "dense": study.captions_of_scenes(),
        "web": study.captions_of_scenes(captions="web"),
    }
    if plan.emoji:
        from common.metrics.alignment import AlignmentScorer

        emoji = study.held_out("emoji", study.emoji_data())
        shape = study.shape(study.emoji_codec)
        trained = {
            name: study.train(
                f"emoji-{name}",
                seed,
                lambda: PixArt(shape),
                lambda name=name: study.table("emoji" if name == "dense" else "emoji-web", study.emoji_data()),  # type: ignore[misc]
                emoji.losses,
                steps=plan.emoji,
                checkpoints=[plan.emoji // 2],
                codec=study.emoji_codec,
            )
            for name in ("dense", "web")
        }
        found = penalties({name: arm.last for name, arm in trained.items()})
        result |= {f"emoji_{name}": value for name, value in found.items()}
        result["emoji_penalty_gain"] = result["emoji_penalty_dense"] - result["emoji_penalty_web"]
        poor = emoji.with_captions(poor_captions(emoji.pictures.captions, 1), study.encoder)
        result["emoji_penalty_web_own_captions"] = poor.losses(trained["web"].network)["penalty"]
        for name, arm in trained.items():
            images = emoji.draw(arm.network, plan.judged)
            result |= judged(f"emoji_{name}", images, emoji)
            score = AlignmentScorer().score(images, emoji.pictures.captions[: plan.judged])
            result[f"emoji_right_beats_random_{name}"] = float(score["right_beats_random"])
            if seed == 0:
                keep_samples(study, f"emoji_{name}", images, emoji)
        captions |= study.emoji_captions()
    for name, texts in captions.items():
        density = noun_density(texts)
        result[f"nouns_per_caption_{name}"] = density.nouns_per_caption
        result[f"valid_noun_share_{name}"] = density.valid_share
    if seed == 0 and plan.judged:
        keep_noun_table(study, captions)
    return result


def penalties(last: dict[str, dict[str, float]]) -> dict[str, float]:
    """Loss and wrong-caption penalty of the two arms of P3, and the penalties' ratio (of at least a thousandth)."""
    result = {f"{key}_{name}": values[key] for name, values in last.items() for key in ("mse", "penalty")}
    result["penalty_ratio"] = result["penalty_dense"] / max(result["penalty_web"], 1e-3)
    return result


def measure_p4(study: Study, seed: int) -> dict[str, float]:
    """Stages 1 and 2 of P2, then high-quality scenes; against one stage on a mixture for the same CPU seconds."""
    from pixart.model import PixArt

    plan = study.plan
    hq = study.data(scenes="hq")
    held_out = study.held_out("hq", hq)
    stage1, stage2 = study.stage1(seed), study.reparam(seed)
    aligned = study.train(
        "stage2",
        seed,
        lambda: stage2.network,
        lambda: study.dense_table,
        study.scenes.losses,
        steps=plan.stage3,
    )
    stage3 = study.train(
        "stage3",
        seed,
        lambda: aligned.network,
        lambda: study.table("hq", hq),
        held_out.losses,
        steps=plan.stage3,
        checkpoints=range(plan.stage3 // 4, plan.stage3, max(1, plan.stage3 // 4)),
    )
    seconds = stage1.seconds + stage2.seconds + aligned.seconds + stage3.seconds
    mixed = study.train(
        "mixed",
        seed,
        lambda: PixArt(study.shape()),
        lambda: study.table("all", study.data(scenes="all", images=2 * plan.images)),
        held_out.losses,
        seconds=seconds,
    )
    result = {"seconds_stages": seconds, "seconds_mixed": mixed.seconds, "steps_mixed": float(mixed.steps)}
    for name, arm in (("stages", stage3), ("mixed", mixed)):
        images = held_out.draw(arm.network, plan.judged)
        result[f"mse_{name}"] = arm.last["mse"]
        result[f"penalty_{name}"] = arm.last["penalty"]
        result |= judged(name, images, held_out, with_alignment=True)
        if seed == 0:
            keep_samples(study, f"hq_{name}", images, held_out)
    result["fid_drop"] = 1 - result["fid_stages"] / result["fid_mixed"]
    result["alignment_gain"] = result["alignment_stages"] - result["alignment_mixed"]
    return result


def measure_p5(study: Study, seed: int) -> dict[str, float]:
    """Twice the resolution with and without interpolated positions; square against bucketed training on 2:1."""
    from pixart.experiments import resized

    plan = study.plan
    start = study.dense(seed).network
    result: dict[str, float] = {}
    large = study.data(size=64, images=plan.images // 4)
    held_out = study.held_out("64px", large, plan.held_out // 2)
    for name, scale in (("s2", 2.0), ("s1", 1.0)):
        network = resized(start, input_size=2 * start.config.input_size, interpolation_scale=scale)
        result[f"mse_before_{name}"] = held_out.losses(network.eval())["mse"]
        arm = study.train(
            f"64px-{name}",
            seed,
            lambda network=network: network,  # type: ignore[misc]
            lambda: study.table("64px", large),
            held_out.losses,
            steps=plan.tune,
            checkpoints=[plan.tune // 4, plan.tune // 2],
        )
        result[f"mse_after_{name}"], result[f"penalty_after_{name}"] = arm.last["mse"], arm.last["penalty"]
        if seed == 0:
            keep_samples(study, f"64px_{name}", held_out.draw(arm.network, GRID), held_out)
    tall = study.held_out("2to1", study.data(ratios=[2.0]), plan.judged)
    for name, ratios in (("square", [1.0]), ("buckets", [0.5, 1.0, 2.0])):
        data = study.data(ratios=ratios)
        arm = study.train(
            name,
            seed,
            lambda: resized(start),
            lambda name=name, data=data: study.dense_table if name == "square" else study.table(name, data),  # type: ignore[misc]
            tall.losses,
            steps=plan.buckets,
        )
        images = tall.draw(arm.network, plan.judged)
        result |= judged(name, images, tall, with_alignment=True)
        result[f"mse_2to1_{name}"] = arm.last["mse"]
        if seed == 0:
            keep_samples(study, f"2to1_{name}", images, tall)
    return {
        "mse_ratio_before": result["mse_before_s2"] / result["mse_before_s1"],
        "mse_ratio_after": result["mse_after_s2"] / result["mse_after_s1"],
        "fid_ratio_buckets": result["fid_buckets"] / result["fid_square"],
        **result,
    }


GUIDANCE = {"1": 1.0, "3": 3.0, "4p5": 4.5, "7": 7.0}


def measure_p6(study: Study, seed: int) -> dict[str, float]:
    """Three samplers at guidance 3 and four guidance scales with the first, on P3's dense model."""
    plan, held_out = study.plan, study.scenes
    network = study.dense(seed).network
    result: dict[str, float] = {}
    samplers: dict[str, tuple[Any, int]] = {"iddpm": ("iddpm", 100), "sa": ("sa-solver", 25)}
    for name, (sampler, steps) in samplers.items():
        images = held_out.draw(network, plan.judged, 3.0, sampler, steps)
        result |= judged(name, images, held_out, with_alignment=True)
        result[f"calls_{name}"] = float(steps)
        if seed == 0:
            keep_samples(study, f"sampler_{name}", images, held_out)
    for name, scale in GUIDANCE.items():
        images = held_out.draw(network, plan.judged, scale)
        result |= judged(f"guidance_{name}", images, held_out, with_alignment=True)
        if seed == 0:
            keep_samples(study, f"guidance_{name}", images, held_out)
    return {
        "fid_ratio": result["fid_guidance_3"] / result["fid_iddpm"],
        "calls_ratio": 20 / result["calls_iddpm"],
        "fid_ratio_sa": result["fid_sa"] / result["fid_iddpm"],
        "alignment_gain_guidance": result["alignment_guidance_3"] - result["alignment_guidance_1"],
        "recall_drop_guidance": result["recall_guidance_1"] - result["recall_guidance_7"],
        **result,
    }


MEASURES: dict[str, Callable[[Study, int], dict[str, float]]] = {
    "P1": measure_p1,
    "P2": measure_p2,
    "P3": measure_p3,
    "P4": measure_p4,
    "P5": measure_p5,
    "P6": measure_p6,
}


def judged(name: str, images: Any, held_out: HeldOut, with_alignment: bool = False) -> dict[str, float]:
    """Distances to the held-out pictures (and alignment with their captions), each key ending in `_name`."""
    from pixart.experiments import alignment, distances, squared

    found = distances(images, held_out.features)
    if with_alignment:
        assert held_out.pictures.specs is not None
        found |= alignment(squared(images), held_out.pictures.specs[: len(images)])
    return {f"{key}_{name}": value for key, value in found.items()} | {f"images_{name}": float(len(images))}


def limits(held_out: HeldOut, count: int) -> dict[str, float]:
    """Alignment of real pictures with their own captions, and with those of the next picture."""
    from pixart.experiments import alignment

    specs = held_out.pictures.specs
    assert specs is not None
    real = held_out.images[:count]
    return {
        "alignment_real": alignment(real, specs[:count])["alignment"],
        "alignment_chance": alignment(real.roll(1, 0), specs[:count])["alignment"],
    }


def keep_samples(study: Study, name: str, images: Any, held_out: HeldOut) -> None:
    """A grid of the first seed's samples with their prompts."""
    from common.images import save_grid

    captions = held_out.pictures.captions[:GRID]
    save_grid(images[:GRID], figure_folder(study) / f"{name}.png", columns=4, captions=captions, tile=192)


def keep_noun_table(study: Study, captions: dict[str, list[str]]) -> None:
    """Table 1 for the caption sets that P3 trains on, as text beside the other results."""
    from common.files import write_atomically
    from pixart.noun_density import noun_density, table

    names = {"dense": "scenes, dense", "web": "scenes, LAION-like"}
    names |= {"emoji_dense": "emoji, dense", "emoji_web": "emoji, LAION-like"}
    text = table({names[name]: noun_density(texts) for name, texts in captions.items()}) + "\n"
    folder = RESULTS if study.plan.judged and study.folder.name.endswith("small") else study.folder
    write_atomically(folder / "noun_density_pixart.txt", lambda path: path.write_text(text, encoding="utf-8"))


def figure_folder(study: Study) -> Path:
    """results/figures/pixart for the small tier, else the working folder."""
    return FIGURES if study.folder.name.endswith("small") else study.folder


def open_study(tier: Tier) -> Study:
    """Data and arms of a tier, in one thread (budgets are CPU seconds)."""
    import torch

    from pixart.experiments import PLANS, Study

    torch.set_num_threads(1)
    return Study(PLANS[tier], REPOSITORY / "runs" / "reproduce" / f"pixart-{tier}")


def reproduce(study: Study, tier: Tier, names: list[str], output: Path) -> list[dict[str, Any]]:
    """Measure the named claims over the tier's seeds and write the ledger after each claim."""
    known = claims(tier)
    records = measure_claims(
        [known[name] for name in names],
        lambda _: SEEDS[tier],
        lambda name, seed: MEASURES[name](study, seed),
        study.folder,
        output,
    )
    if tier == "small":
        from pixart.figures import draw_figures

        draw_figures(output, FIGURES, study.folder / "arms")
    return records


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options_parser("pixart", __doc__)
    parser.add_argument("--calibrate", action="store_true", help="compare learning rates on an unused seed and stop")
    options = parser.parse_args(argv)
    names = chosen_claims(options, list(NAMES[options.tier]))
    study = open_study(options.tier)
    if options.calibrate:
        study.calibrate()
        return []
    return reproduce(study, options.tier, names, ledger_path(options, "pixart"))


if __name__ == "__main__":
    run_main(main)
