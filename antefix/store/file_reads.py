"""Reads of a store's files, in threads, and bounded in time: a disk or a mount that hangs is a miss.

A thread that waits for a disk cannot be stopped, and writes into its buffers whenever the disk comes back. So a read
that is given up says when nobody writes any more, and the owner of the buffers keeps them until then. While one hangs
no other one begins: at most the threads that there are wait, and the first of them to come back says that it is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.store.breaker import Breaker

T = TypeVar("T")
NUM_THREADS: Final = 4
# Of a read besides its bytes. Threads of a busy machine wait for a core as well.
SLACK_S: Final = 5.0
# The most that a read may take, whatever its size.
_READ_S_MAX: Final = 60.0


class ReadHangs(Unavailable):
    """A read was given up and still runs. To a worker it is a miss; its buffers must not be used again yet."""

    def __init__(self, message: str, works: Sequence[asyncio.Future[Any]] = ()) -> None:
        super().__init__(message)
        self.works = tuple(works)

    def when_over(self, do: Callable[[], object]) -> None:
        """Call `do` in the event loop when nobody writes into the buffers any more."""
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
    """One store directory's.  counts: where late and spared reads are counted."""

    def __init__(self, name: str, counts: Breaker, *, slack_s: float = SLACK_S) -> None:
        self._name = name
        self._counts = counts
        self._slack_s = slack_s
        # For how long a read may take, as measured.
        self._pace = Breaker(slack_s=slack_s)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="antefix-store")
        self._hanging: set[asyncio.Future[Any]] = set()

    @property
    def hangs(self) -> bool:
        """Whether a read that was given up is not over yet."""
        return bool(self._hanging)

    def close(self) -> None:
        """A thread that hangs is left behind: waiting for it would hang the caller that closes."""
        self._threads.shutdown(wait=not self._hanging, cancel_futures=True)

    async def run(self, call: Callable[[], T], nbytes: int = 0) -> T:
        """`call` in a thread. nbytes: that it may read.

        Nobody writes into its buffers after this returned, was cancelled or raised anything but ReadHangs.
        Raises:  ReadHangs.  Unavailable: another read hangs.
        """
        if self._hanging:
            self._counts.num_spared += 1
            raise Unavailable(f"{self._name} does not answer: a read of it hangs")
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
        """Until it is done or late. A cancellation waits as well, for as long as the read may take."""
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
        # Seen, or asyncio would log it as never retrieved.
        if not work.cancelled():
            work.exception()
        self._pace = Breaker(slack_s=self._slack_s)
