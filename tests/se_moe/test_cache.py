"""Cache rules: what Algorithm 2 does, and what the repaired rule does better."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from se_moe.cache import SparseCache


def zipf_trace(count: int, items: int, exponent: float, shifts: int = 0, seed: int = 0) -> list[int]:
    """Requests whose popularity ranks move on by 7 items `shifts` times."""
    weights = torch.arange(1, items + 1, dtype=torch.float64) ** -exponent
    generator = torch.Generator().manual_seed(seed)
    requests = torch.multinomial(weights, count, replacement=True, generator=generator)
    phase = torch.arange(count) * (shifts + 1) // count
    return ((requests + 7 * phase) % items).tolist()


def hit_rate(trace: list[int], rule: str, **options: float) -> float:
    cache: SparseCache[int] = SparseCache(8, rule, **options)  # type: ignore[arg-type]
    for request in trace:
        cache.request(request)
    return cache.statistics.hit_rate


def test_decay_beats_lfu_by_five_points_under_a_shift_and_keeps_up_without() -> None:
    shifting, stationary = zipf_trace(4000, 32, 1.2, shifts=7), zipf_trace(4000, 32, 1.2)
    ours = {"beta": 0.5, "period": 25}
    assert hit_rate(shifting, "repaired", **ours) >= hit_rate(shifting, "lfu") + 0.05
    best = max(hit_rate(stationary, "lfu"), hit_rate(stationary, "lru"))
    assert hit_rate(stationary, "repaired", beta=0.9, period=200) >= best - 0.01


def test_the_pseudocode_freezes_where_the_repaired_rule_does_not() -> None:
    trace = zipf_trace(2000, 24, 1.2, shifts=3)
    frozen = hit_rate(trace, "pseudocode", threshold=2.0, beta=0.8, period=25)
    repaired = hit_rate(trace, "repaired", threshold=2.0, beta=0.8, period=25)
    assert frozen < repaired - 0.1


def test_the_victim_has_the_fewest_hits_and_is_the_oldest_of_equals() -> None:
    cache: SparseCache[str] = SparseCache(3, period=0)
    for key in "abcab":
        cache.request(key)
    assert cache.request("d").victim == "c"
    assert cache.hits_of("d") == 1.0
    assert cache.request("e").victim == "d"
    cache.request("e")
    assert cache.request("f").victim == "a", "a, b and e have two hits each; a is the oldest"


def test_a_pinned_entry_is_no_victim() -> None:
    cache: SparseCache[str] = SparseCache(2, period=0)
    cache.request("a")
    cache.request("b")
    assert cache.request("c", pinned={"a"}).victim == "b"
    decision = cache.request("d", pinned={"a", "c"})
    assert decision.bypass and decision.victim is None and "d" not in cache


def test_only_changed_entries_are_written_and_the_period_flushes_them() -> None:
    flushed: list[list[str]] = []
    cache: SparseCache[str] = SparseCache(2, period=4)
    cache.on_period = lambda: flushed.append(cache.dirty_keys())
    cache.request("a")
    cache.mark_dirty("a")
    cache.request("b")
    assert cache.request("c").victim_dirty
    assert cache.statistics.writes == 1
    assert not cache.request("d").victim_dirty
    assert cache.statistics.writes == 1 and cache.statistics.periods == 1 and flushed == [[]]


def test_all_slots_are_used() -> None:
    cache: SparseCache[int] = SparseCache(4)
    assert all(cache.request(k).victim is None for k in range(4)) and len(cache) == 4


def test_bad_options_are_named() -> None:
    with pytest.raises(UserError, match="cache rule 'fifo' is unknown"):
        SparseCache(4, "fifo")
    with pytest.raises(UserError, match="at least one slot"):
        SparseCache(0)
    with pytest.raises(UserError, match="beta in"):
        SparseCache(4, beta=0.0)
