"""Pairs are a function of (seed, index, prompt, source), survive interruption, and are never mixed with others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.data import pairs as module
from common.data.pairs import PairDataset, StateTable, default_folder, generate_pairs, noise, prompt_list, read_prompts
from common.errors import UserError
from common.files import file_sha256
from common.solvers import DiffusionSource, stock_pipeline
from tests.common.tiny_teacher import tiny_teacher
from tests.refusals import refused

PROMPTS = ["a red star", "a blue ring", "two red ring"]


def source(**options: Any) -> DiffusionSource:
    return DiffusionSource(tiny_teacher(), "DDIMScheduler", steps=2, **{"guidance": 2.0, **options})


def make(folder: Path, count: int = 10, **options: Any) -> PairDataset:
    settings: dict[str, Any] = {"batch_size": 3, "shard_size": 4, **options}
    made = generate_pairs(settings.pop("source", None) or source(), PROMPTS, folder, count, **settings)
    assert made is not None
    return made


def columns(data: PairDataset) -> dict[str, Tensor]:
    return data.__getitems__(range(len(data)))


def same(a: PairDataset, b: PairDataset) -> bool:
    left, right = columns(a), columns(b)
    return all(torch.equal(left[key], right[key]) for key in left)


def test_a_pair_is_the_stock_pipelines_image_of_its_noise_and_prompt(tmp_path: Path) -> None:
    data = make(tmp_path, source=DiffusionSource(tiny_teacher(), steps=4, guidance=3.0))
    stock = stock_pipeline(tiny_teacher(), "DPMSolverMultistepScheduler")
    item = data[7]
    prompt = data.prompts[int(item["prompt"])]
    wanted = stock(prompt, num_inference_steps=4, guidance_scale=3.0, latents=item["x0"][None], output_type="latent")
    torch.testing.assert_close(item["x1"], wanted.images[0], atol=2e-3, rtol=2e-3)  # kept in float16


def test_an_interrupted_generation_continues_and_ends_with_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole")
    original, calls = module.save_file, []

    def dies_in_the_second_shard(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a sha")
            raise KeyboardInterrupt
        original(tensors, path)

    monkeypatch.setattr(module, "save_file", dies_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut")
    left = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert left == ["pairs-00000.safetensors"]
    assert len(PairDataset(tmp_path / "cut")) == 4
    monkeypatch.setattr(module, "save_file", original)
    before = (tmp_path / "cut" / left[0]).stat().st_mtime_ns
    assert same(make(tmp_path / "cut"), whole)
    assert (tmp_path / "cut" / left[0]).stat().st_mtime_ns == before


def test_more_pairs_of_the_same_kind_keep_the_first_ones(tmp_path: Path) -> None:
    few = columns(make(tmp_path, count=6))
    more = columns(make(tmp_path, count=11))
    assert torch.equal(few["x0"], more["x0"][:6])
    torch.testing.assert_close(few["x1"], more["x1"][:6], atol=2e-3, rtol=2e-3)
    assert len(PairDataset(tmp_path, count=5)) == 5
    refused("11 pairs are finished, 12", PairDataset, tmp_path, count=12)


def test_several_processes_fill_one_folder(tmp_path: Path) -> None:
    assert generate_pairs(source(), PROMPTS, tmp_path / "two", 10, batch_size=3, shard_size=4, rank=1, world=2) is None
    other = generate_pairs(source(), PROMPTS, tmp_path / "two", 10, batch_size=3, shard_size=4, rank=0, world=2)
    assert other is not None
    assert same(other, make(tmp_path / "one"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source": {"guidance": 3.0}}, "guidance was 2.0, is 3.0"),
        ({"source": {"negative_prompt": "a ring"}}, "negative_prompt"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shard_size": 5}, "shard_size"),
    ],
)
def test_a_folder_of_other_pairs_is_refused_by_what_differs(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    make(tmp_path, count=2)
    options = {**change, "source": source(**change["source"])} if "source" in change else change
    refused(named, make, tmp_path, count=2, **options)


def test_pairs_of_another_teacher_or_solver_are_refused(tmp_path: Path) -> None:
    make(tmp_path, count=2)
    with pytest.raises(UserError, match="solver was DDIMScheduler, is UniPCMultiste"):
        PairDataset(tmp_path, DiffusionSource(tiny_teacher(), "UniPCMultistepScheduler", 2, 2.0))
    with pytest.raises(UserError, match="teacher was"):
        PairDataset(tmp_path, DiffusionSource(tiny_teacher("v_prediction"), "DDIMScheduler", 2, 2.0))


def test_a_damaged_shard_is_refused_when_read_and_made_anew_when_generating(tmp_path: Path) -> None:
    good = columns(make(tmp_path))
    shard = tmp_path / "pairs-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    data = PairDataset(tmp_path)
    assert torch.equal(data[3]["x1"], good["x1"][3])
    refused(r"pairs-00001.*damaged", lambda: data[4])
    assert torch.equal(columns(make(tmp_path))["x1"], good["x1"])
    shard.unlink()
    refused(r"pairs-00001.*missing", lambda: PairDataset(tmp_path)[5])


def test_changed_prompts_or_manifest_are_refused(tmp_path: Path) -> None:
    make(tmp_path, count=2)
    refused("prompts", generate_pairs, source(), [*PROMPTS, "a"], tmp_path, 2, shard_size=4)
    (tmp_path / "prompts.txt").write_text("something else\n")
    refused("was changed", PairDataset, tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    refused("damaged", PairDataset, tmp_path)


def test_the_coupling_check_notices_shuffled_pairs(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    data = make(tmp_path, count=4)
    data.check_coupling()
    shard = tmp_path / "pairs-00000.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "x0": tensors["x0"].flip(0).contiguous()}, shard)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"]["0"]["sha256"] = file_sha256(shard)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    refused("shuffled", PairDataset(tmp_path).check_coupling)


def test_the_noise_of_a_pair_does_not_depend_on_the_number_of_pairs_or_the_batch(tmp_path: Path) -> None:
    small, large = make(tmp_path / "a", batch_size=1), make(tmp_path / "b", batch_size=4)
    assert torch.equal(columns(small)["x0"], columns(large)["x0"])
    torch.testing.assert_close(columns(small)["x1"], columns(large)["x1"], atol=2e-3, rtol=2e-3)
    assert torch.equal(small[3]["x0"], noise(0, 3, (4, 8, 8)).float())
    assert not torch.equal(noise(0, 3, (4, 8, 8)), noise(1, 3, (4, 8, 8)))


def test_each_distinct_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, encoded = tiny_teacher(), []
    original = teacher.encode
    monkeypatch.setattr(teacher, "encode", lambda prompts: encoded.extend(prompts) or original(prompts))
    table = StateTable(teacher)
    states = table(["a star", "a ring", "a star"])
    table(["a ring", "a star"])
    assert encoded == ["a star", "a ring"]
    torch.testing.assert_close(states, original(["a star", "a ring", "a star"]))
    small = StateTable(teacher, limit=1)
    for prompt in ("a star", "a ring", "a star"):
        small([prompt])
    assert encoded[2:] == ["a star", "a ring", "a star"]


def test_prompt_files_are_checked_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a star\n\na ring\n")
    refused("line 2 is empty", read_prompts, path)
    path.write_bytes("\ufeffa star\u2028and\x85more\r\na ring\r\n\r\n".encode())
    assert read_prompts(path) == prompt_list(str(path), 1) == ["a star\u2028and\x85more", "a ring"]
    lines = path.with_suffix(".jsonl")
    lines.write_text('\ufeff{"text": "a star\u2028and more"}\n\n{"text": "a ring"}\n', encoding="utf-8")
    assert prompt_list(str(lines), 2) == ["a star and more", "a ring"]
    path.write_bytes(b"\xff\xfe\x00")
    refused("UTF-8", read_prompts, path)
    refused("no such file", read_prompts, tmp_path / "none.txt")


def test_the_default_folder_is_named_after_what_the_pairs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    one = default_folder(source(), PROMPTS)
    assert one == default_folder(source(), PROMPTS)
    assert one != default_folder(source(guidance=2.5), PROMPTS)
    assert tmp_path in one.parents


def test_folders_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused(r"file/pairs: pairs cannot be kept there .*REPRO_CACHE", make, tmp_path / "file" / "pairs")
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "file"))
    refused("set REPRO_CACHE to a folder", default_folder, source(), PROMPTS)


def test_pairs_of_earlier_caches_are_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Recorded before the pairs moved to common/: the folder's name is a checksum of what the pairs are.
    class Fixed:
        teacher = SimpleNamespace(latent_shape=(4, 8, 8))

        def describe(self) -> dict[str, Any]:
            return {"kind": "fixed", "steps": 3}

    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    found = default_folder(Fixed(), PROMPTS, 5, 64)  # type: ignore[arg-type]
    assert found.relative_to(tmp_path).as_posix() == "instaflow/pairs/82915bf1a92b279a"


def test_a_tenth_of_the_users_prompts_is_held_out_by_their_text(tmp_path: Path) -> None:
    prompts = [f"prompt {i % 40}" for i in range(60)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    (tmp_path / "p.csv").write_text("\n".join(["id,prompt", *(f"{i},{prompt}" for i, prompt in enumerate(prompts))]))
    for name in ("p.txt", "p.csv"):
        train, test = (prompt_list(str(tmp_path / name), 1, part) for part in ("train", "test"))  # type: ignore[arg-type]
        assert len(set(test)) == 4 and not set(train) & set(test) and sorted(train + test) == sorted(prompts)
    (tmp_path / "few.txt").write_text("\n".join(prompts[:19]))
    assert (
        prompt_list(str(tmp_path / "few.txt"), 1, "test") == prompt_list(str(tmp_path / "few.txt"), 1) == prompts[:19]
    )
    rows = [{"en": f"a {i}", "de": f"b {i}"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prompt_list(str(tmp_path / "p.jsonl"), 1, text="de") == ["b 0", "b 1", "b 2"]
    refused(
        "en and de may be the caption column; .* name one with --text_column", prompt_list, str(tmp_path / "p.jsonl"), 1
    )
