"""Feature caches: resumable, refused when stale, broken shards found."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from common.data import cache as cache_module
from common.data.cache import FeatureCache, fingerprint_module, fingerprint_path, fingerprint_strings
from common.errors import UserError

N, SHARD = 23, 5


def features(indices: list[int]) -> dict[str, torch.Tensor]:
    index = torch.tensor(indices)
    return {
        "latent": (index.view(-1, 1, 1) * 10 + torch.arange(6).view(2, 3)).to(torch.bfloat16),
        "mask": index.view(-1, 1) % 2 == torch.arange(2),
        "token": index * 3,
    }


def build(folder: Path, compute=features, **changes) -> FeatureCache:
    options = {"encoder_fingerprint": "enc", "data_fingerprint": "data", "shard_size": SHARD, "progress": False}
    return FeatureCache.open_or_build(folder, compute=compute, **{"n": N, **options, **changes})


def build_then_die(folder: str) -> None:
    calls = 0

    def compute(indices: list[int]) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return features(indices)

    build(Path(folder), compute)


def shard_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("shard-*.safetensors"))]


@pytest.mark.parametrize("reading", ["mapped", "loaded"])
def test_items_come_back_in_the_order_asked_with_dtype_and_shape(tmp_path: Path, reading: str) -> None:
    cache = build(tmp_path, reading=reading)
    wanted = [22, 0, 7, 7, 4, 5, -1]
    for name, values in features([22, 0, 7, 7, 4, 5, 22]).items():
        assert cache[wanted][name].dtype == values.dtype
        assert torch.equal(cache[wanted][name], values)
    assert torch.equal(cache[9]["latent"], features([9])["latent"][0])
    assert torch.equal(cache[3:8]["token"], torch.arange(3, 8) * 3)
    assert len(cache) == N and cache.names == ["latent", "mask", "token"]
    with pytest.raises(IndexError, match="outside the 23 items"):
        cache[[N]]


def test_build_killed_in_the_middle_resumes_to_the_same_files(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=build_then_die, args=(str(tmp_path / "a"),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(shard_bytes(tmp_path / "a")) == 2
    with pytest.raises(UserError, match="never finished"):
        FeatureCache.open(tmp_path / "a")

    computed: list[int] = []

    def compute(indices: list[int]) -> dict[str, torch.Tensor]:
        computed.extend(indices)
        return features(indices)

    build(tmp_path / "a", compute)
    assert computed == list(range(2 * SHARD, N))
    build(tmp_path / "b")
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def build_a_share(folder: str, rank: int, meeting: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    calls: list[int] = []

    def compute(indices: list[int]) -> dict[str, torch.Tensor]:
        if not calls:
            meeting.wait()  # both are at work
        calls.append(indices[0] // SHARD)
        return features(indices)

    cache = build(Path(folder), compute)
    assert torch.equal(cache[:]["token"], torch.arange(N) * 3)
    (Path(folder) / f"rank{rank}.txt").write_text(str(sorted(calls)))


def test_processes_of_one_run_share_the_shards_out_and_each_finds_all_of_them(tmp_path: Path) -> None:
    build(tmp_path / "one")
    context = multiprocessing.get_context("fork")
    meeting = context.Barrier(2)
    workers = [context.Process(target=build_a_share, args=(str(tmp_path / "two"), r, meeting)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    computed = [json.loads((tmp_path / "two" / f"rank{rank}.txt").read_text()) for rank in (0, 1)]
    assert sorted(computed[0] + computed[1]) == [0, 1, 2, 3, 4]  # each once
    assert 0 in computed[0] and 1 in computed[1]
    assert shard_bytes(tmp_path / "two") == shard_bytes(tmp_path / "one")


def test_finished_cache_computes_nothing_again(tmp_path: Path) -> None:
    build(tmp_path)

    def compute(indices: list[int]) -> dict[str, torch.Tensor]:
        raise AssertionError("computed again")

    assert len(build(tmp_path, compute)) == N


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"encoder_fingerprint": "other"}, "another encoder"),
        ({"data_fingerprint": "other"}, "other data"),
        ({"n": N + 1}, "another number of items"),
        ({"shard_size": 7}, "another shard size"),
    ],
)
def test_stale_cache_is_refused_with_how_to_rebuild(tmp_path: Path, change: dict, reason: str) -> None:
    build(tmp_path)
    with pytest.raises(UserError, match=f"{reason}.*delete that folder"):
        build(tmp_path, **change)
    rebuilt = build(tmp_path, **change, rebuild=True)
    assert len(rebuilt) == change.get("n", N)


def test_truncated_shard_is_refused_on_open_but_computed_again_on_build(tmp_path: Path) -> None:
    build(tmp_path)
    whole = shard_bytes(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: this shard is truncated"):
        FeatureCache.open(tmp_path)
    with pytest.warns(UserWarning, match="truncated"):
        build(tmp_path)
    assert shard_bytes(tmp_path) == whole


def test_flipped_bit_is_found_by_checksum(tmp_path: Path) -> None:
    cache = build(tmp_path)
    cache.verify()
    path = tmp_path / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00002.*checksum"):
        cache.verify()
    with pytest.raises(UserError, match=r"shard-00002.*checksum"):
        FeatureCache.open(tmp_path, reading="loaded")


def test_missing_and_broken_manifest_are_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no feature cache here"):
        FeatureCache.open(tmp_path / "nowhere")
    build(tmp_path)
    (tmp_path / "manifest.json").write_text('{"shards": ')
    with pytest.raises(UserError, match="not a cache manifest"):
        FeatureCache.open(tmp_path)


def test_cache_travels_to_another_process(tmp_path: Path) -> None:
    cache = build(tmp_path)
    expected = cache[[1, 20]]["latent"]
    loader = DataLoader(cache, sampler=[[1, 20]], batch_size=None, num_workers=1, multiprocessing_context="spawn")
    (batch,) = loader
    assert torch.equal(batch["latent"], expected)


def test_shape_that_changes_between_shards_is_a_program_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard 1"):
        build(tmp_path, lambda indices: {"x": torch.zeros(len(indices), 1 + indices[0])})


def test_module_fingerprint_sees_every_value_name_and_dtype_but_not_the_layout() -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    reference = fingerprint_module(make())
    assert fingerprint_module(make()) == reference
    assert fingerprint_module(make().to(memory_format=torch.channels_last)) == reference
    changed = make()
    with torch.no_grad():
        changed[0].weight[3, 2, 1, 1] += 1e-3
    buffer = make()
    buffer[1].running_mean[2] = 1
    half = make().to(torch.bfloat16)
    renamed = nn.Sequential(nn.Identity(), *make())
    prints = [fingerprint_module(module) for module in (changed, buffer, half, renamed)]
    assert len({reference, *prints}) == 5


def test_string_fingerprint_sees_order_and_borders() -> None:
    assert len({fingerprint_strings(s) for s in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4


def test_damaged_shard_is_named_and_computed_again(tmp_path: Path) -> None:
    build(tmp_path)
    whole = shard_bytes(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(whole[1])
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"shard-00001.*damaged.*computed again"):
        build(tmp_path)
    assert shard_bytes(tmp_path) == whole


def test_checksums_of_large_sets_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "REMEMBERED", 3)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # so that no file has just changed
    reads: list[Path] = []

    def read(path: Path) -> str:
        reads.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(cache_module, "file_sha256", read)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(f"text {name}")
    first = fingerprint_path(folder)
    assert len(reads) == 2 and fingerprint_path(folder) == first and len(reads) == 2
    times = (folder / "a").stat()
    (folder / "a").write_text("text A")  # as long as before
    os.utime(folder / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint_path(folder) != first and reads[2:] == [folder / "a"]


def test_very_large_sets_are_known_by_sizes_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "WHOLE", 8)
    monkeypatch.setattr(cache_module, "END", 3)
    path = tmp_path / "a"

    def of(content: str) -> str:
        path.write_text(content)
        return fingerprint_path(path)

    first = of("begin middle end")
    assert of("begin mIddle end") == first  # nobody reads all of it
    assert len({first, of("Begin middle end"), of("begin middle enD"), of("begin  middle end")}) == 4
