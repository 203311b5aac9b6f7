from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from electra.examples import ExampleBuilder, ExampleStore, build_store, row_of
from electra.wordpiece import Tokenizer, train_wordpiece

DOCUMENTS = [
    [
        f"The message number {i} of the president is sent to the congress in the year {1800 + i}."
        for i in range(start, 40)
    ]
    for start in (0, 7, 20)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([" ".join(d) for d in DOCUMENTS], 120)


def test_keeping_the_overflow_loses_no_token_and_keeps_their_order() -> None:
    lines = [list(range(100 * i, 100 * i + 3 + i % 17)) for i in range(60)]
    builder = ExampleBuilder(24, random.Random(3), keep_overflow=True)
    kept = [t for e in builder.document(lines) for t in e.first + e.second]
    assert kept == [t for line in lines for t in line]


class CountedLine(list[int]):
    """A line of tokens that counts how many were read."""

    read = 0

    def __getitem__(self, part: slice) -> list[int]:  # type: ignore[override]
        found = super().__getitem__(part)
        CountedLine.read += len(found)
        return found

    def __iter__(self) -> Iterator[int]:
        CountedLine.read += len(self)
        return super().__iter__()


@pytest.mark.parametrize("keep_overflow", [True, False])
def test_the_work_on_a_long_line_grows_with_its_length_alone(keep_overflow: bool) -> None:
    def work(tokens: int) -> int:
        CountedLine.read = 0
        builder = ExampleBuilder(64, random.Random(0), keep_overflow)
        made = list(builder.document([[1, 2, 3], CountedLine(range(tokens)), [4]]))
        assert sum(len(e.first) + len(e.second) for e in made) == (tokens + 4 if keep_overflow else 62)
        return CountedLine.read

    assert work(40_000) <= 40_000
    assert work(80_000) <= 2 * work(40_000) + 64


def test_the_official_builder_drops_what_exceeds_the_length() -> None:
    builder = ExampleBuilder(16, random.Random(0))
    examples = builder.add(list(range(100)))
    assert len(examples) == 1
    assert examples[0].first == list(range(14))
    assert builder.finish() == []


def test_rows_are_never_longer_than_the_maximum_and_one_in_ten_has_one_segment() -> None:
    builder = ExampleBuilder(32, random.Random(1))
    examples = [e for i in range(6000) for e in builder.add([i] * 4)]
    rows = [row_of(e, 1, 2) for e in examples]
    assert max(len(row) for row, _ in rows) <= 32
    single = sum(not e.second for e in examples) / len(examples)
    assert 0.07 < single < 0.16  # 10 % by design, and random lengths that leave no second sentence


def test_a_row_begins_with_cls_and_each_segment_ends_with_sep() -> None:
    builder = ExampleBuilder(16, random.Random(2))
    (example,) = [e for i in range(4) for e in builder.add([10 + i] * 4)]
    row, first_length = row_of(example, 1, 2)
    assert row[0] == 1
    assert row[first_length - 1] == 2
    assert row[-1] == 2


def test_too_short_a_maximum_is_refused() -> None:
    with pytest.raises(UserError, match="max_length=7"):
        ExampleBuilder(7, random.Random(0))


def test_a_store_holds_the_rows_of_the_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = build_store(tmp_path / "rows", DOCUMENTS, "docs", tokenizer, 32, seed=5)
    builder = ExampleBuilder(32, random.Random(5), keep_overflow=True)
    pieces = [[ids for ids in tokenizer.ids_of_many(document) if ids] for document in DOCUMENTS]
    examples = [example for document in pieces for example in builder.document(document)]
    stream = [row_of(example, tokenizer.cls_id, tokenizer.sep_id) for example in examples]
    assert len(store) == len(stream)
    for i, (ids, first_length) in enumerate(stream):
        stored, stored_first = store[i]
        assert np.array_equal(stored, ids)
        assert stored_first == first_length
    assert int(store.lengths.sum()) == store.statistics["tokens"] == len(store.ids_T)
    store.verify()


def test_a_store_is_reused_for_the_same_settings_and_built_anew_for_others(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "rows"
    first = build_store(folder, DOCUMENTS, "docs", tokenizer, 32).fingerprint

    def never() -> object:
        raise AssertionError("the documents were read again")
        yield

    assert build_store(folder, never(), "docs", tokenizer, 32).fingerprint == first  # type: ignore[arg-type]
    assert build_store(folder, DOCUMENTS, "docs", tokenizer, 24).fingerprint != first
    assert max(ExampleStore(folder).lengths) <= 24
    assert sorted(p.name for p in tmp_path.iterdir()) == [".rows.lock", "rows"]


def test_a_token_limit_ends_an_endless_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def endless() -> object:
        while True:
            yield DOCUMENTS[0]

    store = build_store(tmp_path / "rows", endless(), "endless", tokenizer, 32, max_tokens=3000)  # type: ignore[arg-type]
    assert 3000 <= store.statistics["tokens"] < 6000


def test_a_truncated_store_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build_store(tmp_path / "rows", DOCUMENTS, "docs", tokenizer, 32)
    path = tmp_path / "rows" / "ids.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"ids.npy: missing or truncated"):
        ExampleStore(tmp_path / "rows")


def test_changed_bytes_are_found_by_the_checksum(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = build_store(tmp_path / "rows", DOCUMENTS, "docs", tokenizer, 32)
    path = tmp_path / "rows" / "ids.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum differs"):
        store.verify()
    with pytest.warns(UserWarning, match=r"ids.npy: damaged .* built anew"):
        build_store(tmp_path / "rows", DOCUMENTS, "docs", tokenizer, 32).verify()


def test_no_text_is_refused_and_leaves_no_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no text was found"):
        build_store(tmp_path / "rows", [], "nothing", tokenizer, 32)
    assert not (tmp_path / "rows").exists()
