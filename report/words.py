"""What a record of the ledger says, in words: names of metrics, numbers, times."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.ledger import passes
from report.plots import number, spread

SIGNS = {">=": "≥", "<=": "≤"}
YES_SHARE = 1.0  # a condition `metric >= 1` on values of 0 and 1 is a question with yes and no
_FEW = 2048  # of fewer images the Frechet distance says little beside other work's
_NAMES = {
    "fid": "FID", "rfid": "rFID", "kid": "KID", "x1000": "× 1000", "fd": "FD", "psnr": "PSNR", "ssim": "SSIM",
    "auc": "AUC", "mse": "MSE", "tflop": "TFLOP", "flops": "FLOPs", "cpu": "CPU", "kl": "KL", "vq": "VQ", "gan": "GAN",
    "mlm": "MLM", "rtd": "RTD", "hf": "high-frequency", "lru": "LRU", "lfu": "LFU", "2rf": "2-RF", "ddim": "DDIM",
    "dpm": "DPM-Solver", "pc": "PC-DARTS", "darts": "DARTS", "1p5": "1.5", "4p5": "4.5", "ms": "(ms)", "mb": "MB",
    "iddpm": "iDDPM", "sa": "SA-Solver", "electra": "ELECTRA", "electra15": "ELECTRA 15%", "pos": "parts of speech",
    "std": "standard deviation", "noattn": "without attention", "zero0": "ZeRO 0", "zero2": "ZeRO 2", "s1": "s = 1",
    "s2": "s = 2",
}  # fmt: skip


def in_words(metric: str) -> str:
    """A metric's name where nobody has said it better (`words` of a claims.yaml)."""
    words = [_NAMES.get(part, part) for part in metric.split("_")]
    return re.sub(r"\b([fK])(\d+)\b", r"\1 = \2", " ".join(words))


@dataclass(frozen=True)
class Measured:
    """One condition of a target, and what came out.

    Args:
        mean: over the seeds, None where one diverged; text: `mean ± std` with as many digits as the verdict needs.
        yes: in how many seeds the answer was yes, for a question with yes and no.
    """

    metric: str
    op: str
    bar: float
    mean: float | None
    text: str
    met: bool
    yes: int | None = None


def conditions(record: Mapping[str, Any]) -> list[Measured]:
    """The headline's condition, then the further ones."""
    target, rows = record["target"], record["measured"]
    asked = [(target["metric"], target["op"], target["value"])]
    asked += [(entry["metric"], entry["op"], entry["target"]) for entry in target["conditions"]]
    found = []
    for metric, op, bar in asked:
        values = [row.get(metric) for row in rows]
        mean = None if None in values else statistics.mean(values)
        std = None if None in values or len(values) < 2 else statistics.stdev(values)
        text = spread(mean, std) if len(values) > 1 else number(mean)
        question = op == ">=" and bar == YES_SHARE and set(values) <= {0, 1, None}
        met = passes(mean, op, bar)
        yes = sum(value == 1 for value in values) if question else None
        found.append(Measured(metric, op, bar, mean, _decided(mean, text, op, bar), met, yes))
    return found


def _decided(mean: float | None, text: str, op: str, bar: float) -> str:
    """`text` with so many digits of the mean that one sees on which side of the bar it lies."""
    head, sign, std = text.partition(" ± ")
    if mean is None or "e" in head or "\u202f" in head:
        return text
    decimals = len(head.partition(".")[2])
    while decimals < 9 and passes(round(mean, decimals), op, bar) != passes(mean, op, bar):
        decimals += 1
        head = f"{mean:.{decimals}f}".replace("-", "−")
    return f"{head}{sign}{std}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def time_taken(record: Mapping[str, Any]) -> str:
    """What measuring took. Arms that claims share were trained once; where the record says for how long, so do we."""
    seconds = record["seconds"]
    shared = sum(value or 0.0 for row in record["measured"] for key, value in row.items() if "cpu_seconds" in key)
    if shared > seconds:
        return f"{duration(shared)} of CPU time for its arms, shared with other claims; {duration(seconds)} to measure"
    if seconds < 1:
        return "time not on record: its parts were there already"
    return duration(seconds)


def few_images(record: Mapping[str, Any], images: int | None) -> str:
    """A warning where a Frechet distance stands on few images; empty where there is none to give.

    Args:
        images: that the claim's arms were judged on, where its sizes say so.
    """
    keys = [key for row in record["measured"] for key in row]
    counted = [row[key] for row in record["measured"] for key in row if key.startswith("images_")]
    count = min(counted) if counted else images
    if count is None or count >= _FEW or not any({"fid", "fd", "rfid"} & set(key.split("_")) for key in keys):
        return ""
    return f"Frechet distances of {number(count)} images: they compare within this claim only"


def commits(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commits of some records; one whose code had changes that were not committed is said to."""
    found = dict.fromkeys(record["commit"] for record in records)
    return [
        f"{name.removesuffix('-dirty')} with changes not committed" if name.endswith("-dirty") else name
        for name in found
    ]
