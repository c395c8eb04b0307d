"""One thread for the model, in what order it takes its work, and awaits that a cancelled request cannot cut short.

    small jobs    decode steps, handoffs, checkpoints, adoptions: always next, in the order in which they came
    chunks        of the prompt with the least work left; every few turns of the prompt that began first, so that a
                  stream of short prompts starves nobody

So a short rest after a hit waits for a long prompt's chunk in hand, and at most for one more; never for the prompt.

A cancelled request gives its pool rows back. If the thread (or a read) were still writing into them, another
request's KV would be overwritten: so cancellation waits for the work in hand, which takes one chunk at most.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await `work` to its end even when cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as err:
            cancelled = err
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen here, or asyncio would log it as never retrieved
        raise cancelled
    return task.result()


# Of so many chunks one is the oldest prompt's, if others have less left: it keeps a quarter of its speed at least.
OLDEST_EVERY = 4


@dataclass(slots=True, eq=False)
class _Job:
    """remaining: tokens that its prompt has left, None for a small job.  began: when its prompt's computing began."""

    work: Callable[[], object]
    done: Future[object]
    remaining: int | None = None
    began: float = 0.0

    def run(self) -> None:
        try:
            self.done.set_result(self.work())
        except BaseException as err:  # noqa: BLE001 - whoever asked for the work is told, whatever it is
            self.done.set_exception(err)


class ComputeThread:
    """Runs model calls one after another, off the event loop; torch spreads each over the cores by itself."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._small: collections.deque[_Job] = collections.deque()
        self._chunks: list[_Job] = []
        self._num_chunks_run = 0

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A small job, or a decode step: it never waits for more than the work in hand and small jobs before it."""
        job = _Job(lambda: function(*args, **kwargs), Future())
        return cast(T, await self._submit(job))

    async def run_chunk(
        self, remaining: int, began: float, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """A chunk of a prompt that has `remaining` tokens left, whose computing began at `began`."""
        job = _Job(lambda: function(*args, **kwargs), Future(), remaining, began)
        return cast(T, await self._submit(job))

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    async def _submit(self, job: _Job) -> object:
        with self._lock:
            if job.remaining is None:
                self._small.append(job)
            else:
                self._chunks.append(job)
        # As many turns as jobs: each takes the job that is best when it begins.
        self._executor.submit(self._run_next)
        return await uninterrupted(asyncio.wrap_future(job.done))

    def _run_next(self) -> None:
        with self._lock:
            job = self._small.popleft() if self._small else self._next_chunk()
        job.run()

    def _next_chunk(self) -> _Job:
        self._num_chunks_run += 1
        if self._num_chunks_run % OLDEST_EVERY:
            job = min(self._chunks, key=lambda job: (job.remaining, job.began))
        else:
            job = min(self._chunks, key=lambda job: job.began)
        self._chunks.remove(job)
        return job
