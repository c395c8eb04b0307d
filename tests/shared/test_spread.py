"""Medians of repeated measurements, and how sure they are."""

from __future__ import annotations

import random
import statistics

import pytest

from benchmarks.spread import median_interval


def test_of_40_values_the_median_lies_between_the_14th_and_the_27th() -> None:
    assert median_interval(random.Random(1).sample(range(1, 41), 40)) == (14, 27)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_values_say_only_that_it_lies_among_them(count: int) -> None:
    assert median_interval(range(count)) == (0, count - 1)


def test_the_interval_has_the_true_median_in_95_of_100_cases() -> None:
    rng = random.Random(2)
    hits = []
    for _ in range(2000):
        low, high = median_interval([rng.random() for _ in range(40)])
        hits.append(low <= 0.5 <= high)
    assert 0.93 < statistics.mean(hits) < 0.98
