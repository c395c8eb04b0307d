"""Group commit: concurrent requests share one write and one fdatasync of the ledger, which run outside the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from antefix.errors import AntefixError, InvalidRequest, Overloaded
from antefix.usage import Usage
from antefix_billing.adjustment import Adjusted, Adjustment, Change
from antefix_billing.ledger import Item, Ledger, Written
from antefix_billing.ledger_files import Settled
from antefix_billing.ledger_format import PAYLOAD_BYTES_MAX
from antefix_billing.usage_record import OpenEntry, UsageRecord

log = logging.getLogger("antefix_billing")

T = TypeVar("T")

# One batch is at most a few MB of entries, so that the first request in it does not wait for many later ones.
NUM_BATCH_MAX = 1024
NUM_WAITING_MAX = 65536
# A power cut may lose the progress of this long. A crash of the process loses none.
MARKS_SYNC_S = 1.0
# For this long after a failed write, the ledger counts as failing.
FAILING_S = 5.0


@dataclass(slots=True)
class CommitCounters:
    """entries / batches is the average number of entries that share one sync."""

    batches: int = 0
    entries: int = 0


class UsageWriter(Protocol):
    """The interface through which records are written."""

    @property
    def source_name(self) -> str: ...

    @property
    def is_failing(self) -> bool: ...

    async def open(self, entry: OpenEntry) -> OpenEntry: ...

    def mark(self, entry: OpenEntry, used: Usage) -> None: ...

    async def settle(self, record: UsageRecord) -> Settled: ...

    async def find(self, key: str) -> Settled | None: ...

    async def close(self) -> None: ...


class NoLedger:
    """Routers without a ledger use this class: requests are counted and priced, but no record is kept."""

    source_name = "antefix/unkept"
    is_failing = False

    async def open(self, entry: OpenEntry) -> OpenEntry:
        return entry

    def mark(self, entry: OpenEntry, used: Usage) -> None:
        return

    async def settle(self, record: UsageRecord) -> Settled:
        return Settled(sequence=0, hash=b"", previous_hash=b"", record=record)

    async def find(self, key: str) -> Settled | None:
        return None

    async def close(self) -> None:
        return


class LedgerWriter:
    """The asynchronous interface of a ledger, which it owns. All file operations run on its one thread, in order."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.counters = CommitCounters()
        self._waiting: deque[tuple[Item, asyncio.Future[Written]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="antefix-ledger")
        self._task: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._failed_at = float("-inf")

    @property
    def source_name(self) -> str:
        return self.ledger.source_name

    @property
    def is_failing(self) -> bool:
        """Whether a write failed a short while ago. After this call the answer is False again, so that the next write
        can be tried.
        """
        return time.monotonic() - self._failed_at < FAILING_S

    async def open(self, entry: OpenEntry) -> OpenEntry:
        """Write an OPEN entry; it is durable when this returns.  Raises:  as `settle`."""
        return cast(OpenEntry, await self._submit(entry))

    def mark(self, entry: OpenEntry, used: Usage) -> None:
        """Record how much an open request has used so far. When this returns, the record survives the end of this
        process; a second later it also survives a power cut.

        Raises:  Unavailable: it could not be written.
        """
        self.ledger.progress.mark(entry.event_id, used)
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._sync_soon(), context=Context())

    async def settle(self, record: UsageRecord) -> Settled:
        """Write a record; it is durable when this returns. Returns the record that counts: a retry may get an existing
        record instead of its own.

        Raises:  Unavailable: not written.  Overloaded: too many records wait.  InvalidRequest: the record is too large.
        """
        settled = cast(Settled, await self._submit(record))
        self.ledger.progress.drop(record.event_id)
        return settled

    async def adjust(self, adjustment: Adjustment) -> Adjusted:
        """Write an adjustment; it is durable when this returns. Returns the adjustment that is in the ledger under its
        id.  Raises:  as `settle`.
        """
        return cast(Adjusted, await self._submit(adjustment))

    async def note(self, change: Change) -> None:
        """Write a CHANGE entry; it is durable when this returns.  Raises:  as `settle`."""
        await self._submit(change)

    async def find(self, key: str) -> Settled | None:
        """The request's settled record, or None.  key: `record.request_key`."""
        return await self._run(self.ledger.find, key)

    async def close(self) -> None:
        """Write the entries that are waiting, then close the ledger."""
        if self._syncing is not None:
            self._syncing.cancel()
            await asyncio.gather(self._syncing, return_exceptions=True)
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        await self._run(self.ledger.close)
        self._thread.shutdown()

    async def _submit(self, item: Item) -> Written:
        # Checked here, so that one bad entry does not fail the others of its batch. Only these fields come from
        # outside. JSON makes at most six characters of one, and the other fields take under 2 KiB.
        if 6 * sum(map(len, _texts_of(item))) > PAYLOAD_BYTES_MAX - 2048:
            raise InvalidRequest(f"a ledger entry may have at most {PAYLOAD_BYTES_MAX} bytes")
        if len(self._waiting) >= NUM_WAITING_MAX:
            raise Overloaded("too many finished requests wait to be written to the ledger", retry_after_s=1.0)
        future: asyncio.Future[Written] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), context=Context())
        # The entry is written even if its caller is cancelled meanwhile.
        return await asyncio.shield(future)

    async def _drain(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(NUM_BATCH_MAX, len(self._waiting)))]
            try:
                answers = await self._run(self.ledger.append, [item for item, _ in batch])
            except (AntefixError, OSError) as err:
                self._failed_at = time.monotonic()
                _fail(batch, err)
                continue
            except BaseException as err:
                _fail([*batch, *self._waiting], err)  # an unexpected error: no request may wait for ever
                self._waiting.clear()
                raise
            self._failed_at = float("-inf")
            self.counters.batches += 1
            self.counters.entries += len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _sync_soon(self) -> None:
        await asyncio.sleep(MARKS_SYNC_S)
        try:
            await self._run(self.ledger.progress.sync)
        except OSError as err:
            log.warning("the ledger's progress file could not be synced: %s", err)

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _texts_of(item: Item) -> tuple[str, ...]:
    if isinstance(item, Change):
        return (item.content,)
    texts = (item.request_id, item.tenant, item.user, item.model)
    if isinstance(item, Adjustment):
        return (*texts, item.adjustment_id, item.reason, item.reference, item.author, item.of_event)
    return (*texts, item.detail, item.write_error) if isinstance(item, UsageRecord) else texts


def _fail(batch: Sequence[tuple[Item, asyncio.Future[Written]]], err: BaseException) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(err)
            future.exception()  # a cancelled caller never reads the exception
