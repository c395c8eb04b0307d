"""Shares one restore of plain blocks out to threads, so that all of them have work from the beginning to the end.

The calling thread locates a few blocks, which the other threads begin to read. Meanwhile it locates the others, and
then reads too. When only a few runs of blocks are left, it checks the headers of all
blocks that were read so far, while the other threads read on. So all threads end at about the same time, and hardly any
header is left to check then.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from antefix.store_files.plain_reads import PlainRead, PlainReads, Run

# How long the calling thread waits for another one to begin, which may be busy with another restore.
_BEGINS_S: Final = 0.0002
# How many runs per thread are left when the calling thread begins to check. The last runs are short.
_LAST_RUNS: Final = 3


class SharedRead:
    """What is located, waits to be read, was read and was checked. The calling thread uses all methods, and other
    threads `work`.
    """

    def __init__(self, reads: PlainReads, seed: int, num_threads: int) -> None:
        """num_threads: how many threads read at most, including the calling one."""
        self._reads = reads
        self._seed = seed
        self._num_threads = num_threads
        self._waiting: SimpleQueue[tuple[int, int, Run] | None] = SimpleQueue()
        self._parts: list[PlainRead] = []
        # Per part: for each run a 1 if it was read, how many blocks were checked, and whether all of them were right.
        self._done: list[bytearray] = []
        self._checked: list[int] = []
        self._right: list[bool] = []
        self._begun: SimpleQueue[None] = SimpleQueue()
        self._has_begun = False
        self.has_failed = False

    def add(self, part: PlainRead) -> None:
        """Let threads read this part, whose segments are opened here.  Raises:  OSError: a segment is gone."""
        self._reads.open(part)
        number = len(self._parts)
        self._done.append(bytearray(len(part.runs)))
        self._checked.append(0)
        self._right.append(True)
        self._parts.append(part)
        for at, run in enumerate(part.runs):
            self._waiting.put((number, at, run))

    def let_another_begin(self) -> None:
        """Wait until another thread reads, for a moment at most. It needs Python's lock for that, and a thread that
        locates releases the lock for less time than a thread takes to wake up.
        """
        with suppress(Empty):
            self._begun.get(timeout=_BEGINS_S)

    def work(self) -> None:
        """Read run after run, until none is left and none will come."""
        while self._read_one():
            pass

    def _read_one(self) -> bool:
        task = self._waiting.get()
        if task is None:
            # For the next thread. A thread may come here twice, so one for each would not be enough.
            self._waiting.put(None)
            return False
        if not self._has_begun:
            self._has_begun = True
            self._begun.put(None)
        number, at, run = task
        if self.has_failed or not self._reads.read(self._parts[number], run, self._seed):
            self.has_failed = True
            return False
        self._done[number][at] = 1
        return True

    def end(self) -> None:
        """No more parts will be added."""
        self._waiting.put(None)

    def stop(self) -> None:
        """Let all threads end after the run that they read now."""
        try:
            while True:
                self._waiting.get_nowait()
        except Empty:
            self.end()

    def locate_and_work(self, located: Iterable[PlainRead]) -> None:
        """What the calling thread does.  located: finds one part at a time.  Raises:  OSError: a segment is gone."""
        for part in located:
            self.add(part)
        self.end()
        # Enough short runs for the other threads, and what `end` added.
        num_last = _LAST_RUNS * self._num_threads + 1
        while self._waiting.qsize() > num_last and self._read_one():
            pass
        self._check()
        self.work()

    def _check(self) -> None:
        """Check the headers of all blocks before the first run of each part that is still being read."""
        for number, part in enumerate(self._parts):
            first_left = self._done[number].find(0)
            end = len(part) if first_left < 0 else part.runs[first_left].first
            begin, self._checked[number] = self._checked[number], end
            if begin < end and self._right[number]:
                self._right[number] = self._reads.is_right(part, self._seed, begin, end)

    def close(self) -> tuple[int, int]:
        """To be called after all threads have ended. Returns how many leading blocks passed all checks, and their
        bytes.
        """
        for part in self._parts:
            self._reads.close(part)
        num_good = num_bytes = 0
        if self.has_failed:
            return 0, 0
        self._check()
        for part, num_checked, is_right in zip(self._parts, self._checked, self._right, strict=True):
            if not is_right or num_checked < len(part):
                break
            num_good += len(part)
            num_bytes += part.stored_bytes
        return num_good, num_bytes
