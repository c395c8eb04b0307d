"""The single writer thread of a store: it gathers waiting puts into one commit, and tidies the store when there are no
puts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from antefix.errors import Overloaded, Unavailable
from antefix.record import PutResult, Record
from antefix_kvstore.storage_engine import MAINTAIN_S, StorageEngine

log = logging.getLogger("antefix_kvstore.group_commit")

# How long a refused caller should wait: about the time to commit a full batch to a 1 GB/s disk.
RETRY_AFTER_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Put:
    records: Sequence[Record]
    nbytes: int
    done: Future[PutResult]


class GroupCommitter:
    """Puts queue up here while a commit runs; the next commit takes all of them. Thread-safe."""

    def __init__(self, engine: StorageEngine) -> None:
        self._engine = engine
        self._batch_bytes_max = engine.config.batch_bytes_max
        self._queue_bytes_max = engine.config.queue_bytes_max
        self._condition = threading.Condition()
        self._queue: deque[_Put] = deque()
        self._queued_bytes = 0
        self._stopping = False
        # Functions without arguments, called between commits; each does a bounded amount of work.
        self.chores: list[Callable[[], None]] = [engine.maintain]
        self._thread = threading.Thread(target=self._run, name="antefix-writer", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def submit(self, records: Sequence[Record]) -> Future[PutResult]:
        """Queue a put. The future has its result when the records are durable.

        Raises:  InvalidRequest: a malformed record, or a size other than its registered layout's.  Overloaded: too many
        bytes are waiting already.  Unavailable: the store is stopping.
        """
        self._engine.check(records)
        nbytes = sum(memoryview(record.payload).nbytes for record in records)
        with self._condition:
            if self._stopping:
                raise Unavailable("the store is stopping")
            if self._queue and self._queued_bytes + nbytes > self._queue_bytes_max:
                raise Overloaded("too many writes are waiting for the store's disk", retry_after_s=RETRY_AFTER_S)
            put = _Put(records, nbytes, Future())
            self._queue.append(put)
            self._queued_bytes += nbytes
            self._condition.notify()
        return put.done

    def stop(self) -> None:
        """Commit the queued puts, then end. Blocks."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        tidied_s, reading = time.monotonic(), False
        while True:
            with self._condition:
                if not self._queue and not self._stopping and not reading:
                    self._condition.wait(MAINTAIN_S)
                group = self._take_group()
                if not group and self._stopping:
                    return
            if group:
                self._commit(group)
            # When no put came for a while, what was written past the page cache is read into it. Between the puts of
            # several clients it would cost them a third of their throughput.
            reading = not (group or self._queue or self._stopping) and self._read_back()
            # A store that is never idle needs maintenance as well.
            if time.monotonic() - tidied_s >= MAINTAIN_S:
                self._tidy()
                tidied_s = time.monotonic()

    def _take_group(self) -> list[_Put]:
        group: list[_Put] = []
        nbytes = 0
        while self._queue and (not group or nbytes + self._queue[0].nbytes <= self._batch_bytes_max):
            group.append(self._queue.popleft())
            nbytes += group[-1].nbytes
        self._queued_bytes -= nbytes
        return group

    def _commit(self, group: Sequence[_Put]) -> None:
        # From here on no caller can cancel: setting a result on a cancelled future would raise, and end this thread and
        # all writing. Callers that cancelled before get no result, but their records are valid, so they are stored.
        waiting = [put.done.set_running_or_notify_cancel() for put in group]
        try:
            results = self._engine.put_group([put.records for put in group])
        except Exception as err:  # noqa: BLE001 - handed to the callers, who wait for it
            for put, waits in zip(group, waiting, strict=True):
                if waits:
                    put.done.set_exception(err)
            return
        for put, waits, result in zip(group, waiting, results, strict=True):
            if waits:
                put.done.set_result(result)

    def _read_back(self) -> bool:
        try:
            return self._engine.read_back()
        except Exception:
            # Reads only become slower; puts must continue.
            log.exception("records could not be read into the page cache")
            return False

    def _tidy(self) -> None:
        for chore in self.chores:
            try:
                chore()
            except Exception:
                # A chore that fails is tried again later; puts must continue.
                log.exception("store maintenance failed")
