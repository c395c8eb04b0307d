"""Charges a request once, whichever routers it reaches: a router claims it in Redis before it runs, and writes its
record there after it is settled.

The ledgers hold the bill. Redis only shows which router runs or has settled a request, and may lose all its data. A
router that finds Redis empty writes its ledger's recent records there again, and refuses requests named by clients
until the other routers have done so too. If a router dies, its claims expire and another router may take them over. The
dead router's charges become known at its next start, and the excess of both routers' charges is returned as a credit
(`request_account`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError, Conflict, Unavailable
from antefix_billing.adjustment import Adjusted, Adjustment, AdjustmentKind
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import Settled, read_billed, sequence_before
from antefix_billing.request_account import RequestAccount, RunningAt, claim, let_go, settle
from antefix_billing.usage_commit import LedgerWriter
from antefix_router.shared_bill.bill_exchange import BillExchange
from antefix_router.shared_bill.shared_quotas import SharedQuotas

log = logging.getLogger("antefix.router")

BEAT_S: Final = 1.0
# After a failure Redis is not called for this long, so that not every request waits for it.
_SHUN_S: Final = 1.0
# How long to wait for routers that were there before Redis lost its data to write theirs again. A dead router is not
# waited for.
_READY_WAIT_S: Final = 10.0
_TOLD_AT_ONCE: Final = 64


class NotReady(Unavailable):
    """Redis was not asked, because its data about requests cannot be relied on yet."""


@dataclass(slots=True)
class SharedCounters:
    """unshared: requests whose record could not be written to Redis at once.  refused: requests named by clients that
    were refused while Redis was down.
    """

    claimed: int = 0
    elsewhere: int = 0
    taken_over: int = 0
    told: int = 0
    unshared: int = 0
    refused: int = 0
    credited: int = 0


@dataclass(slots=True)
class _Pending:
    """Records about to be written to Redis, each with the ledger's last entry before it, so that the cursor never
    passes a pending record.
    """

    begun: dict[int, int] = field(default_factory=dict)
    untold: dict[int, Settled] = field(default_factory=dict)
    number: int = 0

    def begin(self, sequence: int) -> int:
        self.number += 1
        self.begun[self.number] = sequence
        return self.number

    def cursor(self, sequence: int) -> int:
        return min([sequence, *self.begun.values(), *(number - 1 for number in self.untold)])


class SharedBill:
    """One router's part of the shared bill. `start` must be called first, and `close` after the last request is
    recorded and before the ledger closes.
    """

    def __init__(
        self,
        exchange: BillExchange,
        writer: LedgerWriter,
        quotas: SharedQuotas,
        me: RunningAt,
        *,
        keep_s: float,
        serves_alone: bool,
    ) -> None:
        """serves_alone: while Redis is down, serve requests with a client's id, and return double charges later.
        Otherwise they are refused meanwhile.
        """
        self._exchange = exchange
        self._writer = writer
        self.quotas = quotas
        self._keep_s = keep_s
        self._serves_alone = serves_alone
        self.me = me
        self.counters = SharedCounters()
        self._alive: list[RunningAt] = []
        self._known: set[str] = set()
        self._claimed: set[str] = set()
        self._pending = _Pending()
        # Records that are written to Redis again. The ledger may already have a credit for them.
        self._again: set[int] = set()
        self._credits: dict[str, Decimal] = {}
        self._epoch = ""
        # Records still to be written in a complete rewrite. After a failure, the rewrite continues with the remaining
        # ones.
        self._told_epoch = ""
        self._waiting_since = 0.0
        self._waits_for: set[str] = set()
        self._failed_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._beaten = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        try:
            if self._epoch:
                await self._tell_backlog()
        except AntefixError as err:
            log.warning(
                "Redis was not told everything about the shared bill; the next start of this router does it: %s", err
            )
        await self.quotas.close()
        await self._exchange.close()

    @property
    def is_out(self) -> bool:
        """Whether Redis cannot be relied on at present."""
        return time.monotonic() - self._failed_at < _SHUN_S or not self._epoch

    @property
    def num_untold(self) -> int:
        return len(self._pending.untold)

    async def claim(self, key: str) -> RequestAccount | None:
        """Claim a request with a client's id for this router. Returns what is known about the request; None if it is
        served without Redis.

        Raises:  Conflict: another router runs it.  Unavailable: it is not known whether another router runs it.
        """
        try:
            await self._check_ready()
            before = RequestAccount()

            def change(account: RequestAccount) -> tuple[RequestAccount, Decimal] | None:
                nonlocal before
                before = account
                claimed = claim(account, self.me, self._alive)
                return None if claimed is None else (claimed, Decimal(0))

            changed = await self._exchange.change(key, change)
        except Unavailable as err:
            if not isinstance(err, NotReady):
                self._note_failure(err)
            self._alone(err)
            return None
        if changed is None:
            self.counters.elsewhere += 1
            raise Conflict(
                "this request is running at another router of this deployment; wait for its end, then try again"
            )
        self.counters.claimed += 1
        self.counters.taken_over += before.running is not None and before.running != self.me
        self._claimed.add(key)
        return changed[0]

    def _alone(self, err: Unavailable) -> None:
        if not self._serves_alone:
            self.counters.refused += 1
            raise Unavailable(
                "Redis cannot be reached, so it is not known whether another router has this request: try "
                "again, or send the request without an id"
            ) from err
        self.counters.unshared += 1

    async def let_go(self, key: str) -> None:
        """Release the claim on the request, because nothing was run or no record will be written."""
        if key not in self._claimed:
            return
        self._claimed.discard(key)
        try:
            await self._exchange.change(key, lambda account: (let_go(account, self.me), Decimal(0)))
        except (Unavailable, Conflict) as err:
            self._note_failure(err)

    async def find(self, key: str) -> Settled | None:
        """The request's record at any router; None if it is not known, or if Redis is down."""
        try:
            return (await self._exchange.account(key)).last
        except Unavailable as err:
            self._note_failure(err)
            return None

    def begin(self) -> int:
        """Announce that a record is about to be written to the ledger. The returned number must be passed to `settled`
        or `failed` later.
        """
        return self._pending.begin(self._writer.ledger.sequence)

    def failed(self, number: int) -> None:
        self._pending.begun.pop(number, None)

    async def settled(self, number: int, settled: Settled) -> None:
        """Write a record that is in the ledger to Redis. If writing to Redis fails, the record is written later."""
        self._pending.untold[settled.sequence] = settled
        self._pending.begun.pop(number, None)
        self._claimed.discard(settled.record.key)
        if self.is_out:
            self.counters.unshared += 1
            return
        try:
            await self._tell(settled)
        except (Unavailable, Conflict) as err:
            self._note_failure(err)
            self.counters.unshared += 1

    async def _tell(self, settled: Settled) -> None:
        record = settled.record
        # The credit that this ledger had for the record before Redis lost its data.
        is_again = settled.sequence in self._again
        credited = self._credits.get(record.event_id, Decimal(0)) if is_again else Decimal(0)
        changed = await self._exchange.change(record.key, lambda account: settle(account, settled, credited=credited))
        assert changed is not None
        if changed[1] > credited:
            # The adjustment has its own id, so the ledger takes it only once.
            await self._writer.adjust(_too_much(settled, changed[1]))
            self.counters.credited += 1
            log.warning(
                "request %s was charged by two routers; the charge %s is credited", record.request_id, changed[1]
            )
        self.counters.told += 1
        self._again.discard(settled.sequence)
        self._pending.untold.pop(settled.sequence, None)

    async def _run(self) -> None:
        while True:
            try:
                await self._beat()
            except AntefixError as err:
                self._note_failure(err)
            except Exception:
                log.exception("the bill could not be shared")
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        """Renew this router's key, read which routers are live, and write pending records; after Redis lost its data,
        write all recent records.
        """
        await self._exchange.say_alive(self.me)
        self._alive = await self._exchange.alive()
        drawn = secrets.token_hex(8)
        epoch = await self._exchange.epoch(drawn)
        is_new = epoch != self._epoch
        if is_new:
            await self._tell_all_again(epoch, was_empty=epoch == drawn or bool(self._epoch))
        self._known |= {each.source for each in self._alive}
        await self._tell_backlog()
        await self.quotas.tell(all_again=is_new)
        self._beaten.set()

    async def _tell_all_again(self, epoch: str, *, was_empty: bool) -> None:
        if epoch != self._told_epoch:
            await self._read_again(was_empty=was_empty)
            self._told_epoch = epoch
        for key in list(self._claimed):
            await self._exchange.change(key, self._claim_again)
        await self._tell_untold()
        await self._exchange.set_ready(self.me.source, epoch)
        self._epoch = epoch

    async def _read_again(self, *, was_empty: bool) -> None:
        """Mark all recent records of this ledger as pending."""
        ledger = self._writer.ledger
        after = 0 if was_empty else await self._exchange.cursor(self.me.source)
        if self._epoch:
            log.warning("Redis lost the shared bill; this router writes its own part there again")
        since_s = time.time() - self._keep_s
        if not after:
            after = await asyncio.to_thread(sequence_before, ledger.directory, since_s)
        self._waits_for = self._known - {self.me.source} if self._epoch else set()
        self._waiting_since = time.monotonic()
        settled, self._credits = await asyncio.to_thread(_recent, ledger, after, since_s)
        for item in settled:
            self._pending.untold[item.sequence] = item
            self._again.add(item.sequence)

    def _claim_again(self, account: RequestAccount) -> tuple[RequestAccount, Decimal] | None:
        claimed = claim(account, self.me, self._alive)
        return None if claimed is None else (claimed, Decimal(0))

    async def _tell_backlog(self) -> None:
        sequence = self._writer.ledger.sequence
        await self._tell_untold()
        await self._exchange.set_cursor(self.me.source, self._pending.cursor(sequence))

    async def _tell_untold(self) -> None:
        untold = sorted(self._pending.untold)
        for start in range(0, len(untold), _TOLD_AT_ONCE):
            chosen = [self._pending.untold.get(number) for number in untold[start : start + _TOLD_AT_ONCE]]
            await _all(self._tell(settled) for settled in chosen if settled is not None)

    async def _check_ready(self) -> None:
        """Raises:  NotReady: Redis is down, or lost its data and not all routers have written theirs again."""
        if not self._epoch and time.monotonic() - self._failed_at > _SHUN_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * BEAT_S):
                    await self._beaten.wait()
        if self.is_out:
            raise NotReady("Redis did not answer just now")
        if await self._exchange.epoch_now() != self._epoch:
            raise NotReady("Redis lost the shared bill, and this router writes its part again")
        if self._waits_for and time.monotonic() - self._waiting_since < _READY_WAIT_S:
            for source in list(self._waits_for):
                if await self._exchange.is_ready(source, self._epoch):
                    self._waits_for.discard(source)
            if self._waits_for:
                raise NotReady("Redis lost the shared bill, and other routers write their parts again")
        self._waits_for.clear()

    def _note_failure(self, err: AntefixError) -> None:
        if not self.is_out:
            log.warning("the bill is not shared with other routers now: %s", err)
        self._failed_at = time.monotonic()


def _recent(ledger: Ledger, after: int, since_s: float) -> tuple[list[Settled], dict[str, Decimal]]:
    """The records of requests that ended since then, and the credits already given for double charges on them."""
    settled, credits = [], {}
    for item in read_billed(ledger.directory, after=after):
        if isinstance(item, Adjusted):
            if item.adjustment.kind is AdjustmentKind.CHARGED_TWICE:
                credits[item.adjustment.of_event] = -item.adjustment.amount
        elif item.record.finished_us >= since_s * 1_000_000:
            settled.append(item)
    return settled, credits


async def _all(calls: Iterable[object]) -> None:
    results = await asyncio.gather(*calls, return_exceptions=True)  # type: ignore[call-overload]
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _too_much(settled: Settled, credit: Decimal) -> Adjustment:
    """The credit on a record because another router charged the same request."""
    record = settled.record
    return Adjustment(
        adjustment_id=f"{AdjustmentKind.CHARGED_TWICE}:{record.event_id}",
        kind=AdjustmentKind.CHARGED_TWICE,
        tenant=record.tenant,
        user=record.user,
        model=record.model,
        request_id=record.request_id,
        of_event=record.event_id,
        of_source=record.source,
        amount=-credit,
        currency=record.currency,
        reason="another router charged this request as well",
        source=record.source,
        created_us=time.time_ns() // 1000,
    )
