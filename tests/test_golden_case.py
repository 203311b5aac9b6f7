"""The goldens' tolerances: what another machine's float32 `exp` does to them, and what they still refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixart.model import sinusoids
from tests.golden_case import (
    REPOSITORY,
    Check,
    assert_sinusoids_close,
    assert_timed_close,
    exp_moved,
    run_matching_check,
    ulp_down,
    ulp_up,
)
from tests.instaflow.golden_cases import CHECKS as INSTAFLOW_CHECKS
from tests.ldm.golden_networks import CHECKS as LDM_CHECKS
from tests.pixart.golden_networks import CHECKS as PIXART_CHECKS

CHECKS = {"ldm": LDM_CHECKS, "pixart": PIXART_CHECKS, "instaflow": INSTAFLOW_CHECKS}
# Every kind of case in which a network sees the sinusoids of a time.
TIMED = {
    "ldm": ("unet", "classifier", "wrapper", "diffusers_unet"),
    "pixart": ("embedders", "net", "controlnet", "reparam", "diffusers_net"),
    "instaflow": ("rf_pipeline", "teacher_pairs", "eps_to_velocity", "baseline_progdist"),
}
CASES = [
    pytest.param(path, CHECKS[paper], id=f"{paper}-{path.stem}")
    for paper, kinds in TIMED.items()
    for path in sorted((REPOSITORY / "tests" / "golden" / paper).glob("*.safetensors"))
    if path.stem.startswith(kinds)
]


def ulp_mixed(value: Tensor) -> Tensor:
    """Up, as it is, down, up, ..."""
    place = torch.arange(value.numel()).view(value.shape) % 3
    return torch.where(place == 0, ulp_up(value), torch.where(place == 1, value, ulp_down(value)))


@pytest.mark.parametrize("change", [ulp_up, ulp_down, ulp_mixed])
@pytest.mark.parametrize(("path", "checks"), CASES)
def test_goldens_hold_where_exp_rounds_another_way(
    path: Path, checks: Sequence[Check], change: Callable[[Tensor], Tensor]
) -> None:
    with exp_moved(change):
        assert not torch.equal(torch.exp(torch.tensor([1.0])), torch.tensor([1.0]).exp())
        run_matching_check(path, checks)


@pytest.mark.parametrize("change", [lambda f: f * (1 + 1e-5), lambda f: f * (1 - 1e-5)])
@pytest.mark.parametrize(("path", "checks"), [case for case in CASES if "embedders" in case.values[0].stem])
def test_frequencies_that_are_wrong_by_a_hundred_thousandth_are_refused(
    path: Path, checks: Sequence[Check], change: Callable[[Tensor], Tensor]
) -> None:
    with exp_moved(change), pytest.raises(AssertionError, match="argument x 2"):
        run_matching_check(path, checks)


def test_sines_for_cosines_are_refused() -> None:
    t_B = torch.tensor([999.0, 1.0, 0.0])
    right, half = sinusoids(t_B), 128
    argument_BE = t_B[:, None] * 10000.0 ** (-torch.arange(256) % half / half)
    assert_sinusoids_close(right, right, argument_BE, "features")
    with pytest.raises(AssertionError, match="features"):
        assert_sinusoids_close(right.roll(half, 1), right, argument_BE, "features")


def test_a_timed_output_may_move_as_far_as_its_argument_is_unknown_and_no_further() -> None:
    t_B, weight_E = torch.tensor([999.0]), torch.ones(256)

    def output() -> Tensor:
        return sinusoids(t_B) @ weight_E

    right = output()
    assert_timed_close(output, right, "output")
    with exp_moved(ulp_up):
        moved = output()
    assert float((moved - right).abs()) > 0
    assert_timed_close(output, moved, "output")
    for fault in (right + 4 * (moved - right).abs() + 1.1e-5 * max(1.0, float(right.abs())), -right):
        with pytest.raises(AssertionError, match="output"):
            assert_timed_close(output, fault, "output")
    untimed = torch.tensor([1.0])
    with pytest.raises(AssertionError, match=r"allowed 1\.000e-05"):
        assert_timed_close(lambda: untimed, untimed + 2e-5, "output")
