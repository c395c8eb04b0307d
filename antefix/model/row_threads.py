"""Threads that share a prefill's rows on a CPU: each thread runs its rows through whole layers, and the threads meet
twice per layer.

torch's own threads divide every operation and wait for one another at its end; for most operations of a small model,
waiting takes longer than the operation. A row's results do not depend on the rows next to it (`numerics`), so dividing
rows changes no bits.

Shapes:  N = rows of the batch, whole tiles.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

from antefix.model.numerics import ROW_TILE

if TYPE_CHECKING:
    from antefix.model.model import Model

T = TypeVar("T")

# With fewer rows per thread, the fixed cost of a thread's calls outweighs the time that it saves.
PART_ROWS_MIN = 32
# Only one forward pass at a time uses the helper threads. Another pass that runs meanwhile uses none.
_in_use = threading.Lock()


def parts_of(model: Model, num_rows: int, threads: int) -> list[slice]:
    """The rows of each thread, in whole tiles of rows. Only one part is returned if several threads would not be
    faster, or might change bits.
    """
    is_whole = model.ranks is None and model.offload is None
    if model.device.type != "cpu" or not model.threads_are_free or not is_whole or num_rows % ROW_TILE:
        threads = 1
    num_tiles = num_rows // ROW_TILE
    count = max(min(threads, num_rows // PART_ROWS_MIN), 1)
    edges = [ROW_TILE * (num_tiles * i // count) for i in range(count)] + [num_rows]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


class Meeting:
    """A point at which threads wait for one another. If one thread fails, the others fail too instead of waiting for
    that thread.
    """

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)

    def wait(self) -> None:
        self._barrier.wait()

    def run(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except BaseException:
            self._barrier.abort()
            raise


def run_each(works: Sequence[Callable[[Meeting], T]]) -> list[T] | None:
    """Run each work on its own thread, the first one on this thread; torch's operations do not use further threads.

    Returns None if the threads were busy with another call, in which case nothing has run. An error in one of the works
    is raised here after all works have ended.
    """
    if not _in_use.acquire(blocking=False):
        return None
    threads = torch.get_num_threads()
    try:
        meeting = Meeting(len(works))
        helpers = _helpers(len(works) - 1)
        others = [helpers.submit(_inferring, meeting, work) for work in works[1:]]
        # Only after the helpers began: setting this thread's number also sets the number that new threads start with.
        torch.set_num_threads(1)
        mine: Future[T] = Future()
        try:
            mine.set_result(meeting.run(functools.partial(works[0], meeting)))
        except BaseException as err:  # noqa: BLE001 - raised below, when no thread works on this call any more
            mine.set_exception(err)
        errors = [error for each in (mine, *others) if (error := each.exception()) is not None]
        # A BrokenBarrierError only says that another thread failed, so other errors come first.
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in (mine, *others)]
    finally:
        torch.set_num_threads(threads)
        _in_use.release()


def _inferring(meeting: Meeting, work: Callable[[Meeting], T]) -> T:
    with torch.inference_mode():
        return meeting.run(functools.partial(work, meeting))


@functools.cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "antefix-rows", initializer=torch.set_num_threads, initargs=(1,))
