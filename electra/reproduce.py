"""Measure the paper's claims at small scale; writes results/electra.json and its figures.

    python electra/reproduce.py                  # tier small: 3 seeds of every claim, some hours of one core
    python electra/reproduce.py --claims E1 E2   # some of them
    python electra/reproduce.py --seeds 1        # one seed only, without a record: for a second process on another core
    python electra/reproduce.py --tier smoke     # what CI runs, about a minute
    python electra/reproduce.py --cost           # what an arm, a fine-tuning and each claim take on this machine
    python electra/reproduce.py --calibrate      # how the fine-tuning rates were chosen, on an unused seed

The claims, with targets, sizes and budgets, are in claims.yaml. One thread. Arms of a comparison are equal in training
FLOPs by the official counter, or in steps where the paper's are. Every trained arm, every score and every finished
(claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it stopped; arms are shared between
claims.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import reproduction
from common.cli import Parser
from common.errors import run_main
from common.files import write_json
from common.ledger import read_claims
from common.paths import REPOSITORY
from common.study import open_sizes
from electra.experiments import OBJECTIVES, SCRATCH, SHARES, SIZES, Sizes, Study
from electra.flops import OFFICIAL_OUTPUT_SHARE, inference_flops, training_flops
from electra.plan import count_parameters, paper_config

SCORE = "acceptability"  # the task that the claims are about; the others are reported beside it
OTHERS = {"electra": "ELECTRA", "all_tokens_mlm": "All-Tokens MLM"}
MASKED_ONLY = {"replace_mlm": "Replace MLM", "electra15": "ELECTRA 15%", "mlm": "BERT"}


def scored(study: Study, seed: int, arms: Mapping[str, str], tasks: Sequence[str]) -> dict[str, float]:
    """`TASK_LABEL` for every task and arm and for the network from scratch, and what the arms cost.

    Args:
        arms: arm names by the labels that keys end in.
    """
    found: dict[str, float] = {}
    for name in arms.values():
        found |= study.pretrained(name, seed).costs()
    for task in tasks:
        for label, name in {**arms, SCRATCH: SCRATCH}.items():
            found[f"{task}_{label}"] = study.score(name, seed, task)
    return found


def with_averages(values: dict[str, float], labels: Iterable[str], tasks: Sequence[str]) -> dict[str, float]:
    """The same with `average_LABEL` over the tasks."""
    means = {f"average_{label}": sum(values[f"{task}_{label}"] for task in tasks) / len(tasks) for label in labels}
    return {**values, **means}


def e1(study: Study, seed: int) -> dict[str, float]:
    """ELECTRA against ELECTRA 15%: equal steps are equal FLOPs here."""
    arms = {"electra": "electra", "electra15": "electra15"}
    values = scored(study, seed, arms, study.tasks)
    if seed == 0:
        keep_example(study)
    gain = values[f"{SCORE}_electra"] - values[f"{SCORE}_electra15"]
    curves = {f"auc_{name}": study.pretrained(name, seed).last["rtd_auc"] for name in arms}
    return with_averages({"gain": gain, **values, **curves}, (*arms, SCRATCH), study.tasks)


def e2(study: Study, seed: int) -> dict[str, float]:
    """ELECTRA against BERT."""
    arms = {"electra": "electra", "mlm": "mlm"}
    values = scored(study, seed, arms, study.tasks)
    gains = {
        "gain": values[f"{SCORE}_electra"] - values[f"{SCORE}_mlm"],
        "gain_over_scratch": values[f"{SCORE}_electra"] - values[f"{SCORE}_{SCRATCH}"],
    }
    return with_averages({**gains, **values}, (*arms, SCRATCH), study.tasks)


def e3(study: Study, seed: int) -> dict[str, float]:
    """All five objectives of table 5."""
    values = scored(study, seed, {name: name for name in OBJECTIVES}, study.tasks)
    score = {name: values[f"{SCORE}_{name}"] for name in OBJECTIVES}
    gains = {f"{ours}_minus_{other}": score[ours] - score[other] for ours in OTHERS for other in MASKED_ONLY}
    gains["gain"] = sum(gains.values()) / len(gains)  # mean of the two less mean of the three
    return with_averages({**gains, **values}, (*OBJECTIVES, SCRATCH), study.tasks)


def generators(study: Study) -> dict[str, str]:
    """E4's arms by the generator's size."""
    own = {name for name, factor in SIZES.items() if factor == study.sizes.generator}
    sized = {name: study.swept("electra") if name in own else f"size-{name}" for name in SIZES}
    return {**sized, "unigram": "unigram", "uniform": "uniform"}


def over_rivals(values: Mapping[str, float], prefix: str, gain: str) -> dict[str, float]:
    """How far the mean of the quarter and half generators lies above the others."""
    middle = (values[f"{prefix}_quarter"] + values[f"{prefix}_half"]) / 2
    return {f"{gain}_{rival}": middle - values[f"{prefix}_{rival}"] for rival in ("full", "unigram", "uniform")}


def e4a(study: Study, seed: int) -> dict[str, float]:
    """Detection of one generator's samples after training against generators of six kinds."""
    corruptions = study.common_corruptions(seed)
    values: dict[str, float] = {}
    for label, name in generators(study).items():
        values[f"auc_{label}"] = study.common_auc(name, seed, corruptions)
        values |= study.pretrained(name, seed).costs()
        values[f"own_auc_{label}"] = study.pretrained(name, seed).last["rtd_auc"]
    return {**over_rivals(values, "auc", "auc_gain"), **values}


def e4b(study: Study, seed: int) -> dict[str, float]:
    """The same arms after fine-tuning."""
    values = scored(study, seed, generators(study), [SCORE])
    return {**over_rivals(values, SCORE, "gain"), **values}


TYING = {"none": "tying-none", "embeddings": "size-full", "all": "tying-all"}


def e5a(study: Study, seed: int) -> dict[str, float]:
    """Tying, judged on the common generator's samples."""
    corruptions = study.common_corruptions(seed)
    values = {f"auc_{label}": study.common_auc(name, seed, corruptions) for label, name in TYING.items()}
    for label, name in TYING.items():
        arm = study.pretrained(name, seed)
        values |= {f"own_auc_{label}": arm.last["rtd_auc"], **arm.costs()}
    gains = {"gain": values["auc_embeddings"] - values["auc_none"], "gain_all": values["auc_all"] - values["auc_none"]}
    return {**gains, **values}


def e5b(study: Study, seed: int) -> dict[str, float]:
    """Tying after fine-tuning."""
    values = scored(study, seed, TYING, [SCORE])
    none = values[f"{SCORE}_none"]
    return {
        "gain": values[f"{SCORE}_embeddings"] - none,
        "gain_all": values[f"{SCORE}_all"] - none,
        **values,
    }


def e6a(study: Study, seed: int) -> dict[str, float]:
    """The generators of joint and adversarial training."""
    arms = {"joint": study.swept("electra"), "adversarial": "adversarial"}
    values: dict[str, float] = {}
    for label, name in arms.items():
        arm = study.pretrained(name, seed)
        values[f"accuracy_{label}"] = 100 * arm.last["mlm_accuracy"]
        values[f"loss_{label}"] = arm.last["mlm_loss"]
        values[f"entropy_{label}"] = study.generator_entropy(name, seed)
        values |= arm.costs()
    return {
        "accuracy_gain": values["accuracy_joint"] - values["accuracy_adversarial"],
        "loss_gain": values["loss_adversarial"] - values["loss_joint"],
        "entropy_drop": values["entropy_joint"] - values["entropy_adversarial"],
        **values,
    }


def e6b(study: Study, seed: int) -> dict[str, float]:
    """The second stage's first steps with and without a copy of the first stage's weights."""
    uncopied = study.pretrained("uncopied", seed)
    copied = study.pretrained("two_stage", seed).at(uncopied.steps)
    return {
        "recall_uncopied": uncopied.last["rtd_recall"],
        "recall_copied": copied["rtd_recall"],
        "auc_uncopied": uncopied.last["rtd_auc"],
        "auc_copied": copied["rtd_auc"],
        **uncopied.costs(),
    }


def e6c(study: Study, seed: int) -> dict[str, float]:
    """Joint, two-stage and adversarial training after fine-tuning, with BERT beside them."""
    arms = {
        "joint": study.swept("electra"),
        "two_stage": "two_stage",
        "adversarial": "adversarial",
        "mlm": study.swept("mlm"),
    }
    values = scored(study, seed, arms, [SCORE]) | study.pretrained("two_stage_generator", seed).costs()
    return {
        "joint_minus_two_stage": values[f"{SCORE}_joint"] - values[f"{SCORE}_two_stage"],
        "two_stage_minus_adversarial": values[f"{SCORE}_two_stage"] - values[f"{SCORE}_adversarial"],
        "adversarial_minus_mlm": values[f"{SCORE}_adversarial"] - values[f"{SCORE}_mlm"],
        **values,
    }


def e7a(study: Study, seed: int) -> dict[str, float]:
    """ELECTRA after five lengths of training."""
    lengths = [*SHARES, "100"]
    arms = {name: "electra" if name == "100" else f"electra-{name}" for name in lengths}
    values = scored(study, seed, arms, [SCORE])
    rises = {
        f"rise_{later}": values[f"{SCORE}_{later}"] - values[f"{SCORE}_{earlier}"]
        for earlier, later in pairwise(lengths)
    }
    return {"rise_total": sum(rises.values()), **rises, **values}


def e7b(study: Study, seed: int) -> dict[str, float]:
    """BERT after the same lengths, and ELECTRA at a quarter against BERT at half."""
    arms = {name: "mlm" if name == "100" else f"mlm-{name}" for name in (*SHARES, "100")}
    values = scored(study, seed, {**arms, "electra_25": "electra-25"}, [SCORE])
    return {"gain": values[f"{SCORE}_electra_25"] - values[f"{SCORE}_50"], **values}


# Tables 1 and 2, and what the authors' flops_computation.py prints for the same models (None: not among them).
PUBLISHED_FLOPS: dict[str, tuple[float, float | None]] = {
    "electra_small": (1.4e18, 1.293743798272e18),
    "bert_small": (1.4e18, 1.4187399146496e18),
    "electra_base": (6.4e19, 6.424541834277683e19),
    "bert_base": (6.4e19, 6.428335104e19),
    "electra_400k": (7.1e20, None),
    "electra_1750k": (3.1e21, None),
    "inference_small": (3.7e9, 3677281792.0),
    "inference_base": (2.9e10, 28616498688.0),
}
BERT_STEPS = {"small": 1.45e6, "base": 1e6}
LONG_STEPS = 1.75e6  # of ELECTRA-1.75M
# Discriminator with its head, generator with its head, trained together.
PARAMETERS = {
    "small": (13_549_057, 4_620_026, 14_196_219),
    "base": (109_483_009, 33_740_602, 119_386_427),
    "large": (335_142_913, 51_295_290, 354_655_291),
}


def counted_flops() -> dict[str, float]:
    """The rows of `PUBLISHED_FLOPS` by our counter and the published configurations."""
    from electra.plan import paper_config

    found: dict[str, float] = {}
    for name in ("small", "base"):
        run, model = paper_config(name)
        sizes = (run.trainer.batch_size, run.data.length)
        found[f"electra_{name}"] = training_flops(model, "electra", run.trainer.max_steps, *sizes)
        found[f"bert_{name}"] = training_flops(model, "mlm", BERT_STEPS[name], *sizes)
        found[f"inference_{name}"] = float(inference_flops(model, 128))
    run, model = paper_config("large")
    for name, steps in (("electra_400k", float(run.trainer.max_steps)), ("electra_1750k", LONG_STEPS)):
        # The tables count softmaxes at 15.625 % of the tokens, for Large's 25 % masks too.
        found[name] = training_flops(
            model,
            "electra",
            steps,
            run.trainer.batch_size,
            run.data.length,
            output_share=OFFICIAL_OUTPUT_SHARE,
        )
    return found


def e8(study: Study, seed: int) -> dict[str, float]:
    """FLOPs and parameters; at the small tier also the golden cases (once, they have no seed)."""
    ours = counted_flops()
    to_table = {name: abs(ours[name] / table - 1) for name, (table, _) in PUBLISHED_FLOPS.items()}
    to_code = [abs(ours[name] / code - 1) for name, (_, code) in PUBLISHED_FLOPS.items() if code is not None]
    difference = 0
    for name, (discriminator, generator, together) in PARAMETERS.items():
        counts = count_parameters(paper_config(name)[1])
        difference += sum(
            abs(a - b) for a, b in zip((counts[0], counts[1], counts[3]), (discriminator, generator, together))
        )
    values = {
        "flops_error_tables": max(error for name, error in to_table.items() if name != "electra_small"),
        "flops_error_electra_small": to_table["electra_small"],
        "flops_error_counter": max(to_code),
        "parameter_difference": float(difference),
        **{f"flops_{name}": value for name, value in ours.items()},
    }
    return values | (golden_cases() if study.sizes.test_examples is None else {})


_goldens: dict[str, float] = {}


def golden_cases() -> dict[str, float]:
    """How many checks of tests/electra/test_golden.py pass and fail; a run in which none passes has failed."""
    if not _goldens:
        with tempfile.TemporaryDirectory(prefix="goldens") as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
            command.append("tests/electra/test_golden.py")
            subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
            suites = ElementTree.parse(report).iter("testsuite") if report.is_file() else iter(())
            counts = [{key: int(s.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for s in suites]
        failed = sum(count["failures"] + count["errors"] for count in counts)
        passed = sum(count["tests"] - count["skipped"] for count in counts) - failed
        _goldens["goldens_passed"] = float(passed)
        _goldens["goldens_failed"] = float(failed if passed else max(failed, 1))
    return dict(_goldens)


def keep_example(study: Study) -> None:
    """The first held-out rows with the main arm's scores, for the picture."""
    write_json(study.folder / "example.json", study.corrupted_example("electra", 0))


def arms_of(study: Study) -> dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    """What each claim needs: the arms it pre-trains, those it fine-tunes (without scratch), and on which tasks."""
    electra, mlm = study.swept("electra"), study.swept("mlm")
    sizes, tying = tuple(generators(study).values()), tuple(TYING.values())
    curves = {kind: (*(f"{kind}-{name}" for name in SHARES), kind) for kind in ("electra", "mlm")}
    two_stage = ("two_stage_generator", "two_stage")
    return {
        "E1": (("electra", "electra15"), ("electra", "electra15"), study.tasks),
        "E2": (("electra", "mlm"), ("electra", "mlm"), study.tasks),
        "E3": (OBJECTIVES, OBJECTIVES, study.tasks),
        "E4a": ((*sizes, mlm), (), ()),
        "E4b": (sizes, sizes, (SCORE,)),
        "E5a": ((*tying, mlm), (), ()),
        "E5b": (tying, tying, (SCORE,)),
        "E6a": ((electra, "adversarial"), (), ()),
        "E6b": ((*two_stage, "uncopied"), (), ()),
        "E6c": (
            (electra, *two_stage, "adversarial", mlm),
            (electra, "two_stage", "adversarial", mlm),
            (SCORE,),
        ),
        "E7a": (curves["electra"], curves["electra"], (SCORE,)),
        "E7b": ((*curves["mlm"], "electra-25"), (*curves["mlm"], "electra-25"), (SCORE,)),
        "E8": ((), (), ()),
    }


def print_cost(study: Study, seeds: int) -> dict[str, Any]:
    """Time a few steps of every arm and a part of every fine-tuning; print what each claim would take.

    A claim's share counts what the claims before it in the list have not trained or fine-tuned already.
    """
    needs = arms_of(study)
    wanted = dict.fromkeys(name for arms, _, _ in needs.values() for name in arms)
    kinds: dict[tuple[Any, ...], float] = {}
    minutes: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    print(f"{'arm':22}{'steps':>8}{'TFLOP':>9}{'ms/step':>9}{'s/TFLOP':>9}{'core-min':>10}")
    for name in wanted:
        spec = study.specs[name]
        kind = (spec.objective, *sorted(spec.changes.items()))
        if kind not in kinds:
            kinds[kind] = study.seconds_per_step(name)
        step, tflop = kinds[kind], study.flops(spec) / 1e12
        minutes[name] = step * spec.steps / 60
        rows.append({"arm": name, "steps": spec.steps, "tflop": tflop, "s_per_tflop": step * spec.steps / tflop})
        print(
            f"{name:22}{spec.steps:8d}{tflop:9.3f}{1e3 * step:9.1f}{rows[-1]['s_per_tflop']:9.1f}{minutes[name]:10.2f}",
            flush=True,
        )
    tuning = {task: study.finetuning_seconds(task) / 60 for task in study.tasks}
    print("one fine-tuning, core-min: " + ", ".join(f"{task} {value:.2f}" for task, value in tuning.items()))
    trained: set[str] = set()
    tuned: set[tuple[str, str]] = set()
    cost: dict[str, float] = {}
    for claim, (arms, scored_arms, tasks) in needs.items():
        new_arms = set(arms) - trained
        pairs = {(name, task) for name in (*scored_arms, *(("scratch",) if scored_arms else ())) for task in tasks}
        new_pairs = pairs - tuned
        trained |= new_arms
        tuned |= new_pairs
        fine = sum(tuning[task] for _, task in new_pairs) * study.sizes.finetunings
        cost[claim] = seeds * (sum(minutes[name] for name in new_arms) + fine)
        print(
            f"{claim:4} {cost[claim]:8.1f} core-min for {seeds} seeds: {len(new_arms)} new arms, "
            f"{len(new_pairs)} new scores (fine-tuning {seeds * fine:.1f})"
        )
    print(f"all  {sum(cost.values()):8.1f} core-min")
    return {"arms": rows, "claims": cost, "finetuning_minutes": tuning}


def figures(study: Study, ledger: Path) -> None:
    from electra.figures import draw_figures

    draw_figures(ledger, study.figures, study.folder)


def options(parser: Parser) -> None:
    parser.add_argument("--cost", action="store_true", help="time every arm for a few steps, print the bill and stop")
    parser.add_argument("--calibrate", action="store_true", help="compare fine-tuning rates on an unused seed and stop")


def cost_or_calibration(study: Study, given: argparse.Namespace) -> bool:
    if given.calibrate:
        study.calibrate()
    elif given.cost:
        print_cost(study, len(read_claims("electra", given.tier)["E8"].seeds))
    return bool(given.calibrate or given.cost)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "electra",
        __doc__,
        (e1, e2, e3, e4a, e4b, e5a, e5b, e6a, e6b, e6c, e7a, e7b, e8),
        lambda given: Study(open_sizes(Sizes, "electra", given.tier, given.rung), given.folder),
        figures=figures,
        options=options,
        instead=cost_or_calibration,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
