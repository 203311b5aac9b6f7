"""What a recipe costs: counts on real and on empty tensors, what a GPU holds, tables."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.costs import (
    GPUS,
    Cluster,
    Fit,
    Gpu,
    aligned,
    cluster_of,
    fit,
    flop,
    half_bytes,
    kept_bytes,
    number,
    parameter_count,
    plan_parser,
    show,
)
from tests.refusals import refused

ROUND = Cluster("card", 4, 0.5, {"card": Gpu(10, 100)})


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kept_activations_are_counted_once_and_without_weights(device: str) -> None:
    with torch.device(device):
        # The first layer keeps its input; ReLU and the second layer keep the same tensor.
        net, x = two_layers(), torch.zeros(7, 10)
        assert kept_bytes(lambda: net(x), net.parameters()) == 4 * 7 * (10 + 20)
        assert kept_bytes(lambda: net(x), net.parameters(), half_bytes) == 2 * 7 * (10 + 20)


def test_of_several_tensors_on_one_storage_the_largest_counts() -> None:
    x = torch.ones(6, requires_grad=True)
    wide = x * 1.0
    assert kept_bytes(lambda: (wide.square(), wide[:2].square()), [], lambda tensor: tensor.numel()) == 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_are_those_of_products_and_of_attention(device: str) -> None:
    with torch.device(device):
        net, x = two_layers(), torch.zeros(7, 10)
        assert flop(lambda: net(x)) == 2 * 7 * (10 * 20 + 20 * 5)
        q = torch.zeros(2, 3, 5, 8)
        assert flop(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 3) * 5 * 5 * 8


def test_shared_parameters_count_once() -> None:
    net = two_layers()
    assert parameter_count(net, net[0], None) == 10 * 20 + 20 + 20 * 5 + 5  # type: ignore[index]


def test_gpu_days_are_flop_over_what_is_reached() -> None:
    assert ROUND.gpu_days(0.5 * 100e12 * 86400 * 3) == pytest.approx(3)
    assert ROUND.share(9) == 3 and ROUND.room == 9e9
    assert ROUND.describe("float32") == "4 x card (10 GB, 100 TFLOP/s float32) at 50% of peak"
    assert Cluster("h100", 1, 0.0066).describe().endswith("at 0.7% of peak")


def test_what_does_not_fit_is_recomputed_then_split() -> None:
    assert str(fit(ROUND, 16, state=1e9, kept=2e9)) == "9.0"
    assert str(fit(ROUND, 16, state=1e9, kept=3e9, recomputed=1e9)) == "5.0 +ckpt"
    assert fit(ROUND, 64, state=1e9, kept=3e9, recomputed=1e9) == Fit(9.0, True, 2)
    assert fit(ROUND, 16, state=1e9, kept=3e9) == Fit(7.0, False, 2)
    assert fit(ROUND, 64, state=1e9, kept=3e9, recomputed=1e9, split=False) == Fit(17.0, True, 1)
    refused(r"base does not fit a card: .* take 8\.5 GB", fit, ROUND, 4, state=8.5e9, kept=1e9, what="base")


@pytest.mark.parametrize(
    ("gpu", "gpus", "utilisation", "message"),
    [("tpu", 1, 0.5, "unknown GPU 'tpu'; known: v100"), ("h100", 0, 0.5, "--gpus"), ("h100", 1, 40, "--utilisation")],
)
def test_impossible_clusters_are_refused(gpu: str, gpus: int, utilisation: float, message: str) -> None:
    refused(message, Cluster, gpu, gpus, utilisation)


def test_options_name_a_cluster() -> None:
    parser = plan_parser("text", Cluster("v100", 2, 0.4))
    assert cluster_of(parser.parse_args([])) == Cluster("v100", 2, 0.4)
    given = parser.parse_args(["--gpu", "h200", "--gpus", "16", "--utilisation", "0.3"])
    assert cluster_of(given) == Cluster("h200", 16, 0.3) and cluster_of(given).card == GPUS["h200"]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    text = aligned([["name", "M"], ["a", number(1234.56)], ["longest", number(None)], ["b", ""]])
    assert text.splitlines() == ["name           M", "----------------", "a        1,234.6", "longest        -", "b"]
    assert aligned([["a", "b"], ["cc", "dd"]], left=()).splitlines()[0] == " a   b"


def test_plans_are_shown_as_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Plan:
        name: str

    show([Plan("x")], "the table", False)
    assert capsys.readouterr().out == "the table\n"
    show([Plan("x")], "the table", True)
    assert json.loads(capsys.readouterr().out) == [{"name": "x"}]
