"""The indexer keeps each query's best visible entries.

Of equal scores the lowest index wins, whatever else is scored.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.model.indexer import top_entries

INFINITY = float("inf")


def by_definition(scores: list[float], num_visible: int, k: int) -> list[int]:
    best = sorted(range(num_visible), key=lambda i: (-scores[i], i))[:k]
    return sorted(best) + [-1] * (k - len(best))


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, 3.0]), min_size=30, max_size=30), min_size=1),
    visible=st.lists(st.integers(0, 30), min_size=1),
    k=st.integers(1, 35),
    padding=st.integers(0, 9),
)
def test_the_best_visible_entries_lowest_index_first(
    rows: list[list[float]], visible: list[int], k: int, padding: int
) -> None:
    num = min(len(rows), len(visible))
    scores = torch.tensor(rows[:num])
    counts = torch.tensor(visible[:num])
    scores = torch.nn.functional.pad(scores, (0, padding))
    scores[torch.arange(30 + padding) >= counts[:, None]] = -INFINITY
    got = top_entries(scores, counts, k).tolist()
    assert got == [by_definition(row, count, k) for row, count in zip(rows, visible, strict=False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_choice_does_not_depend_on_how_many_entries_were_scored(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 3000, generator=generator).to(dtype)
    # A third of the scores are zero, as ReLU makes them, and so are equal.
    scores[scores < -0.4] = 0.0
    counts = torch.linspace(0, 900, 40).long()
    scores[torch.arange(3000) >= counts[:, None]] = -INFINITY
    wide = top_entries(scores, counts, 64)
    narrow = top_entries(scores[:, :900].contiguous(), counts, 64)
    assert torch.equal(wide, narrow)
    want = [by_definition(row, int(n), 64) for row, n in zip(scores.tolist(), counts, strict=True)]
    assert wide.tolist() == want


def test_all_scores_equal_keeps_the_first_entries() -> None:
    got = top_entries(torch.zeros(3, 1000), torch.full((3,), 1000), 7)
    assert np.array_equal(got.numpy(), np.tile(np.arange(7), (3, 1)))
