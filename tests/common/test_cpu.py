"""Sizes that repeat."""

import pytest

from common.cpu import few_sizes


@pytest.mark.parametrize("per_octave", [8, 16])
def test_few_sizes_are_few_and_hardly_larger(per_octave: int) -> None:
    sizes = [few_sizes(count, per_octave) for count in range(1, 4097)]
    assert all(count <= size <= count * (1 + 1 / per_octave) + 8 for count, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and all(size % 8 == 0 for size in sizes)
    assert len(set(sizes[2048:])) == per_octave  # one octave
