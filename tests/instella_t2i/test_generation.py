"""Training of the generators, their codes on disk, drawing, and the synthetic set."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.data.sampling import TensorTable
from common.errors import UserError
from instella_t2i import sample, synthesize, train
from instella_t2i.codes import MixedSampler, code_table, encode_pictures, framed, pack_bits, unpack_bits
from instella_t2i.config import DataConfig, SamplingConfig
from instella_t2i.data import open_pictures
from instella_t2i.generation import load_generator
from instella_t2i.run import Run
from instella_t2i.tokenizer import load_tokenizer, save_tokenizer
from tests.common.tiny_teacher import save_teacher
from tests.drills import succeed
from tests.instella_t2i.tiny_run import ALL, arguments, losses
from tests.instella_t2i.tiny_run import train as train_tiny

GENERATORS = "[diffusion, autoregression]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run, and its metrics."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train.main(arguments(folder, stages=ALL))


def generators(folder: Path, finished: Path, **options: Any) -> Path:
    """Both generators on the finished run's tokenizer."""
    return train_tiny(folder, stages=GENERATORS, tokenizer_from=finished / "decoder", **options)


def test_a_run_trains_both_generators_and_measures_them_on_the_same_prompts(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, metrics = finished
    assert list(metrics["generators"]) == ["diffusion", "autoregression"]
    for found in metrics["generators"].values():
        assert {"kid", "accuracy", "single", "two", "count", "color", "position", "attr", "image_seconds"} <= {*found}
    assert (folder / "samples.png").is_file() and "accuracy" in (folder / "table.md").read_text()
    for kind in ("diffusion", "autoregression"):
        found = losses(folder, kind)
        assert sorted(found) == [*range(6)]
        # Bits of an untrained network: about as likely as not, and Xavier's start is not far from that.
        assert 0.4 < found[0] < 2.5 and 0 <= losses(folder, kind, "train/accuracy")[5] <= 1


def test_a_stopped_training_goes_on_with_the_same_losses(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common import training

    whole = generators(tmp_path / "whole", finished[0])
    stopped = tmp_path / "stopped"
    original = training.SaveEvery.on_train_batch_end

    def stop(self: Any, trainer: Any, *rest: Any) -> None:
        original(self, trainer, *rest)
        if trainer.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.SaveEvery, "on_train_batch_end", stop)
        with pytest.raises(BaseException):  # noqa: B017 (Lightning's own kinds of a stop)
            generators(stopped, finished[0])
    generators(stopped, finished[0])
    for kind in ("diffusion", "autoregression"):
        found, wanted = losses(stopped, kind), losses(whole, kind)
        found.setdefault(3, wanted[3])  # the line of the step that it was stopped in
        assert found == wanted
        a, b = (load_generator(run / kind).network.state_dict() for run in (whole, stopped))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_micro_batches_change_no_loss(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole = generators(tmp_path / "whole", finished[0])
    parts = generators(tmp_path / "parts", finished[0], trainer__accumulate=2)
    for kind in ("diffusion", "autoregression"):
        assert losses(parts, kind) == pytest.approx(losses(whole, kind), abs=1e-4)


def test_shift_and_views_reach_the_training(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    plain = generators(tmp_path / "plain", finished[0])
    shifted = generators(tmp_path / "shifted", finished[0], diffusion__shift=50)
    assert losses(shifted, "diffusion")[0] != losses(plain, "diffusion")[0]
    assert losses(shifted, "autoregression") == losses(plain, "autoregression")
    viewed = generators(tmp_path / "viewed", finished[0], codes__views=2)
    assert losses(viewed, "autoregression") != losses(plain, "autoregression")


def test_a_generator_learns_a_code_by_heart(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    small = {"data__images": 4, "diffusion__batch_size": 16, "autoregression__batch_size": 16}
    steps = {"diffusion__steps": 120, "autoregression__steps": 120, "trainer__checkpoint_every": 1000}
    run = generators(tmp_path / "run", finished[0], **small, **steps)
    coin = math.log(2)
    for kind in ("diffusion", "autoregression"):
        last = [losses(run, kind)[step] for step in range(110, 120)]
        assert sum(last) / len(last) < 0.6 * coin, kind


def test_bits_survive_packing() -> None:
    codes = (torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    packed = pack_bits(codes)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == (7, 2)  # 15 bits
    assert torch.equal(unpack_bits(packed, 3, 5), codes)


def test_codes_are_made_once_and_those_of_another_tokenizer_are_refused(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(finished[0] / "decoder")
    pictures = open_pictures(DataConfig("shapes", size=16, images=20), "train")
    codes = encode_pictures(tokenizer, pictures, tmp_path / "codes")
    expected = tokenizer.encode(pictures.all().float() / 127.5 - 1)
    assert torch.equal(unpack_bits(codes, 4, 8), expected)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").glob("*.safetensors")}
    assert torch.equal(encode_pictures(tokenizer, pictures, tmp_path / "codes"), codes)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").glob("*.safetensors")}
    first = load_tokenizer(finished[0] / "tokenizer")
    with pytest.raises(UserError, match=r"this cache was made by another encoder \(tokenizer .* at 16 px"):
        encode_pictures(first, pictures, tmp_path / "codes")
    other = open_pictures(DataConfig("shapes", size=16, images=21), "train")
    with pytest.raises(UserError, match="this cache was made from other data"):
        encode_pictures(tokenizer, other, tmp_path / "codes")


def test_a_generator_draws_with_its_own_tokenizer_and_language_model_alone(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    other = load_tokenizer(run / "decoder")
    with torch.no_grad():
        other.to_pixel.weight[0, 0] += 1
    save_tokenizer(other, run / "decoder")
    with pytest.raises(UserError, match="diffusion was trained on the codes of another tokenizer"):
        Run.existing(run).painter()
    run = tmp_path / "run2"
    shutil.copytree(finished[0], run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("layers: each", "layers: last"))
    with pytest.raises(UserError, match=r"was trained with another language model than --text.encoder"):
        Run.existing(run).painter()


def test_a_picture_depends_on_its_seed_number_and_prompt_alone(finished: tuple[Path, dict[str, Any]]) -> None:
    painter = Run.existing(finished[0]).painter()
    sampling = SamplingConfig(steps=3, guidance=1, ar_guidance=1)
    prompts = ["a red star", "a blue ring", "a red star"]
    for kind in painter.generators:
        together = painter.draw(kind, prompts, sampling, seed=3)
        apart = painter.draw(kind, prompts, sampling, seed=3, batch=2)
        assert together.shape == (3, 3, 16, 16) and torch.equal(together, apart)
        assert not torch.equal(together[0], together[2])
        codes = painter.codes(kind, prompts, sampling, 3)
        wide = painter.draw(kind, prompts, sampling, seed=3, size=(16, 32))
        assert wide.shape == (3, 3, 16, 32)
        again = painter.tokenizer.decode(codes, (16, 32)).clamp(-1, 1)
        assert float((wide.float() / 127.5 - 1 - again).abs().max()) < 0.01


def test_samples_stand_side_by_side(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "star.png"
    command = ["--run_dir", str(finished[0]), "--prompt", "a red star", "--count", "2", "--out", str(out)]
    sample.main([*command, "--protocol", "exact", "--size", "16", "32", "--device", "cpu"])
    with Image.open(out) as both:
        size = both.size
    sample.main([*command, "--by", "diffusion", "--device", "cpu"])
    with Image.open(out) as one:
        assert one.width == size[0] and one.height < size[1]
    with pytest.raises(UserError, match=r"--prompt is missing"):
        sample.main(["--run_dir", str(finished[0])])


def test_a_run_without_generators_has_nothing_to_draw_with(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("diffusion", "autoregression"))
    with pytest.raises(UserError, match="has no finished diffusion or autoregression"):
        Run.existing(run).painter()


def test_the_second_set_joins_at_its_step_with_its_share() -> None:
    sampler = MixedSampler(20, 8, 0.25, begins=40, batch_size=8, steps=20, seed=0)
    rows = [row for step in range(20) for row in sampler.batch(step)]
    assert all(row < 20 for row in rows[:40])
    assert sorted(rows[:20]) == [*range(20)]  # an epoch of the first set
    later = rows[40:]
    for first in range(0, len(later), 4):
        assert sum(row >= 20 for row in later[first : first + 4]) == 1
    ours = [row for row in later if row < 20]
    assert sorted(ours[:20]) == [*range(20)]  # no row of the first set is lost to the other
    others = [row for row in later if row >= 20]
    assert sorted(others[:8]) == [*range(20, 28)]


def test_two_processes_share_the_mixed_batches_out() -> None:
    whole = MixedSampler(20, 8, 0.25, 16, 8, 10, seed=1)
    halves = [MixedSampler(20, 8, 0.25, 16, 8, 10, seed=1, rank=rank, world=2) for rank in (0, 1)]
    for step in range(10):
        together = [row for pair in zip(*(half.batch(step) for half in halves)) for row in pair]
        assert together == whole.batch(step)


def test_captions_follow_their_codes_over_both_sets() -> None:
    table = code_table([torch.zeros(3, 2, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.uint8)])
    assert isinstance(table, TensorTable) and len(table) == 5
    assert table[3]["code"].tolist() == [1, 1] and int(table[3]["caption"]) == 3


def test_views_of_a_picture_share_its_caption_and_differ_a_little(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(finished[0] / "decoder")
    pictures = open_pictures(DataConfig("shapes", size=16, images=20), "train")
    once = encode_pictures(tokenizer, pictures, tmp_path / "once")
    codes = encode_pictures(tokenizer, pictures, tmp_path / "views", views=3)
    assert len(codes) == 60 and torch.equal(codes[:20], once)
    table = code_table([codes, codes[:30]], 3)
    assert isinstance(table, TensorTable)
    assert [int(table[row]["caption"]) for row in (0, 19, 20, 59, 60, 70, 89)] == [0, 19, 0, 19, 20, 20, 29]
    pixels = pictures.all().float() / 127.5 - 1
    moved = framed(pixels, range(20), 1)
    assert torch.equal(framed(pixels[4:6], [4, 5], 1), moved[4:6])  # whatever company a picture is in
    assert not torch.equal(framed(pixels, range(20), 2), moved)
    assert 0.0 < float((moved - pixels).abs().mean()) < 0.2
    with pytest.raises(UserError, match="3 views"):
        encode_pictures(tokenizer, pictures, tmp_path / "views", views=2)


def test_a_synthetic_set_is_drawn_once_dealt_out_and_trained_on(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "synthetic"
    command = ["--teacher", str(teacher), "--count", "24", "--out", str(out), "--steps", "2", "--device", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        drawn.append(synthesize.main(command))
    assert drawn == [12, 12]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and all((out / line["file_name"]).is_file() for line in lines)
    first = out / lines[5]["file_name"]
    kept = first.read_bytes()
    first.unlink()
    assert synthesize.main(command) == 1 and first.read_bytes() == kept  # as it was, whoever else is drawn with it
    with pytest.raises(UserError, match="was begun with another seed; choose another folder"):
        synthesize.main([*command, "--seed", "1"])
    with pytest.raises(UserError, match="was begun with another list of prompts"):
        synthesize.main([*command[:2], "--count", "23", *command[4:]])
    options = {"codes__synthetic": out, "codes__synthetic_from": 0.5}
    run = generators(tmp_path / "run", finished[0], **options)
    plain = generators(tmp_path / "plain", finished[0])
    for kind in ("diffusion", "autoregression"):
        mixed, real = losses(run, kind), losses(plain, kind)
        assert [mixed[step] == real[step] for step in range(6)] == [True] * 3 + [False] * 3


def test_codes_of_another_tokenizer_in_a_shared_folder_stop_a_training(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    generators(tmp_path / "first", finished[0], codes__folder=shared)
    with pytest.raises(UserError, match="this cache was made by another encoder"):
        train_tiny(
            tmp_path / "second", stages="diffusion", tokenizer_from=finished[0] / "tokenizer", codes__folder=shared
        )
    with pytest.raises(UserError, match=r"--data.size 32: the tokenizer was trained on pictures of 16 px"):
        train_tiny(tmp_path / "third", stages="diffusion", tokenizer_from=finished[0] / "tokenizer", data__size=32)


@pytest.mark.slow
def test_two_processes_train_what_one_does(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    one = generators(tmp_path / "one", finished[0])
    options: dict[str, Any] = {"trainer__devices": 2, "trainer__strategy": "ddp", "stages": GENERATORS}
    command = arguments(tmp_path / "two", tokenizer_from=finished[0] / "decoder", **options)
    succeed("-m", "instella_t2i.train", *command, OMP_NUM_THREADS="1")
    for kind in ("diffusion", "autoregression"):
        assert losses(tmp_path / "two", kind) == pytest.approx(losses(one, kind), abs=1e-4)
