"""Jobs between vLLM's host memory and the store, in threads. The jobs are bounded: rows that cannot be stored in time
are dropped.

vLLM pins a job's rows until its result is fetched, so a slow store would occupy all of vLLM's host memory. One thread
stores, because a block must not overtake the block before it; several threads load.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

log = logging.getLogger("antefix.engines.vllm")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Generic[T]):
    """outcome: the result of the work; None if it failed or was not started."""

    job_id: int
    outcome: T | None
    seconds: float


class Transfers(Generic[T]):
    """vLLM's thread submits jobs and fetches results; the work runs in our threads."""

    def __init__(self, *, num_load_threads: int, queue_bytes_max: int) -> None:
        """queue_bytes_max: limit on bytes of rows that wait to be stored."""
        self._queue_bytes_max: Final = queue_bytes_max
        self._storing: Final = ThreadPoolExecutor(1, thread_name_prefix="antefix-vllm-store")
        self._loading: Final = ThreadPoolExecutor(num_load_threads, thread_name_prefix="antefix-vllm-load")
        self._done: Final[deque[Finished[T]]] = deque()
        self._under_way: Final[set[Future[T]]] = set()
        self._lock: Final = threading.Lock()
        self._ended: Final = threading.Condition(self._lock)
        self._queued_bytes = 0

    def store(self, job_id: int, nbytes: int, work: Callable[[], T]) -> bool:
        """Queue a job. Returns False if too many bytes wait already, in which case the job counts as failed."""
        with self._lock:
            # A job larger than the whole queue is accepted if no other job waits.
            is_full = self._queued_bytes > 0 and self._queued_bytes + nbytes > self._queue_bytes_max
            self._queued_bytes += 0 if is_full else nbytes
        if is_full:
            self._done.append(Finished(job_id=job_id, outcome=None, seconds=0.0))
            return False
        self._start(self._storing, job_id, nbytes, work)
        return True

    def load(self, job_id: int, work: Callable[[], T]) -> None:
        self._start(self._loading, job_id, 0, work)

    def finished(self) -> list[Finished[T]]:
        """The jobs that ended since the last call; each job is returned once."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def drain(self) -> None:
        """Wait until the jobs so far have ended; after that no thread touches vLLM's memory, and `finished` has all
        jobs.
        """
        with self._ended:
            jobs = set(self._under_way)
            # Not `concurrent.futures.wait`: a future is done a moment before its callback has run.
            self._ended.wait_for(lambda: jobs.isdisjoint(self._under_way))

    def close(self) -> None:
        self._loading.shutdown()
        self._storing.shutdown()

    def _start(self, pool: ThreadPoolExecutor, job_id: int, nbytes: int, work: Callable[[], T]) -> None:
        began = time.monotonic()
        future = pool.submit(work)
        with self._lock:
            self._under_way.add(future)

        def finish(ended: Future[T]) -> None:
            err = ended.exception()
            if err is not None:
                log.error(
                    "loading blocks into vLLM or storing blocks failed; blocks that were not loaded are computed again",
                    exc_info=err,
                )
            outcome = None if err is not None else ended.result()
            self._done.append(Finished(job_id=job_id, outcome=outcome, seconds=time.monotonic() - began))
            with self._ended:
                self._queued_bytes -= nbytes
                self._under_way.discard(ended)
                self._ended.notify_all()

        future.add_done_callback(finish)
