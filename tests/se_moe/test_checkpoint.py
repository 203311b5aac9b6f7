"""Checkpoints: exact continuation after kill -9, other numbers of ranks, other switches, damaged files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from common.errors import UserError
from common.paths import REPOSITORY
from se_moe import checkpoint
from se_moe.config import Switches, TrainConfig
from se_moe.data import TextData
from se_moe.launch import make_run_groups
from se_moe.trainer import Trainer
from tests.drills import TORCHRUN, held, running, succeed, two_ranks
from tests.se_moe import tiny_run
from tests.se_moe.ranks import run_ranks

PROGRAM = str(REPOSITORY / "se_moe" / "train.py")


pytestmark = pytest.mark.usefixtures("cache")


def _open(run: TrainConfig, step: Path | None) -> Trainer:
    torch.set_num_threads(1)
    text = TextData(run.data.tasks, run.data.shares, run.data.vocabulary, run.data.sequence)
    tiers = Path(run.run_dir) / "tiers"
    return checkpoint.open_trainer(run, text, torch.device("cpu"), make_run_groups(run), tiers, step)


def _continue(rank: int, run: TrainConfig, folder: str, steps: int, save: bool) -> list[list[float]]:
    """Go on from the newest checkpoint (or start); the (loss, norm) of `steps` steps."""
    training = _open(run, checkpoint.newest(Path(folder)))
    found = []
    for _ in range(steps):
        log = training.step()
        found.append([log.loss, log.grad_norm])
    if save:
        checkpoint.save(training, Path(folder))
    training.close()
    return found


@pytest.mark.parametrize("tiers", [False, True])
def test_a_continued_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path, tiers: bool) -> None:
    run, folder = tiny_run.config(tmp_path, {"tiers": tiers}), str(tmp_path / "checkpoints")
    expected = tiny_run.losses(run, 6)
    first = _continue(0, run, folder, 3, save=True)
    assert first + _continue(0, run, folder, 3, save=False) == expected


def test_tiers_continue_what_resident_experts_began_and_the_other_way_round(tmp_path: Path) -> None:
    resident, tiered = (tiny_run.config(tmp_path, {"tiers": tiers}) for tiers in (False, True))
    expected = tiny_run.losses(resident, 6)
    for index, (before, after) in enumerate([(resident, tiered), (tiered, resident)]):
        folder = str(tmp_path / f"checkpoints{index}")
        _continue(0, before, folder, 3, save=True)
        assert _continue(0, after, folder, 3, save=False) == expected[3:]


@pytest.mark.parametrize("switches", [{}, {"tiers": False, "shard_dense": True}, {"partition": True}])
def test_other_numbers_of_ranks_continue_a_run(tmp_path: Path, switches: dict[str, bool]) -> None:
    run = tiny_run.config(tmp_path, switches)
    run = replace(run, model=replace(run.model, aux_weight=0.0), optimiser=replace(run.optimiser, clip=0.0))
    expected = torch.tensor(tiny_run.losses(run, 6))
    folder = str(tmp_path / "checkpoints")
    run_ranks(2, _continue, run, folder, 2, True)
    four = run_ranks(4, _continue, run, folder, 2, True)
    assert four[0] == four[3]
    one = _continue(0, run, folder, 2, save=False)
    torch.testing.assert_close(torch.tensor([*four[0], *one]), expected[2:], rtol=2e-5, atol=2e-5)


def test_checkpoint_files_are_links_to_versions_that_never_change(tmp_path: Path) -> None:
    run, folder = tiny_run.config(tmp_path), tmp_path / "checkpoints"
    training = _open(run, None)
    training.step()
    step = checkpoint.save(training, folder)
    files = sorted((step / "experts").glob("*.safetensors"))
    assert len(files) == 16
    assert all(file.stat().st_nlink == 2 for file in files)
    before = [file.read_bytes() for file in files]
    for _ in range(3):
        training.step()
    training.home.store.flush()  # type: ignore[union-attr]
    assert [file.read_bytes() for file in files] == before
    training.close()


def test_old_checkpoints_go_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    run, folder = tiny_run.config(tmp_path, {"tiers": False}), tmp_path / "checkpoints"
    training = _open(run, None)
    for _ in range(3):
        training.step()
        checkpoint.save(training, folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
    (folder / ".step-000004.part").mkdir()
    assert checkpoint.newest(folder) == folder / "step-000003"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    run, folder = tiny_run.config(tmp_path, {"tiers": False}), tmp_path / "checkpoints"
    _continue(0, run, str(folder), 1, save=True)
    step = checkpoint.newest(folder)
    assert step is not None
    with pytest.raises(UserError, match=r"other options \(seed\)"):
        _open(replace(run, seed=1), step)
    victim = step / "experts" / "layer001.expert0003.safetensors"
    content = victim.read_bytes()
    victim.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"layer001\.expert0003\.safetensors.*truncated"):
        _open(run, step)
    victim.unlink()
    with pytest.raises(UserError, match=r"layer001\.expert0003\.safetensors.*missing"):
        _open(run, step)
    (step / "meta.json").write_text("[]")
    with pytest.raises(UserError, match="not a checkpoint"):
        _open(run, step)


def test_an_exported_model_computes_what_the_trained_one_does(tmp_path: Path) -> None:
    run, folder = tiny_run.config(tmp_path), tmp_path / "checkpoints"
    training = _open(run, None)
    for _ in range(2):
        training.step()
    checkpoint.save(training, folder)
    ids, targets = training.batch(5)
    training.model.eval()
    with torch.no_grad():
        expected = training.model(ids, targets).lm_loss
    training.close()
    model = checkpoint.load_model(checkpoint.export_model(folder, tmp_path / "model", "{}"))
    with torch.no_grad():
        assert torch.equal(model(ids, targets).lm_loss, expected)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"hidden": 16', '"hidden": 32'))
    with pytest.raises(UserError, match=r"model\.safetensors does not fit config"):
        checkpoint.load_model(tmp_path / "model")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # an expert's file is a link to that of its tier
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["dense.safetensors", "experts/layer001.expert0003.safetensors", "meta.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = tiny_run.config(tmp_path, {"tiers": False}), tmp_path / "checkpoints"
    groups = make_run_groups(run)
    training = _open(run, None)
    for _ in range(2):
        training.step()
        checkpoint.save(training, folder)
    training.close()
    first, second = folder / "step-000001", folder / "step-000002"
    assert checkpoint.newest_sound(folder, groups) == second
    if name == "meta.json":
        (second / name).write_text((second / name).read_text().replace('"step": 2', '"step": 3'))
    else:
        _flip(second / name)
    assert checkpoint.newest_sound(folder, groups) == first
    assert f"{second / name} is damaged" in capsys.readouterr().err
    _flip(first / "dense.safetensors")
    with pytest.raises(UserError, match="no earlier step is whole: restore it from a copy, or delete"):
        checkpoint.newest_sound(folder, groups)


def test_checkpoint_of_other_text_is_refused_and_of_moved_text_is_not(tmp_path: Path) -> None:
    run, folder = tiny_run.config(tmp_path), tmp_path / "checkpoints"
    training = _open(run, None)
    training.step()
    step = checkpoint.save(training, folder)
    training.close()
    moved = tmp_path / "moved.txt"
    Path(run.data.tasks[0]).rename(moved)
    run = replace(run, data=replace(run.data, tasks=[str(moved)]))
    _open(run, step).close()
    moved.write_text(moved.read_text() + "\nand more of it\n")
    with pytest.raises(UserError, match=r"written with other options \(the text of data.tasks\)"):
        _open(run, step)


def _log(folder: Path) -> list[dict[str, Any]]:
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []


def _numbers(folder: Path) -> list[tuple[int, float, float]]:
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in _log(folder / "ours")]


@pytest.fixture(scope="module")
def drill(cache: None, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("drill")
    switches = Switches(partition=False)
    return replace(tiny_run.config(folder), arms=["ours"], steps=16, checkpoint_every=6, switches=switches)


@pytest.fixture(scope="module")
def untouched(drill: TrainConfig) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of two ranks that nobody killed."""
    succeed(PROGRAM, "--config", str(tiny_run.write_config(Path(drill.run_dir).parent / "run.yaml", drill)))
    found = _numbers(Path(drill.run_dir))
    assert [step for step, *_ in found] == list(range(16))
    return found


def test_ranks_die_with_their_launcher_and_the_run_ends_with_the_losses_of_an_untouched_one(
    drill: TrainConfig, untouched: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    options = str(tiny_run.write_config(tmp_path / "killed.yaml", replace(drill, run_dir=str(tmp_path / "run"))))
    with running([sys.executable, PROGRAM, "--config", options], **held(9, tmp_path / "held")) as killed:
        ranks = two_ranks(killed, tmp_path / "held")
        killed.kill()
        assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert len(_log(tmp_path / "run" / "ours")) == 9
    succeed(PROGRAM, "--config", options)
    assert _numbers(tmp_path / "run") == untouched


def test_torchrun_restarts_a_killed_worker_and_the_losses_stay_the_same(
    drill: TrainConfig, untouched: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    options = tiny_run.write_config(tmp_path / "elastic.yaml", replace(drill, run_dir=str(tmp_path / "run")))
    launch = [sys.executable, *TORCHRUN, "--max-restarts", "1", PROGRAM, "--config", str(options)]
    with running(launch, **held(9, tmp_path / "held")) as elastic:
        two_ranks(elastic, tmp_path / "held")[1].kill()
        assert elastic.wait() == 0, "the elastic agent starts both workers again"
    assert _numbers(tmp_path / "run") == untouched
