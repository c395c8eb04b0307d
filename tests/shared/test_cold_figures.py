"""A cold restore is held against the reader that is the best next to it, not against the best rate of the run."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.store_cold import NUM_BEST, ROUNDS_OF_ALL, cold_figures, next_to_readers


class Disk:
    """Becomes faster with each read, as a shared disk may: only what is read next to each other can be compared."""

    def __init__(self) -> None:
        self.num_reads = 0

    def read(self, part: float) -> float:
        self.num_reads += 1
        return part * (1000 + self.num_reads)


def test_the_limit_is_the_reader_that_is_the_best_next_to_restores() -> None:
    disk = Disk()
    speeds = {"a": 0.5, "b": 1.25, "c": 1.0, "d": 0.7, "e": 0.4, "f": 1.1}
    readers = {name: partial(disk.read, speed) for name, speed in speeds.items()}
    found = next_to_readers(partial(disk.read, 1.0), readers, rounds=ROUNDS_OF_ALL + 5)
    best = sorted(speeds, key=lambda name: -speeds[name])[:NUM_BEST]
    assert {name: len(ratios) for name, ratios in found.items()} == {
        name: ROUNDS_OF_ALL + 5 * (name in best) for name in speeds
    }
    for name, speed in speeds.items():
        assert found[name] == pytest.approx([1 / speed] * len(found[name]))
    figures = cold_figures(found)
    assert figures["best_reader"] == "b"
    assert figures["restore_over_best_reader"] == pytest.approx(0.8)
    assert figures["restore_over_best_reader_rounds"] == ROUNDS_OF_ALL + 5
    assert figures["restore_over_e"] == pytest.approx(2.5)


def test_a_reader_that_was_dropped_is_not_the_limit() -> None:
    figures = cold_figures({"kept": [1.0, 1.2, 1.1], "dropped": [0.5, 0.9]})
    assert figures["best_reader"] == "kept"
