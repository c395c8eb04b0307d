"""Times of reads, which a store's figures are held against, are of all reads."""

from __future__ import annotations

import threading

import pytest

from benchmarks.store_limits import _shared_out


@pytest.mark.parametrize("depth", [1, 3])
def test_a_read_that_fails_in_any_thread_gives_no_time(depth: int) -> None:
    """Otherwise a record would have the time of fewer reads."""
    failing = threading.Event()

    def read(first: int) -> None:
        if depth == 1 or threading.current_thread() is not threading.main_thread():
            failing.set()
            raise AssertionError("0 of 4 blocks were read")
        # The main thread has a read until another thread failed.
        assert failing.wait(300)

    with pytest.raises(AssertionError, match="0 of 4"):
        _shared_out(read, range(8), depth)


def test_each_read_is_done_once() -> None:
    done: list[int] = []
    assert _shared_out(done.append, range(20), 3) >= 0
    assert sorted(done) == list(range(20))
