"""The claims' program: targets, arms that are kept, statistics of cells, figures; the smoke tier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from common.ledger import read_claims
from common.study import open_sizes
from pc_darts import reproduce
from pc_darts.baselines import random_genotype
from pc_darts.config import CONFIGS, read_config
from pc_darts.experiments import SWEEPS, Sizes, Study, jaccard, mean_overlap, step_seconds, weight_free_share
from pc_darts.genotypes import PUBLISHED
from pc_darts.plan import RUNS, cluster, paper_utilisation, plan, search_flop
from tests.claims import smoke_records, write_ledger


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pc_darts-smoke")
    found = smoke_records(reproduce, folder)
    # Too short for a verdict, long enough to run every line.
    study = Study(open_sizes(Sizes, "pc_darts", "smoke"), folder / "study")
    found["PC3"] = {"measured": [reproduce.pc3(study, 0)]}
    return found


@pytest.mark.smoke
def test_a_quarter_of_the_channels_keeps_a_third_of_the_memory(measured: dict[str, Any]) -> None:
    values = measured["PC1"]["measured"][0]
    assert values["memory_ratio"] <= 1 / 3 and values["largest_step"] < 1
    # Measured with the authors' code: 53.7 MB a picture at K = 4, 172.7 MB at K = 1; ours keeps less.
    assert 25 < values["megabytes_K4"] < 53.7 and 80 < values["megabytes_K1"] < 172.7


@pytest.mark.smoke
def test_a_step_with_a_quarter_of_the_channels_is_timed_and_does_half_of_the_work(measured: dict[str, Any]) -> None:
    assert {"time_ratio", "seconds_K1", "seconds_K4"} <= set(measured["PC2"]["measured"][0])
    flop = {}
    for partial in (1, 4):
        with FlopCounterMode(display=False) as counter:
            step_seconds(open_sizes(Sizes, "pc_darts", "smoke"), partial, 0)
        flop[partial] = counter.get_total_flops()
    assert 0 < 2 * flop[4] <= flop[1]


@pytest.mark.smoke
def test_searched_cell_is_compared_with_every_random_cell(measured: dict[str, Any]) -> None:
    values = measured["PC3"]["measured"][0]
    errors = [values[f"error_random_{n}"] for n in range(3)]
    assert values["error_random"] == pytest.approx(sum(errors) / 3)
    assert values["gap"] == pytest.approx(values["error_random"] - values["error_pc"])
    assert 0 < values["error_pc"] < 90


def test_searches_that_are_compared_with_each_other_have_more_than_two_seeds() -> None:
    assert len(reproduce.seeds_of("PC4")) == 4
    assert all(len(claim.seeds) >= 3 for claim in read_claims("pc_darts", "small").values())


def test_the_small_tier_searches_for_200_steps_and_retrains_for_300() -> None:
    budget = open_sizes(Sizes, "pc_darts", "small")
    # 1,348 digits for training, half of them for the weights.
    assert budget.search.epochs * (675 // budget.search.batch_size) == 200
    assert budget.search.warmup_epochs == 0.3 * budget.search.epochs
    assert 300 <= budget.retrain.epochs * (1348 // budget.retrain.batch_size) <= 320
    assert budget.search.batch_size == 4 * budget.darts_batch == 128 and budget.random_cells == 8


def test_a_search_of_other_options_is_made_anew_and_an_equal_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = open_sizes(Sizes, "pc_darts", "smoke")
    sizes = replace(sizes, search=replace(sizes.search, epochs=1, warmup_epochs=0, channels=4))
    first = Study(sizes, tmp_path).search("pc", 0)
    monkeypatch.setattr("torch.optim.SGD.step", lambda *_: pytest.fail("searched again"))
    assert Study(sizes, tmp_path).search("pc", 0).genotype == first.genotype
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        Study(sizes, tmp_path).search("pc", 0, partial=2)


def test_overlap_of_edges_ignores_operations_and_order() -> None:
    one, two = PUBLISHED["PC_DARTS_cifar"], PUBLISHED["PC_DARTS_image"]
    assert jaccard(one, one) == 1.0 and 0 < jaccard(one, two) < 1
    assert mean_overlap({0: one, 1: one, 2: two}, 0) == pytest.approx((1 + jaccard(one, two)) / 2)


def test_share_of_weight_free_operations_of_published_cells() -> None:
    assert weight_free_share(PUBLISHED["PC_DARTS_cifar"]) == 3 / 16
    assert weight_free_share(PUBLISHED["DARTS_V1"]) == 11 / 16


def test_sweeps_change_what_they_name_and_nothing_unknown() -> None:
    known = set(open_sizes(Sizes, "pc_darts", "small").search.__dict__)
    assert all(set(changes) <= known for arms in SWEEPS.values() for changes in arms.values())
    assert len(SWEEPS["pc-en"]) == 4 and set(SWEEPS["sampling"]) == {"shuffle", "shift", "random"}


@pytest.mark.parametrize("name", ["smoke", "small", "cifar", "imagenet"])
def test_every_config_is_readable(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config, _ = read_config(["--config", str(path)], "")
    assert config.run_dir == f"runs/pc_darts-{name}" and path.read_text().startswith("# ")


def test_full_size_configs_are_the_papers() -> None:
    cifar, _ = read_config(["--config", str(CONFIGS / "cifar.yaml")], "")
    search = cifar.search
    assert (search.channels, search.cells, search.partial, search.epochs, search.warmup_epochs) == (16, 8, 4, 50, 15)
    assert (search.batch_size, search.lr, search.arch_lr, search.weight_decay) == (256, 0.1, 6e-4, 3e-4)
    final = cifar.retrain
    assert (final.channels, final.layers, final.epochs, final.batch_size) == (36, 20, 600, 96)
    assert (final.lr, final.cutout, final.drop_path, final.auxiliary) == (0.025, 16, 0.3, 0.4)
    imagenet, _ = read_config(["--config", str(CONFIGS / "imagenet.yaml")], "")
    assert (imagenet.search.partial, imagenet.search.warmup_epochs, imagenet.search.arch_lr) == (2, 35, 6e-3)
    assert (imagenet.retrain.channels, imagenet.retrain.layers, imagenet.retrain.smoothing) == (48, 14, 0.1)
    assert imagenet.data.halves == [0.1, 0.025]


def test_plan_knows_the_papers_sizes() -> None:
    final = plan("cifar-final", cluster(utilisation=0.5))
    assert final.parameters == 4_111_104 and final.macs == pytest.approx(556.7e6, rel=1e-3)
    search = plan("cifar-search", cluster())
    assert search.parameters == 299_578
    assert search.gpu_days == pytest.approx(0.1)
    assert 0 < paper_utilisation() < 0.2 and set(RUNS) >= {"imagenet-search", "imagenet-final"}


def test_second_order_costs_four_passes_for_the_architecture() -> None:
    options = read_config(["--config", str(CONFIGS / "cifar.yaml")], "")[0].search
    assert search_flop(options, 10, 100) == 6 * 10 * 100 * (50 + 35)
    assert search_flop(replace(options, unrolled=True), 10, 100) == 6 * 10 * 100 * (50 + 4 * 35)


def test_figures_are_drawn_for_the_claims_that_are_there(tmp_path: Path) -> None:
    from pc_darts.figures import draw_figures

    extra = {
        "PC1": {f"megabytes_K{k}": 100.0 / k for k in (1, 2, 4, 8)},
        "PC3": {"error_pc": 3.0, "error_random_0": 4.0, "error_random_1": 5.0},
        "PC4": {"overlap_with": 0.5, "overlap_without": 0.3},
    }
    write_ledger(tmp_path / "pc_darts.json", "pc_darts", extra)
    draw_figures(tmp_path / "pc_darts.json", tmp_path / "figures")
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"memory.png", "errors.png", "overlap.png"}
    assert set(json.loads((tmp_path / "figures" / "captions.json").read_text())) == drawn


def test_random_cells_of_the_claims_are_the_same_for_every_seed() -> None:
    from common.data.sampling import derive_seed
    from pc_darts.experiments import RANDOM_STREAM

    assert random_genotype(derive_seed(RANDOM_STREAM, 0)) == random_genotype(derive_seed(RANDOM_STREAM, 0))
    assert len({random_genotype(derive_seed(RANDOM_STREAM, n)) for n in range(8)}) == 8
