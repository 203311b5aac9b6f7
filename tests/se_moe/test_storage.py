"""Tiers: budgets are hard, files bypass the cache and survive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from se_moe.storage import (
    BLOCK,
    DeviceArena,
    ExpertKey,
    FileTier,
    HostSlot,
    HostTier,
    RecordLayout,
    Throttle,
)

PARAMETERS = {"fc1.weight": torch.zeros(6, 5), "fc1.bias": torch.zeros(6), "fc2.weight": torch.zeros(5, 6)}
LAYOUT = RecordLayout.of_expert(PARAMETERS)
KEY = ExpertKey(1, 3)


def filled(value: float, layout: RecordLayout = LAYOUT) -> HostSlot:
    slot = HostSlot(layout, pinned=False)
    for tensor in slot.fields.values():
        tensor.fill_(value)
    return slot


def test_a_record_holds_parameters_moments_and_step_in_12_bytes_a_parameter() -> None:
    count = sum(tensor.numel() for tensor in PARAMETERS.values())
    assert LAYOUT.parameter_bytes == 4 * count
    assert LAYOUT.data_bytes == 12 * count + 8
    assert LAYOUT.slot_bytes % BLOCK == 0
    assert set(LAYOUT.fields) >= {"step", "exp_avg.fc1.bias", "exp_avg_sq.fc2.weight"}
    assert RecordLayout.of_expert(PARAMETERS, with_optimizer=False).data_bytes == 4 * count


def test_the_arena_refuses_what_exceeds_its_budget_and_names_the_holders() -> None:
    arena = DeviceArena(10_000)
    charge = arena.charge(4_000, "dense parameters")
    block = arena.allocate(4_096, "experts of layer 0")
    assert arena.used_bytes == 8_096
    with pytest.raises(UserError, match=r"experts of layer 1 needs 2048 bytes, 1904 of 10000.*dense parameters: 4 kB"):
        arena.allocate(2_048, "experts of layer 1")
    with pytest.raises(UserError, match="device budget exceeded"):
        arena.charge(2_000, "gradients")
    assert arena.try_allocate(2_048, "prefetch") is None
    block.free()
    charge.free()
    charge.free()
    assert (arena.used_bytes, arena.peak_bytes, arena.held()) == (0, 8_096, {})


def test_freed_neighbours_merge_and_fragmentation_is_reported() -> None:
    arena = DeviceArena(4 * 256)
    blocks = [arena.allocate(256, f"b{i}") for i in range(4)]
    blocks[0].free()
    blocks[2].free()
    with pytest.raises(UserError, match="in pieces of at most 256 bytes"):
        arena.allocate(512, "wide")
    blocks[1].free()
    assert arena.allocate(768, "wide").start == 0


def test_blocks_do_not_overlap() -> None:
    arena = DeviceArena(1 << 16)
    generator = torch.Generator().manual_seed(0)
    held: list = []
    for n in range(200):
        size = int(torch.randint(1, 6000, (), generator=generator))
        block = arena.try_allocate(size, "x")
        if held and (block is None or torch.rand((), generator=generator) < 0.3):
            old, tag = held.pop(int(torch.randint(len(held), (), generator=generator)))
            assert bool((old.buffer == tag).all()), "another block wrote into this one"
            old.free()
        if block is not None:
            block.buffer.fill_(n % 251)
            held.append((block, n % 251))
    for block, tag in held:
        assert bool((block.buffer == tag).all())
        block.free()
    assert arena.allocate(arena.budget_bytes, "everything").size == arena.budget_bytes


def test_the_host_tier_refuses_a_slot_too_many() -> None:
    tier = HostTier(2 * LAYOUT.slot_bytes + 100, LAYOUT)
    first, _ = tier.take(), tier.take()
    with pytest.raises(UserError, match="host budget exceeded: all 2 slots"):
        tier.take()
    tier.give(first)
    assert tier.take() is first and tier.used_bytes == 2 * LAYOUT.slot_bytes
    with pytest.raises(UserError, match="holds 0 experts"):
        HostTier(100, LAYOUT)


@pytest.mark.parametrize("direct", [True, False])
def test_a_record_comes_back_from_its_file_bit_by_bit(tmp_path: Path, direct: bool) -> None:
    tier = FileTier(tmp_path, LAYOUT)
    tier.direct = direct and tier.direct
    slot = HostSlot(LAYOUT, pinned=False)
    for name, tensor in slot.fields.items():
        tensor.copy_(torch.full(tensor.shape, 7) if name == "step" else torch.randn(tensor.shape))
    tier.write(KEY, slot)
    back = HostSlot(LAYOUT, pinned=False)
    tier.read(KEY, back)
    ordinary = load_file(tier.path(KEY))
    for name, tensor in slot.fields.items():
        assert torch.equal(back.fields[name], tensor)
        assert torch.equal(ordinary[name], tensor), "the file is not the safetensors file it claims to be"
    assert tier.path(KEY).stat().st_size == LAYOUT.file_bytes == tier.live_bytes == disk_bytes(tier)
    assert tier.statistics.bytes_read == tier.statistics.bytes_written == LAYOUT.file_bytes


def test_reads_do_not_come_from_the_page_cache(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, RecordLayout.of_expert({"w": torch.zeros(256, 1024)}))
    if not tier.direct:
        pytest.skip("this file system has no direct reads")
    slot = filled(1.0, tier.layout)
    tier.write(KEY, slot)
    before = _disk_bytes_read()
    for _ in range(3):
        tier.read(KEY, slot)
    assert _disk_bytes_read() - before >= 3 * tier.layout.file_bytes


def disk_bytes(tier: FileTier) -> int:
    """Bytes on disk now, versions of earlier manifests included."""
    return sum(path.stat().st_size for path in tier.folder.glob("*.safetensors"))


def _disk_bytes_read() -> int:
    """Bytes that this process made the drives read (not the page cache)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def test_the_throttle_is_a_queue_of_one_drive() -> None:
    throttle = Throttle(bytes_per_second=1e6, latency=0.25)
    assert throttle.book(500_000, start=10.0) == pytest.approx(10.75)
    assert throttle.book(500_000, start=10.1) == pytest.approx(11.5), "the second access waits for the first"
    assert throttle.book(0, start=20.0) == pytest.approx(20.25)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, LAYOUT)
    tier.write(KEY, filled(1.0))
    with pytest.raises(UserError, match="there is no expert 9 of layer 1"):
        tier.read(ExpertKey(1, 9), filled(0.0))
    with tier.path(KEY).open("r+b") as file:
        file.truncate(LAYOUT.file_bytes - 8)
    with pytest.raises(UserError, match="the file is damaged"):
        tier.read(KEY, filled(0.0))
    other = RecordLayout.of_expert(
        {"fc1.weight": torch.zeros(5, 6), "fc1.bias": torch.zeros(6), "x": torch.zeros(5, 6)}
    )
    foreign = FileTier(tmp_path / "other", other)
    foreign.write(KEY, filled(1.0, other))
    tier.path(KEY).write_bytes(foreign.path(KEY).read_bytes())
    with pytest.raises(UserError, match=r"written for another model|the file is damaged"):
        tier.read(KEY, filled(0.0))


def test_the_file_budget_is_hard(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, LAYOUT, budget_bytes=2 * LAYOUT.file_bytes)
    tier.write(ExpertKey(0, 0), filled(0.0))
    tier.write(ExpertKey(0, 1), filled(0.0))
    tier.write(ExpertKey(0, 1), filled(1.0))
    with pytest.raises(UserError, match="file budget exceeded: expert 2 of layer 0"):
        tier.write(ExpertKey(0, 2), filled(0.0))


def test_write_backs_after_a_commit_do_not_change_the_committed_state(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, LAYOUT)
    other = ExpertKey(0, 0)
    for key in (KEY, other):
        tier.write(key, filled(1.0))
    tier.commit("step-1", {"loss": 2.5})
    for value in (2.0, 3.0):
        tier.write(KEY, filled(value))
    assert disk_bytes(tier) == 3 * LAYOUT.file_bytes, "only the committed and the newest version stay"
    again = FileTier(tmp_path, LAYOUT)
    assert again.restore("step-1") == {"loss": 2.5}
    slot = filled(0.0)
    again.read(KEY, slot)
    assert float(slot.fields["fc1.bias"][0]) == 1.0
    again.write(KEY, filled(4.0))
    again.commit("step-2")
    again.prune(["step-2"])
    assert again.tags() == ["step-2"] and disk_bytes(again) == again.live_bytes == 2 * LAYOUT.file_bytes
    with pytest.raises(UserError, match=r"nothing was committed as 'step-1'; committed: step-2"):
        again.restore("step-1")
    again.path(other).unlink()
    with pytest.raises(UserError, match=r"listed in manifest-step-2\.json, but it is missing"):
        FileTier(tmp_path, LAYOUT).restore("step-2")


def test_a_failed_write_back_keeps_the_last_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = FileTier(tmp_path, LAYOUT)
    tier.write(KEY, filled(1.0))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(UserError, match=r"No space left on device.*its last version is kept"):
            tier.write(KEY, filled(2.0))
    slot = filled(0.0)
    tier.read(KEY, slot)
    assert float(slot.fields["fc1.bias"][0]) == 1.0 and len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from se_moe.storage import ExpertKey, FileTier, HostSlot, RecordLayout
layout = RecordLayout.of_expert({"w": torch.zeros(64, 64)})
tier, slot = FileTier(sys.argv[1], layout), HostSlot(layout, pinned=False)
for step in range(1, 100_000):
    for expert in range(4):
        for tensor in slot.fields.values():
            tensor.fill_(10 * step + expert)
        tier.write(ExpertKey(0, expert), slot)
    tier.commit(f"{step:06d}")
    tier.prune([f"{step:06d}"])
    print(step, flush=True)
"""


def test_kill_9_during_write_back_leaves_the_last_commit_whole(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(repository)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline(), "the writer died"
    time.sleep(0.013)  # somewhere inside a step
    process.send_signal(signal.SIGKILL)
    process.wait()
    layout = RecordLayout.of_expert({"w": torch.zeros(64, 64)})
    tier = FileTier(tmp_path, layout)
    tag = tier.tags()[-1]
    tier.restore(tag)
    slot = HostSlot(layout, pinned=False)
    for expert in range(4):
        tier.read(ExpertKey(0, expert), slot)
        for tensor in slot.fields.values():
            assert bool((tensor == 10 * int(tag) + expert).all()), "a half-written record"
    tier.prune([tag])
    assert disk_bytes(tier) == tier.live_bytes
