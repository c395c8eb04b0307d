"""One thread for the model, in what order it takes its work, and awaits that a cancelled request cannot cut short.

    small jobs    decode steps, handoffs, checkpoints, adoptions: always next, in the order in which they came
    chunks        of the tenant that has had the least time; of its prompts, the one with the least work left, and every
                  few turns the one that began first, so that a stream of short prompts starves nobody

So a short rest after a hit waits for a long prompt's chunk in hand, and at most for one more; never for the prompt.
Short rests that wait together run together, as one call of the model: most of what each costs is paid once.

A cancelled request gives its pool rows back. If the thread (or a read) were still writing into them, another
request's KV would be overwritten: so cancellation waits for the work in hand, which takes one chunk at most.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

from antefix.telemetry.exposition import SHORT_SECONDS, histogram

log = logging.getLogger("antefix_prefill.worker")

P = ParamSpec("P")
Q = TypeVar("Q")
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
# Tokens of pieces that run as one call. On a CPU 256 of antefix-tiny take a fifth of a second, less than a whole chunk.
TOGETHER_TOKENS = 256


# Whose request the present task works for.
_tenant: ContextVar[str] = ContextVar("antefix_compute_tenant", default="")


def compute_for(tenant: str) -> None:
    """From here on, in this task: chunks of several tenants take turns by the time that theirs took."""
    _tenant.set(tenant)


@dataclass(frozen=True, slots=True)
class _Together:
    """function: of many pieces, gives a result or an error for each, in their order."""

    function: Callable[[list[Any]], list[Any]]
    piece: object
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Job:
    """remaining: tokens that its prompt has left, None for a small job.  began: when its prompt's computing began.
    together: how it runs with others, where it may."""

    work: Callable[[], object]
    done: Future[object]
    remaining: int | None = None
    began: float = 0.0
    tenant: str = ""
    asked: float = field(default_factory=time.perf_counter)
    together: _Together | None = None

    @property
    def kind(self) -> str:
        return "small" if self.remaining is None else "chunk"

    def run(self) -> None:
        try:
            self.done.set_result(self.work())
        except BaseException as err:  # noqa: BLE001 - the caller is told, whatever it is
            self.done.set_exception(err)

    def settle(self, result: object) -> None:
        if isinstance(result, BaseException):
            self.done.set_exception(result)
        else:
            self.done.set_result(result)


class ComputeThread:
    """Runs model calls one after another, off the event loop; torch spreads each over the cores by itself."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._small: collections.deque[_Job] = collections.deque()
        self._chunks: list[_Job] = []
        self._num_chunks_run = 0
        # Pieces that ran in another one's call.
        self.num_joined = 0
        # Seconds that each tenant's chunks took, for those that wait; and where who is served stands.
        self._clocks: dict[str, float] = {}
        self._now = 0.0
        self.wait_s = histogram(
            "antefix_compute_wait_seconds",
            "How long work waited for the compute thread: small jobs, and chunks of prompts.",
            ("work",),
            buckets=SHORT_SECONDS,
        )
        self.busy_s = histogram(
            "antefix_compute_seconds", "How long the compute thread took for it.", ("work",), buckets=SHORT_SECONDS
        )

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """A small job, or a decode step: it never waits for more than the work in hand and small jobs before it."""
        job = _Job(lambda: function(*args, **kwargs), Future())
        return cast(T, await self._submit(job))

    async def run_chunk(
        self, remaining: int, began: float, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """A chunk of a prompt that has `remaining` tokens left, whose computing began at `began`."""
        job = _Job(lambda: function(*args, **kwargs), Future(), remaining, began, _tenant.get())
        return cast(T, await self._submit(job))

    async def run_piece(
        self,
        remaining: int,
        began: float,
        function: Callable[[list[Q]], list[T | Exception]],
        piece: Q,
        num_tokens: int,
    ) -> T:
        """`run_chunk` for a chunk of `num_tokens` that may run with other prompts'.

        function: takes all pieces of one call, gives a result or an error for each. If it raises for several, nothing
        may have changed: each runs alone.
        """

        def alone() -> T:
            (result,) = function([piece])
            if isinstance(result, Exception):
                raise result
            return result

        job = _Job(alone, Future(), remaining, began, _tenant.get())
        job.together = _Together(function, piece, num_tokens)
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
            if self._small:
                jobs = [self._small.popleft()]
            elif self._chunks:
                jobs = self._join_others(self._next_chunk())
            else:
                return  # it ran together with others
        begun = time.perf_counter()
        for job in jobs:
            self.wait_s.labels(job.kind).observe(begun - job.asked)
        _run(jobs)
        took = time.perf_counter() - begun
        self.busy_s.labels(jobs[0].kind).observe(took)
        if jobs[0].remaining is not None:
            self._charge(jobs, took)

    def _charge(self, jobs: list[_Job], took: float) -> None:
        """Each tenant has had its jobs' share of the time."""
        with self._lock:
            if not self._chunks:
                self._clocks.clear()
                self._now = 0.0
                return
            for job in jobs:
                self._clocks[job.tenant] = self._clocks.get(job.tenant, self._now) + took / len(jobs)

    def _join_others(self, first: _Job) -> list[_Job]:
        """With it all that run in the same call, least left first, as far as TOGETHER_TOKENS go."""
        jobs = [first]
        if first.together is None:
            return jobs
        left = TOGETHER_TOKENS - first.together.num_tokens
        for job in sorted(self._chunks, key=lambda job: (job.remaining, job.began)):
            other = job.together
            if other is not None and other.function is first.together.function and other.num_tokens <= left:
                left -= other.num_tokens
                jobs.append(job)
                self._chunks.remove(job)
        self.num_joined += len(jobs) - 1
        return jobs

    def _next_chunk(self) -> _Job:
        """Of the tenant that had least; of its prompts the shortest rest, and now and then the oldest."""
        self._num_chunks_run += 1
        tenants = {job.tenant for job in self._chunks}
        if len(tenants) > 1:
            # One that comes after a pause begins where the others are: a pause is not saved up.
            clocks = {tenant: max(self._now, self._clocks.get(tenant, 0.0)) for tenant in tenants}
            tenant = min(clocks, key=lambda tenant: clocks[tenant])
            self._clocks, self._now = clocks, clocks[tenant]
            jobs = [job for job in self._chunks if job.tenant == tenant]
        else:
            jobs = self._chunks
        if self._num_chunks_run % OLDEST_EVERY:
            job = min(jobs, key=lambda job: (job.remaining, job.began))
        else:
            job = min(jobs, key=lambda job: job.began)
        self._chunks.remove(job)
        return job


def _run(jobs: list[_Job]) -> None:
    if len(jobs) > 1:
        together = [cast(_Together, job.together) for job in jobs]
        try:
            results = together[0].function([each.piece for each in together])
        except Exception:
            log.exception("a call of %d prompts' pieces failed; each runs alone", len(jobs))
        else:
            for job, result in zip(jobs, results, strict=True):
                job.settle(result)
            return
    for job in jobs:
        job.run()
