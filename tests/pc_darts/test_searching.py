"""The search: alternation, warm-up, exact resume, N processes as one, failures that cost nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.training import load_checkpoint
from pc_darts.search_space import ARCHITECTURE
from pc_darts.searching import Searcher, SearchResult, seconds_per_epoch
from tests.drills import at_step, forked
from tests.pc_darts.tiny_run import SEARCH, on_two_processes, searcher


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never interrupted, one process."""
    folder = tmp_path_factory.mktemp("search")
    searcher(folder, draw=True).run()
    return folder


def state(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "last.ckpt")


def architecture(folder: Path) -> dict[str, torch.Tensor]:
    return {name: state(folder)["network"][name] for name in ARCHITECTURE}


def test_search_leaves_result_log_cells_and_heat_maps(reference: Path) -> None:
    result = SearchResult.load(reference / "search.json")
    assert result.steps == 9 and len(result.history) == 3
    assert {path.name for path in (reference / "epochs").iterdir()} >= {
        f"{epoch:03d}_{kind}.svg" for epoch in range(3) for kind in ("normal", "reduce", "weights")
    }
    assert (reference / "log.csv").read_text().count("\n") == 10
    assert json.loads((reference / "genotype.json").read_text()) == json.loads(result.genotype.to_json())
    assert result.memory_bytes > 1e5 and result.peak_bytes is None and result.images_per_second > 0
    assert [row["epoch"] for row in result.history] == [0, 1, 2]


def test_architecture_is_frozen_in_the_warm_up_and_moves_afterwards(tmp_path: Path) -> None:
    search = searcher(tmp_path)
    begin = [p.detach().clone() for p in search.architecture]
    search.run(stop_after=3)
    assert all(torch.equal(a, b) for a, b in zip(begin, search.architecture))
    again = searcher(tmp_path)
    again.run(stop_after=4)
    assert not any(torch.equal(a, b) for a, b in zip(begin, again.architecture))


def test_architecture_has_gradients_again_after_a_weight_step(tmp_path: Path) -> None:
    search = searcher(tmp_path, warmup_epochs=0)
    search.run(stop_after=1)
    assert all(p.requires_grad for p in search.architecture)
    assert len(search.architecture) == 4 == len(search.network.architecture())


def test_without_edge_normalisation_betas_stay_equal(tmp_path: Path) -> None:
    search = searcher(tmp_path, edge_normalisation=False, warmup_epochs=0, partial=1)
    search.run(stop_after=2)
    assert len(search.architecture) == 2
    assert not search.network.betas_normal.any()


def test_killed_second_order_search_continues_with_identical_alphas(tmp_path: Path) -> None:
    options: dict[str, Any] = {"unrolled": True, "sampling": "random"}
    searcher(tmp_path / "whole", **options).run()

    def killed() -> None:
        at_step(signal.SIGKILL, 7)()
        searcher(tmp_path / "run", **options).run()

    assert forked(killed) == -signal.SIGKILL
    assert state(tmp_path / "run")["step"] == 6
    searcher(tmp_path / "run", **options).run()
    ours, theirs = state(tmp_path / "run")["network"], state(tmp_path / "whole")["network"]
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    first, second = (SearchResult.load(tmp_path / folder / "search.json") for folder in ("run", "whole"))
    assert first.genotype == second.genotype and first.alphas == second.alphas
    assert [row["train_loss"] for row in first.history] == [row["train_loss"] for row in second.history]


def test_finished_search_is_not_repeated(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searcher, "_one_step", lambda *_: pytest.fail("searched again"))
    assert searcher(reference).run().steps == 9


def test_two_processes_find_the_alphas_of_one(reference: Path, tmp_path: Path) -> None:
    on_two_processes(lambda machine: searcher(tmp_path / "run", machine).run(), tmp_path / "store")
    torch.testing.assert_close(architecture(tmp_path / "run"), architecture(reference), rtol=1e-4, atol=1e-6)
    ours, theirs = (SearchResult.load(folder / "search.json") for folder in (tmp_path / "run", reference))
    for a, b in zip(ours.history, theirs.history):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_two_processes_find_the_second_order_alphas_of_one(tmp_path: Path) -> None:
    searcher(tmp_path / "one", unrolled=True, epochs=2).run()
    work = lambda machine: searcher(tmp_path / "two", machine, unrolled=True, epochs=2).run()  # noqa: E731
    on_two_processes(work, tmp_path / "store")
    # Finite differences divide rounding errors by a small radius.
    torch.testing.assert_close(architecture(tmp_path / "two"), architecture(tmp_path / "one"), rtol=1e-2, atol=2e-4)


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.functional.cross_entropy
    calls = 0

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs) * (float("nan") if calls == 4 else 1.0)

    monkeypatch.setattr("pc_darts.searching.F.cross_entropy", broken)
    with pytest.raises(UserError, match=r"the search loss became nan at step 3: stopped; the last good .*last.ckpt"):
        searcher(tmp_path).run()
    kept = state(tmp_path)
    assert kept["step"] == 2
    assert all(v.isfinite().all() for v in kept["network"].values() if v.is_floating_point())


def test_checkpoint_of_another_network_or_kind_is_refused(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes((reference / "last.ckpt").read_bytes())
    with pytest.raises(UserError, match="belongs to another network"):
        searcher(tmp_path, channels=16).run()
    torch.save({"kind": "training"}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="holds no state of a search"):
        searcher(tmp_path).run()


@pytest.mark.parametrize("options", [{"epochs": 0}, {"warmup_epochs": 4}])
def test_more_warm_up_than_epochs_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"search.epochs . and warmup_epochs"):
        searcher(tmp_path, **options)


def test_partial_channels_keep_less_for_the_backward_pass(tmp_path: Path) -> None:
    kept = [searcher(tmp_path, partial=k, channels=16).measure_memory() for k in (1, 2, 4)]
    assert kept[0] > kept[1] > kept[2]


def test_time_of_an_epoch_is_measured_without_leaving_files(tmp_path: Path) -> None:
    assert seconds_per_epoch(searcher(tmp_path / "run"), steps=1) > 0
    assert not (tmp_path / "run").exists()
    assert SEARCH.warmup_epochs == 1
