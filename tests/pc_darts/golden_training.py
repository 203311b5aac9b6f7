"""Checks of the recorded cases that concern schedules, losses and augmentation."""

from __future__ import annotations

import torch

from common.data.augmentation import cutout_mask
from pc_darts import schedules
from pc_darts.losses import label_smoothing_cross_entropy
from tests.golden_case import Case, Check, assert_close

TOLERANCE = 1e-5


def check_label_smoothing(case: Case) -> None:
    given = case.group("in")
    loss = label_smoothing_cross_entropy(given["logits"], given["target"], case.config["epsilon"])
    assert_close(loss, case.group("out")["loss"], "loss", TOLERANCE)


def check_cutout(case: Case) -> None:
    length = case.config["length"]
    for name, mask_HW in case.group("out").items():
        row, column = case.group("in")[name.replace("mask", "center")].tolist()
        found = cutout_mask(*mask_HW.shape, row, column, length)
        assert_close(torch.as_tensor(found).float(), mask_HW, name, 0.0)


def check_schedules(case: Case) -> None:
    """Tables of one value an epoch; the first matching name of a table decides which schedule it is."""
    functions = {
        "imagenet_linear": lambda e, t: schedules.imagenet_final(e, t["epochs"], t["lr0"], t["warmup_epochs"]),
        "imagenet_search": lambda e, t: schedules.imagenet_search(e, t["epochs"], t["lr0"], t["warmup_epochs"]),
        "cosine": lambda e, t: schedules.cosine(e, t["epochs"], t["lr0"]),
        "drop_path": lambda e, t: schedules.drop_path_ramp(e, t["epochs"], t["p"]),
    }
    tables = {name: table for name, table in case.config.items() if isinstance(table, dict)}
    assert tables, "no table"
    for name, table in tables.items():
        function = next(f for start, f in functions.items() if name.startswith(start))
        values = table["p_epoch"] if "p_epoch" in table else table["lr"]
        found = [function(epoch, table) for epoch in range(len(values))]
        expected = torch.tensor(values, dtype=torch.float64)
        assert_close(torch.tensor(found, dtype=torch.float64), expected, name, 1e-9)


CHECKS = [
    Check("label smoothing", lambda case: case.stem.startswith("label_smooth"), check_label_smoothing),
    Check("cutout", lambda case: case.stem.startswith("cutout"), check_cutout),
    Check("schedules", lambda case: case.stem.startswith("schedules"), check_schedules),
]
