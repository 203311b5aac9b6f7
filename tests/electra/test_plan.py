"""Sizes and costs of the published models."""

from __future__ import annotations

import json

import pytest
import torch

from common.costs import Cluster, parameter_count
from common.errors import UserError
from electra.config import ElectraConfig
from electra.flops import OFFICIAL_OUTPUT_SHARE, inference_flops, steps_for, training_flops
from electra.masking import SpecialIds
from electra.objectives import OBJECTIVES, ElectraPretrainer
from electra.plan import PUBLISHED, count_parameters, main, paper_config, plan

SIZES = {"small": ElectraConfig.small(), "base": ElectraConfig.base(), "large": ElectraConfig.large()}


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("small", (13_549_057, 4_620_026, 3_972_864, 14_196_219)),
        ("base", (109_483_009, 33_740_602, 23_837_184, 119_386_427)),
        ("large", (335_142_913, 51_295_290, 31_782_912, 354_655_291)),
    ],
)
def test_parameter_counts_are_those_of_the_official_models(size: str, counts: tuple[int, ...]) -> None:
    assert count_parameters(SIZES[size]) == counts


def test_the_released_small_generator_is_as_wide_as_its_discriminator() -> None:
    assert count_parameters(ElectraConfig.small(generator_factor=1.0))[1] == 13_546_682


def test_the_bert_baseline_has_the_size_of_table_1() -> None:
    with torch.device("meta"):
        model = ElectraPretrainer(ElectraConfig.base(), SpecialIds(), "mlm")
    assert round(parameter_count(model) / 1e6) == 110


def test_training_flops_are_those_of_the_papers_tables() -> None:
    def electra(size: str, steps: float, batch: int, length: int) -> float:
        # The paper counts softmaxes at 15.625 % of the tokens for every model.
        return training_flops(SIZES[size], "electra", steps, batch, length, output_share=OFFICIAL_OUTPUT_SHARE)

    assert electra("small", 1e6, 128, 128) == 1.293743798272e18
    assert training_flops(SIZES["small"], "mlm", 1.45e6, 128, 128) == pytest.approx(1.4187399146496e18)
    # Table 1; the official script differs from the table by less than half a unit of its last digit.
    assert electra("base", 766e3, 256, 512) == pytest.approx(6.4e19, rel=0.02)
    assert training_flops(SIZES["base"], "mlm", 1e6, 256, 512) == pytest.approx(6.4e19, rel=0.02)
    assert training_flops(SIZES["small"], "mlm", 1.45e6, 128, 128) == pytest.approx(1.4e18, rel=0.02)
    assert inference_flops(SIZES["small"]) == pytest.approx(3.7e9, rel=0.02)
    assert inference_flops(SIZES["base"]) == pytest.approx(2.9e10, rel=0.02)
    # Table 2
    assert electra("large", 400e3, 2048, 512) == pytest.approx(7.1e20, rel=0.02)


def test_every_softmax_and_the_generator_are_counted() -> None:
    config = ElectraConfig(vocab_size=8000, layers=2)
    cost = {objective: training_flops(config, objective, 1, 8, 64) for objective in OBJECTIVES}
    assert cost["electra"] == cost["electra15"]
    assert cost["mlm"] < cost["replace_mlm"] < cost["all_tokens_mlm"]
    generator = training_flops(config, "mlm", 1, 8, 64)
    free = training_flops(ElectraConfig(vocab_size=8000, layers=2, generator="uniform"), "electra", 1, 8, 64)
    assert free < cost["electra"] and cost["replace_mlm"] > generator


def test_a_budget_buys_as_many_steps_as_it_pays_for() -> None:
    config = SIZES["small"]
    steps = steps_for(config, "electra", 1e15, 128, 128)
    assert training_flops(config, "electra", steps, 128, 128) == pytest.approx(1e15, rel=1e-3)
    assert steps_for(config, "all_tokens_mlm", 1e15, 128, 128) < steps_for(config, "mlm", 1e15, 128, 128)
    assert steps_for(config, "electra", 1.0, 128, 128) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_configurations_are_the_published_sizes(name: str) -> None:
    assert paper_config(name)[1] == SIZES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_planned_costs_lie_near_the_papers(name: str) -> None:
    cost = plan(name, Cluster("h200", 8, 0.35))
    # The table's small model is given with the larger figure of its BERT baseline.
    assert cost.training_flops == pytest.approx(PUBLISHED[name].training_flops, rel=0.08)
    assert cost.memory_gb_per_gpu < 0.9 * 141
    # What is run: the embeddings are looked up, not multiplied, but backward costs twice the forward pass.
    assert 0.5 < cost.step_flop * cost.steps / cost.training_flops < 2


def test_a_larger_share_of_the_batch_is_taken_in_parts() -> None:
    parts = [plan("large", Cluster(gpu, gpus, 0.35)).micro_batches for gpu, gpus in (("v100", 8), ("h200", 64))]
    assert parts[0] > parts[1] == 1


def test_the_plan_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["small", "--gpu", "h100"])
    table = capsys.readouterr().out
    assert "13.5" in table and "1.29e+18 (1.4e+18)" in table and "4 d on 1 V100" in table
    main(["--json", "small"])
    assert json.loads(capsys.readouterr().out)[0]["trained_parameters"] == 14_196_219


def test_wrong_requests_are_refused() -> None:
    for options in (["tiny"], ["small", "--gpu", "abacus"], ["small", "--gpus", "0"]):
        with pytest.raises(UserError):
            main(options)
