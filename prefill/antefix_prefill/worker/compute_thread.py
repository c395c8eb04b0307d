"""The one thread that runs the model, the order in which it takes work, and awaits that cancellation cannot cut short.

    small jobs    decode steps, handoffs, checkpoints, adoptions: always next, in order of arrival
    chunks        of the tenant that has had the least time; of its prompts, the one with the least work left for the
                  time that it has waited, and every few turns the one that began first, so that a stream of short
                  prompts starves nobody

On a CPU, copies of rows and window states that nothing changes meanwhile run in a thread of their own (`run_apart`).
Small jobs also run between the layers of a chunk (`antefix.model.pauses`), so a decode step waits for one layer of a
chunk, and a chunk that always finds a step waiting still computes a layer per step. On a GPU, while steps run, chunks
have no more tokens than a layer computes within `step_delay_max_s`.

So a prompt with few tokens left after a hit waits for the running chunk of a long prompt and for at most one more
chunk, never for the whole long prompt. Chunks of such short prompts that wait at the same time run as one call of the
model, because most of the cost of a call is fixed. If several tenants want the worker, such a joint call takes no
longer than its first chunk would take on its tenant's share alone.

Between two decode steps the thread is free for a moment, and a chunk could start each time. So if a tenant has only
decode steps, another tenant's chunk waits until steps have got back the time that the previous chunk took. A step in
which other tenants' sequences take part counts for less than its time (`StepShares.repaid_s` in decode).

A request that is cancelled frees its rows of the pool. If the thread (or a read) still wrote into these rows, it would
overwrite another request's KV. So a cancellation waits for the running work, which takes one chunk at most.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

from antefix.model.pauses import with_pauses
from antefix.telemetry.exposition import SHORT_SECONDS, histogram
from antefix_prefill.worker.chunk_parts import ChunkParts

log = logging.getLogger("antefix_prefill.worker")

P = ParamSpec("P")
Q = TypeVar("Q")
T = TypeVar("T")


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await `work` to its end even if this task is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as err:
            cancelled = err
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # read it, or asyncio would log it as never retrieved
        raise cancelled
    return task.result()


# One of this many chunks is the oldest prompt's, even if others have less left, so it keeps a quarter of its speed.
OLDEST_EVERY = 4
# Among chunks that have waited equally long, the one with the fewest tokens left is next. A chunk that has waited this
# much longer than others may have twice as many left: without this, hits of 700 tokens waited 12 s behind shorter ones.
AGED_S = 0.5
# A call costs as much as so many tokens on top of its own.
_CALL_TOKENS = 64
# Most tokens of pieces that run as one call. On a CPU antefix-tiny runs 256 in a fifth of a second, less than a chunk.
TOGETHER_TOKENS = 256


# A tenant that had work here within this time still counts as wanting the worker.
_RECENT_S = 1.0
_NUM_RECENT_MAX = 256
# How long the thread waits for a step whose turn it is. The event loop needs some milliseconds between two steps.
STEP_COMES_S = 0.01

# For how long a part of a chunk may keep a decode step waiting, if the settings say nothing else.
STEP_DELAY_MAX_S = 0.05

# The tenant of the request that the present task works for, and that tenant's share.
_tenant: ContextVar[tuple[str, int]] = ContextVar("antefix_compute_tenant", default=("", 1))


def compute_for(tenant: str, share: int = 1) -> None:
    """Set this task's tenant. Tenants take turns at chunks of prompts, by the time that their chunks took and by their
    shares.
    """
    _tenant.set((tenant, share))


@dataclass(frozen=True, slots=True)
class _Together:
    """function: takes several pieces of work and returns a result or an error for each, in their order."""

    function: Callable[[list[Any]], list[Any]]
    piece: object
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Job:
    """remaining: tokens that its prompt has left; None: a small job.  began: when the computation of its prompt began.
    together: how it can run with other jobs, if it can.  repaid_s: see `run_step`.
    """

    work: Callable[[], object]
    done: Future[object]
    remaining: int | None = None
    began: float = 0.0
    tenant: str = ""
    share: int = 1
    asked: float = field(default_factory=lambda: time.perf_counter())
    together: _Together | None = None
    repaid_s: float | None = None

    @property
    def kind(self) -> str:
        return "small" if self.remaining is None else "chunk"

    def run(self) -> None:
        try:
            self.done.set_result(self.work())
        except BaseException as err:  # noqa: BLE001 - any error is passed to the caller
            self.done.set_exception(err)

    def settle(self, result: object) -> None:
        if isinstance(result, BaseException):
            self.done.set_exception(result)
        else:
            self.done.set_result(result)


class ComputeThread:
    """Runs calls of the model one after another, off the event loop. torch spreads each call over the cores."""

    def __init__(self, name: str, *, step_delay_max_s: float = STEP_DELAY_MAX_S) -> None:
        """step_delay_max_s: for how long a part of a chunk may keep a decode step waiting."""
        self._parts_of_chunks = ChunkParts(step_delay_max_s)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._apart = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-apart")
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._small: collections.deque[_Job] = collections.deque()
        self._chunks: list[_Job] = []
        self._num_chunks_run = 0
        # How many pieces ran in another piece's call.
        self.num_joined = 0
        # Seconds that each waiting tenant's chunks took, and the clock of the tenant that was served last.
        self._clocks: dict[str, float] = {}
        self._now = 0.0
        # When each tenant last had work here, and its share.
        self._recent: dict[str, tuple[float, int]] = {}
        # The tenants whose sequences take part in decode steps now, and for how long steps go first.
        self._stepping: frozenset[str] = frozenset()
        self._steps_first_s = 0.0
        # The tenants whose chunk is running, or took time that steps are getting back.
        self._owing: frozenset[str] = frozenset()
        self.wait_s = histogram(
            "antefix_compute_wait_seconds",
            "How long small jobs and chunks of prompts waited for the compute thread.",
            ("work",),
            buckets=SHORT_SECONDS,
        )
        self.busy_s = histogram(
            "antefix_compute_seconds",
            "How long small jobs and chunks of prompts took on the compute thread.",
            ("work",),
            buckets=SHORT_SECONDS,
        )

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a small job. The job waits only for the running work, and for small jobs that came before it."""
        job = _Job(lambda: function(*args, **kwargs), Future())
        return cast(T, await self._submit(job))

    async def run_apart(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job that only reads, on a CPU, memory that no running work writes. The job does not wait for running
        work: otherwise a copy that takes a millisecond would wait for a step of many sequences.
        """
        done = self._apart.submit(function, *args, **kwargs)
        return cast(T, await uninterrupted(asyncio.wrap_future(done)))

    async def run_step(
        self, repaid_s: float | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a decode step.  repaid_s: how much of the time that other tenants' chunks took counts as given back with
        this step; None: the time that the step takes.
        """
        job = _Job(lambda: function(*args, **kwargs), Future(), repaid_s=repaid_s)
        return cast(T, await self._submit(job))

    async def run_chunk(
        self, remaining: int, began: float, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a chunk of a prompt that has `remaining` tokens left and whose computation began at `began`."""
        job = _Job(lambda: function(*args, **kwargs), Future(), remaining, began, *_tenant.get())
        return cast(T, await self._submit(job))

    async def run_piece(
        self,
        remaining: int,
        began: float,
        function: Callable[[list[Q]], list[T | Exception]],
        piece: Q,
        num_tokens: int,
    ) -> T:
        """`run_chunk` for a chunk of `num_tokens` that may run together with chunks of other prompts.

        function: takes all pieces of one call and returns a result or an error for each. If it raises for several
        pieces, it must not have changed anything: each piece then runs alone.
        """

        def alone() -> T:
            (result,) = function([piece])
            if isinstance(result, Exception):
                raise result
            return result

        job = _Job(alone, Future(), remaining, began, *_tenant.get())
        job.together = _Together(function, piece, num_tokens)
        return cast(T, await self._submit(job))

    def stepping_for(self, shares: Mapping[str, int]) -> None:
        """Tell the thread that sequences of these tenants take part in decode steps that follow one another; empty: no
        further step will come.
        """
        now = time.perf_counter()
        with self._lock:
            self._stepping = frozenset(shares)
            self._changed.notify()
            for tenant, share in shares.items():
                self._recent[tenant] = (now, share)

    @property
    def chunk_tenants(self) -> frozenset[str]:
        """The tenants whose chunks wait, are running, or took time that steps have not got back yet."""
        with self._lock:
            return self._owing.union(job.tenant for job in self._chunks)

    def chunk_tokens_max(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens the next chunk may have, so that it delays the running steps by at most
        `step_delay_max_s`.
        """
        return self._parts_of_chunks.tokens_max(num_tokens) if self._stepping else num_tokens

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._apart.shutdown(wait=True)

    async def _submit(self, job: _Job) -> object:
        with self._lock:
            if job.remaining is None:
                self._small.append(job)
                self._changed.notify()
            else:
                self._chunks.append(job)
                self._recent[job.tenant] = (job.asked, job.share)
                self._changed.notify()
        # One turn is submitted per job; each turn takes the best job at the moment when it begins.
        self._executor.submit(self._run_next)
        return await uninterrupted(asyncio.wrap_future(job.done))

    def _run_next(self) -> None:
        with self._lock:
            if self._steps_go_first():
                self._changed.wait_for(lambda: not self._steps_go_first(), timeout=STEP_COMES_S)
            if self._small:
                jobs = [self._small.popleft()]
            elif self._chunks:
                jobs = self._join_others(self._next_chunk())
            else:
                return  # this turn's job ran in the call of another one
            if jobs[0].remaining is not None:
                self._owing = frozenset(job.tenant for job in jobs)
        begun = time.perf_counter()
        for job in jobs:
            self.wait_s.labels(job.kind).observe(begun - job.asked)
        if jobs[0].remaining is None:
            self._run_small(jobs[0])
            return
        parts = self._parts_of_chunks
        parts.begin()
        with with_pauses(self._pause):
            _run(jobs)
        parts.end(sum(job.together.num_tokens for job in jobs if job.together is not None))
        took = time.perf_counter() - begun - parts.paused_s
        self.busy_s.labels("chunk").observe(took)
        self._steps_first_s = took - parts.repaid_s
        if self._steps_first_s <= 0:
            self._owing = frozenset()
        self._charge(jobs, took)

    def _run_small(self, job: _Job) -> float:
        """Run a small job. Returns how much of the time that chunks took counts as given back to steps."""
        begun = time.perf_counter()
        job.run()
        took = time.perf_counter() - begun
        self.busy_s.labels(job.kind).observe(took)
        repaid_s = took if job.repaid_s is None else job.repaid_s
        self._steps_first_s -= repaid_s
        if self._steps_first_s <= 0:
            self._owing = frozenset()
        return repaid_s

    def _pause(self) -> bool:
        """Run the small jobs that wait now. Called by the compute thread between the layers of a chunk. Returns whether
        steps are running.
        """
        with self._lock:
            jobs, owing = list(self._small), self._owing
            self._small.clear()
        begun, repaid_s = time.perf_counter(), 0.0
        with with_pauses(None):
            for job in jobs:
                self.wait_s.labels(job.kind).observe(time.perf_counter() - job.asked)
                repaid_s += self._run_small(job)
        self._owing = owing
        self._parts_of_chunks.paused(begun, time.perf_counter(), repaid_s)
        return bool(self._stepping)

    def _steps_go_first(self) -> bool:
        """Whether chunks wait for a step: some tenant has only steps here, and all tenants that have chunks have steps
        too.
        """
        chunks = {job.tenant for job in self._chunks}
        return bool(chunks) and chunks < self._stepping and self._steps_first_s > 0 and not self._small

    def _charge(self, jobs: list[_Job], took: float) -> None:
        """Add to each tenant's clock the share of the time that its jobs took."""
        with self._lock:
            if not self._chunks:
                self._clocks.clear()
                self._now = 0.0
                return
            for job in jobs:
                self._clocks[job.tenant] = self._clocks.get(job.tenant, self._now) + took / len(jobs) / job.share

    def _join_others(self, first: _Job) -> list[_Job]:
        """`first` and the jobs that run in the same call: up to TOGETHER_TOKENS tokens and, if several tenants want the
        thread, up to the tokens that the share of each piece's tenant allows. Each tenant gets one chunk of a prompt
        before any tenant gets a second; of one tenant, the chunk of the prompt with the least left comes first.
        """
        jobs = [first]
        if first.together is None:
            return jobs
        num_tokens = first.together.num_tokens
        parts = self._parts(first)
        most = min(float(TOGETHER_TOKENS), _tokens_max(first, parts))
        for job in self._in_turn(first.tenant):
            other = job.together
            if other is None or other.function is not first.together.function:
                continue
            # For a tenant that has a piece in the call already, more pieces only enlarge its own part.
            most_now = most if any(each.tenant == job.tenant for each in jobs) else min(most, _tokens_max(job, parts))
            if num_tokens + other.num_tokens <= most_now:
                num_tokens, most = num_tokens + other.num_tokens, most_now
                jobs.append(job)
                self._chunks.remove(job)
        self.num_joined += len(jobs) - 1
        return jobs

    def _in_turn(self, served: str) -> list[_Job]:
        """The other waiting chunks in the order of turns, after the tenant `served` has had one."""
        number = collections.Counter({served: 1})
        turns = []
        now = time.perf_counter()
        for job in sorted(self._chunks, key=lambda job: (_left_for_its_wait(job, now), job.began)):
            turns.append((number[job.tenant], job))
            number[job.tenant] += 1
        return [job for _, job in sorted(turns, key=lambda turn: turn[0])]

    def _parts(self, first: _Job) -> dict[str, float]:
        """The share of the thread for each tenant that wants it now (as `first` does) or did recently; all shares add
        up to 1.
        """
        since = time.perf_counter() - _RECENT_S
        if len(self._recent) > _NUM_RECENT_MAX:
            self._recent = {name: seen for name, seen in self._recent.items() if seen[0] >= since}
        shares = {name: share for name, (at, share) in self._recent.items() if at >= since}
        shares |= {each.tenant: each.share for each in (first, *self._chunks)}
        total = sum(shares.values())
        return {name: share / total for name, share in shares.items()}

    def _next_chunk(self) -> _Job:
        """A chunk of the tenant that had the least time: a chunk of its shortest prompt, and sometimes of its oldest
        one.
        """
        self._num_chunks_run += 1
        # In order of arrival, which decides between tenants that had equal time.
        tenants = list(dict.fromkeys(job.tenant for job in self._chunks))
        if len(tenants) > 1:
            # A tenant that returns after a pause starts level with the others, so that a pause earns no extra time.
            clocks = {tenant: max(self._now, self._clocks.get(tenant, 0.0)) for tenant in tenants}
            tenant = min(clocks, key=lambda tenant: clocks[tenant])
            self._clocks, self._now = clocks, clocks[tenant]
            jobs = [job for job in self._chunks if job.tenant == tenant]
        else:
            jobs = self._chunks
        if self._num_chunks_run % OLDEST_EVERY:
            now = time.perf_counter()
            job = min(jobs, key=lambda job: (_left_for_its_wait(job, now), job.began))
        else:
            job = min(jobs, key=lambda job: job.began)
        self._chunks.remove(job)
        return job


def _left_for_its_wait(job: _Job, now: float) -> float:
    """A chunk's place in the order: the lower, the sooner. It grows with what its prompt has left, and falls with the
    time that the chunk has waited.
    """
    return (cast(int, job.remaining) + _CALL_TOKENS) / (now - job.asked + AGED_S)


def _tokens_max(job: _Job, parts: Mapping[str, float]) -> float:
    """The largest number of tokens of a call that includes this piece, so that the call ends no later than the piece
    would on its tenant's share alone.
    """
    part = parts.get(job.tenant, 1.0)
    return cast(_Together, job.together).num_tokens / part if part < 1.0 else math.inf


def _run(jobs: list[_Job]) -> None:
    if len(jobs) > 1:
        together = [cast(_Together, job.together) for job in jobs]
        try:
            results = together[0].function([each.piece for each in together])
        except Exception:
            log.exception("a model call for chunks of %d prompts together failed; each chunk now runs alone", len(jobs))
        else:
            for job, result in zip(jobs, results, strict=True):
                job.settle(result)
            return
    for job in jobs:
        job.run()
