"""Reads a store's files in threads, with a time limit: a read from a hanging disk or mount is a miss.

A thread that waits for a disk cannot be stopped, and it writes into its buffers when the disk answers again. So a read
that was given up calls back when its thread has ended, and the buffers' owner keeps them until then. While a read
hangs, no other read begins, so at most the threads of one pool hang. When any of the hanging reads ends, the disk is
known to answer again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.start_threads import start_threads
from antefix.store.breaker import Breaker

T = TypeVar("T")
NUM_THREADS: Final = 4
# Time that a read may take in addition to moving its bytes: on a busy machine threads wait for a core as well.
SLACK_S: Final = 5.0
# The longest time that a read of any size may take.
_READ_S_MAX: Final = 60.0


class ReadHangs(Unavailable):
    """A read was given up, but the thread of the read still runs. A worker treats such a read as a miss and must not
    reuse its buffers yet.
    """

    def __init__(self, message: str, works: Sequence[asyncio.Future[Any]] = ()) -> None:
        super().__init__(message)
        self.works = tuple(works)

    def when_over(self, do: Callable[[], object]) -> None:
        """Call `do` in the event loop as soon as no thread writes into the buffers any more."""
        left = {work for work in self.works if not work.done()}

        def ended(work: asyncio.Future[Any]) -> None:
            left.discard(work)
            if not left:
                do()

        if not left:
            do()
        for work in tuple(left):
            work.add_done_callback(ended)


class FileReads:
    """The reads of one store directory.  counts: takes the numbers of late reads and of reads that were not started."""

    def __init__(self, name: str, counts: Breaker, *, slack_s: float = SLACK_S) -> None:
        self._name = name
        self._counts = counts
        self._slack_s = slack_s
        # Computes a read's time limit from the measured rate.
        self._pace = Breaker(slack_s=slack_s)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="antefix-store")
        start_threads(self._threads, NUM_THREADS)
        self._hanging: set[asyncio.Future[Any]] = set()

    @property
    def hangs(self) -> bool:
        """Whether the thread of a read that was given up still runs."""
        return bool(self._hanging)

    def close(self) -> None:
        """Stop the threads, without waiting for a thread that hangs, because the caller would hang as well."""
        self._threads.shutdown(wait=not self._hanging, cancel_futures=True)

    async def run(self, call: Callable[[], T], nbytes: int = 0) -> T:
        """Run `call` in a thread. nbytes: how many bytes `call` may read, from which its time limit follows.

        No thread writes into the buffers after this returned, was cancelled or raised anything but ReadHangs.
        Raises:  ReadHangs.  Unavailable: another read hangs.
        """
        if self._hanging:
            self._counts.num_spared += 1
            raise Unavailable(f"the disk of {self._name} does not answer: a read of it hangs")
        limit_s = self._pace.limit_s(nbytes, _READ_S_MAX)
        work = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            with self._pace.asked(nbytes):
                await self._wait(work, time.monotonic() + limit_s)
                if not work.done():
                    raise DeadlineExceeded("the read is late")
        except DeadlineExceeded:
            raise self._given_up(work, limit_s) from None
        return work.result()

    async def _wait(self, work: asyncio.Future[Any], ends: float) -> None:
        """Wait until the read is done or its time has run out. A caller that is cancelled waits just as long."""
        cancelled: asyncio.CancelledError | None = None
        while not work.done() and (left_s := ends - time.monotonic()) > 0:
            try:
                await asyncio.wait({work}, timeout=left_s)
            except asyncio.CancelledError as err:
                cancelled = err
        if cancelled is not None and work.done():
            raise cancelled

    def _given_up(self, work: asyncio.Future[Any], limit_s: float) -> ReadHangs:
        self._counts.num_slow += 1
        self._hanging.add(work)
        work.add_done_callback(self._came_back)
        return ReadHangs(f"{self._name} does not answer: a read of it took more than {limit_s:.1f} s", [work])

    def _came_back(self, work: asyncio.Future[Any]) -> None:
        self._hanging.discard(work)
        # Retrieve the exception, or asyncio logs that it was never retrieved.
        if not work.cancelled():
            work.exception()
        self._pace = Breaker(slack_s=self._slack_s)
