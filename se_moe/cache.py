"""Which experts stay in host memory: Algorithm 2 of the paper (section 3.2.2), and LRU/LFU to compare with.

The cache decides, it moves no bytes: `request(key)` says whether the key is there, and which entry makes room for it.
Five rules:

    repaired    default: the victim is the entry with the fewest hits (oldest inserted on ties) among those at or above
                the threshold (0: all); hits[p] = 1 on insertion, also after an eviction; all C slots are used
    text        the words of the paper: among entries with hits >= threshold the one with the fewest
    pseudocode  Algorithm 2 to the letter: only an entry that is the minimum of all hits *and* >= threshold
    lfu, lru    plain least frequently / least recently used, without decay

`repaired` and `text` differ in their default threshold and in what happens when no entry reaches it: `text` and
`pseudocode` leave the newcomer out ("bypass": the caller reads it and keeps no copy), `repaired` then takes the overall
minimum, so that the cache cannot freeze after the hits have decayed below the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.errors import UserError

RULES = ("repaired", "text", "pseudocode", "lfu", "lru")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Decision(Generic[Key]):
    """What a request means for the data. `victim` leaves (write it back if `victim_dirty`), then the key comes in.

    `bypass`: the key gets no slot; read it for this use only.
    """

    hit: bool
    victim: Key | None = None
    victim_dirty: bool = False
    bypass: bool = False


@dataclass
class CacheStatistics:
    """Counts since the start. `reads` = misses (bypassed ones too), `writes` = write-backs by eviction or flush."""

    requests: int = 0
    hits: int = 0
    reads: int = 0
    evictions: int = 0
    bypasses: int = 0
    writes: int = 0
    periods: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


@dataclass
class _Entry:
    hits: float
    inserted: int
    used: int
    dirty: bool = False


class SparseCache(Generic[Key]):
    """Bookkeeping of `capacity` slots.

    Args:
        capacity: usable slots C.
        rule: one of RULES.
        threshold: hits that an entry needs to be a victim (Algorithm 2, step 3). Ignored by lfu and lru.
        beta: factor on all hits at the end of a period; 1: no decay.
        period: requests in a period K; 0: no periods.
        on_period: called at the end of a period, e.g. to write changed entries back (Algorithm 2: "when the update
            period ends").
        write_through_evictions: count a write for every eviction, changed or not, as the paper's rule does.
    """

    def __init__(
        self,
        capacity: int,
        rule: str = "repaired",
        threshold: float = 0.0,
        beta: float = 0.5,
        period: int = 64,
        on_period: Callable[[], None] | None = None,
        write_through_evictions: bool = False,
    ) -> None:
        if rule not in RULES:
            raise UserError(f"cache rule {rule!r} is unknown; expected one of {', '.join(RULES)}")
        if capacity < 1:
            raise UserError(f"the cache needs at least one slot, got capacity {capacity}; enlarge the host budget")
        if not 0 < beta <= 1 or period < 0:
            raise UserError(f"expected beta in (0, 1] and a period of 0 or more requests, got {beta} and {period}")
        self.capacity, self.rule, self.threshold, self.beta, self.period = capacity, rule, threshold, beta, period
        self.on_period = on_period
        self.write_through_evictions = write_through_evictions
        self.statistics = CacheStatistics()
        self._entries: dict[Key, _Entry] = {}
        self._clock = 0
        self._steps = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[Key]:
        return list(self._entries)

    def hits_of(self, key: Key) -> float:
        return self._entries[key].hits

    def request(self, key: Key, pinned: Collection[Key] = ()) -> Decision[Key]:
        """One request of Algorithm 2. Entries in `pinned` are in use and cannot be victims."""
        self._clock += 1
        statistics = self.statistics
        statistics.requests += 1
        entry = self._entries.get(key)
        if entry is not None:
            entry.hits += 1
            entry.used = self._clock
            statistics.hits += 1
            decision: Decision[Key] = Decision(hit=True)
        else:
            statistics.reads += 1
            victim, dirty, admitted = None, False, True
            if len(self._entries) >= self.capacity:
                victim = self._victim(pinned)
                admitted = victim is not None
            if victim is not None:
                statistics.evictions += 1
                dirty = self._entries.pop(victim).dirty
                statistics.writes += dirty or self.write_through_evictions
            if admitted:
                self._entries[key] = _Entry(1.0, self._clock, self._clock)
            else:
                statistics.bypasses += 1
            decision = Decision(False, victim, dirty, bypass=not admitted)
        self._end_of_request()
        return decision

    def _victim(self, pinned: Collection[Key]) -> Key | None:
        free = {key: entry for key, entry in self._entries.items() if key not in pinned}
        if not free:
            return None
        if self.rule == "lru":
            return min(free, key=lambda key: free[key].used)

        def order(key: Key) -> tuple[float, int]:
            return free[key].hits, free[key].inserted

        if self.rule == "lfu":
            return min(free, key=order)
        eligible = [key for key, entry in free.items() if entry.hits >= self.threshold]
        if self.rule == "pseudocode":
            least = min(entry.hits for entry in self._entries.values())
            eligible = [key for key in eligible if free[key].hits == least]
        if not eligible and self.rule == "repaired":
            eligible = list(free)
        return min(eligible, key=order, default=None)

    def _end_of_request(self) -> None:
        if self.period == 0:
            return
        self._steps += 1
        if self._steps < self.period:
            return
        self._steps = 0
        self.statistics.periods += 1
        if self.rule not in ("lfu", "lru"):
            for entry in self._entries.values():
                entry.hits *= self.beta
        if self.on_period is not None:
            self.on_period()

    def mark_dirty(self, key: Key) -> None:
        """The entry's bytes have changed since they were read."""
        self._entries[key].dirty = True

    def dirty_keys(self) -> list[Key]:
        return [key for key, entry in self._entries.items() if entry.dirty]

    def mark_written(self, key: Key) -> None:
        """The entry has been written back and stays."""
        self._entries[key].dirty = False
        self.statistics.writes += 1

    def drop(self, key: Key) -> None:
        """Forget an entry whose bytes are worthless (a failed read)."""
        self._entries.pop(key, None)
