"""Every admitted request ends in exactly one ledger record, which is durable before the response ends.

    admit: reserve quota, begin the OPEN entry -> run -> (OPEN is durable) first token ... -> settle -> response ends

The ledger's OPEN entry is synced while the prompt is computed, so the sync delays nothing. Before each piece of output
goes out, the request's counts so far are written to the ledger's progress file. A cancelled request is settled after
its client has left. A request that a crash interrupted is closed when the router starts again; it is charged for the
output that its client was given.

A client that gave its request an id may send the request again at any time. While the first attempt runs, the second
client reads the same answer from its start; afterwards it gets the kept answer (`answers`). If the first attempt was
cancelled, failed or crashed, the request runs as a new attempt, whose price is reduced by what earlier attempts were
charged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal

from antefix.errors import AntefixError, Conflict, Draining, InvalidRequest, Overloaded, Unavailable
from antefix.generation_request import GenerationRequest
from antefix.secret import Keyring
from antefix.telemetry import span
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import Settled, read_settled, sequence_before, source_of_name
from antefix_billing.limits import LimitWindow, QuotaBook, Reservation
from antefix_billing.peer_ledgers import PeerLedgers
from antefix_billing.pricing import priced, worst_price
from antefix_billing.ratecard import RateCards
from antefix_billing.request_account import rank
from antefix_billing.tenants import TenantBook
from antefix_billing.usage_commit import LedgerWriter, NoLedger, UsageWriter
from antefix_billing.usage_record import OpenEntry, Status, UsageRecord
from antefix_router.anchoring import Anchoring
from antefix_router.answers import KeptAnswer, RetryConfig, Run, SharedRun
from antefix_router.bill_records import BillRecords
from antefix_router.ending import Ending
from antefix_router.generation import Generation, OutputPiece
from antefix_router.open_bill import Bill, Served
from antefix_router.page.activity import Activity
from antefix_router.request_measures import RequestMeasures
from antefix_router.retries import CLIENT_LEFT, Retries
from antefix_router.shared_bill.shared_bill import SharedBill

log = logging.getLogger("antefix.router")

Make = Callable[[GenerationRequest], Generation]

# How often the answer of a finished request may be made again without a second charge.
NUM_REPEATS_MAX = 3
_NUM_REPEATED_IDS_MAX = 65536


class Accounts:
    """The bills of one router. Owns its ledger. Without a ledger, requests are counted and priced but no record is
    kept.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        *,
        served: Served,
        keyring: Keyring,
        cards: RateCards,
        tenants: TenantBook,
        retries: RetryConfig | None = None,
        peers: PeerLedgers | None = None,
    ) -> None:
        """peers: the ledgers of other routers on this host, which show what those routers have settled."""
        self.ledger = ledger
        self.writer: UsageWriter = LedgerWriter(ledger) if ledger is not None else NoLedger()
        self._keyring = keyring
        self.records = BillRecords(self.writer.source_name, keyring)
        self.served = served
        self.cards = cards
        self.peers = peers or PeerLedgers(())
        # Set by `share`: the bill shared with other routers.
        self.shared: SharedBill | None = None
        # Set if the ledger's head is also kept elsewhere.
        self.anchoring: Anchoring | None = None
        self.quotas = QuotaBook(tenants.limits, tenants.default)
        self._running: set[str] = set()
        self._repeats: OrderedDict[str, int] = OrderedDict()
        self._settling: dict[str, asyncio.Task[Settled | None]] = {}
        self._admitting: dict[str, asyncio.Future[None]] = {}
        self.retries = Retries(retries or RetryConfig(), self._settle_shared)
        # How many requests could not store all of their KV, and the reason in the last case.
        self.num_unstored = 0
        self.unstored_reason = ""
        self.measures = RequestMeasures()
        self.activity = Activity()
        self.ending = Ending()
        if ledger is not None:
            self._take_up(ledger)

    def _take_up(self, ledger: Ledger) -> None:
        """Close the requests that a crash left open, and count what tenants used before."""
        crashed = [priced(self.records.crashed(ledger, entry), self.cards) for entry in ledger.unsettled()]
        for start in range(0, len(crashed), 1024):
            ledger.append(crashed[start : start + 1024])
        for record in crashed:
            self.measures.count(record)
        ledger.progress.clear()
        if crashed:
            num_charged = sum(record.is_charged for record in crashed)
            log.warning(
                "%d requests were cut off when the router last stopped; %d of these requests had sent output already",
                len(crashed),
                num_charged,
            )
        now = datetime.now(UTC)
        after = sequence_before(ledger.directory, LimitWindow.MONTH.start(now).timestamp())
        self.quotas.restore((item.record for item in read_settled(ledger.directory, after=after)), now)

    async def admit(
        self,
        request: GenerationRequest,
        *,
        retryable: bool = False,
        is_named: bool | None = None,
        generation: Make = Generation,
    ) -> Bill:
        """Check the id, the quota and the budget, and open the request's bill.

        generation: creates the state of the running request.
        retryable: the client named the id. Other clients may read the same answer, and the answer is kept.
        is_named: the client named the id, so the request may also arrive at another router. None: the same as
        `retryable`.
        Raises:  QuotaExceeded: over a limit.  Conflict: the id is in use, or its answer was made again too often.
        Unavailable: nobody can tell whether another router has the request.
        """
        request, opened = self.records.opened(request, self.served)
        while (busy := self._settling.get(opened.key) or self._admitting.get(opened.key)) is not None:
            await asyncio.wait({busy})
        if retryable and (joined := self.retries.join(request, opened)) is not None:
            return joined
        if opened.key in self._running:
            raise Conflict(
                f"request {request.request_id} is still running; wait for its end, or use another request id"
            )
        self._running.add(opened.key)
        self._admitting[opened.key] = asyncio.get_running_loop().create_future()
        try:
            named = retryable if is_named is None else is_named
            bill = await self._bill(generation(request), opened, await self._standing(opened, is_named=named))
            if retryable and bill.settled is None:
                self.retries.share(bill)
            return bill
        except BaseException:
            self._running.discard(opened.key)
            await self._let_go(opened.key)
            raise
        finally:
            self._admitting.pop(opened.key).set_result(None)

    async def _standing(self, opened: OpenEntry, *, is_named: bool) -> tuple[Settled | None, Decimal]:
        """How the request ended before, at this or another router, and what all its attempts were charged."""
        found = await self.writer.find(opened.key)
        if found is not None and found.record.is_final:
            return found, found.record.paid
        paid = found.record.paid if found is not None else Decimal(0)
        if not is_named:
            return found, paid
        account = await self.shared.claim(opened.key) if self.shared is not None else None
        others = [account.last if account is not None else None]
        if account is None and len(self.peers):
            others.append(await asyncio.to_thread(self.peers.find, opened.key))
        for other in others:
            if other is not None and (found is None or rank(other.record) > rank(found.record)):
                found, paid = other, other.record.paid
        return found, paid if account is None else max(paid, account.paid)

    async def _let_go(self, key: str) -> None:
        if self.shared is not None:
            await self.shared.let_go(key)

    async def find(self, key: str) -> tuple[Settled, bytes] | None:
        """A request's record and the source of its ledger, whichever router has it."""
        found = await self.writer.find(key)
        if found is None and self.shared is not None:
            found = await self.shared.find(key)
        if found is None and len(self.peers):
            found = await asyncio.to_thread(self.peers.find, key)
        return None if found is None else (found, source_of_name(found.record.source))

    async def _bill(self, generation: Generation, opened: OpenEntry, before: tuple[Settled | None, Decimal]) -> Bill:
        """The bill of the next run under this request id: a first attempt, another attempt, or the finished answer
        again.
        """
        request, (standing, paid) = generation.request, before
        if standing is None:
            bill = Bill(generation, opened, await self._reserve(request))
            # The answer exists already if its record could not be written, or if this router keeps no records.
            bill.kept = self.retries.kept(request, opened)
            return bill
        # While secrets are rotated, the record's digest may have been made with the older secret.
        digests = (self.records.digest(request, number) for number in self._keyring.generations)
        if standing.record.user != opened.user or standing.record.request_digest not in digests:
            raise InvalidRequest(f"request id {request.request_id} was used before for another request")
        kept = self.retries.kept(request, opened)
        if standing.record.is_final:
            bill = self._repeat(generation, opened, standing, kept)
            await self._let_go(opened.key)
        else:
            # The kept answer was made during the earlier attempt, and the store's log has its hits at that time.
            started_us = opened.started_us if kept is None else kept.started_us
            opened = dataclasses.replace(opened, attempt=standing.record.attempt + 1, started_us=started_us)
            bill = Bill(generation, opened, await self._reserve(request), paid)
        bill.kept = kept
        return bill

    def run(self, bill: Bill, run: Run, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """The request's output. When the output ends, the record in `bill.record` is on disk.

        Raises:  what running the request raised, after settling it.  Unavailable: the ledger could not be written.
        Draining.
        """
        run = run if bill.kept is None else bill.kept.run
        if bill.settled is not None:
            return self._run_again(bill, run, timeout_s)
        if bill.shared is not None:
            return self._run_shared(bill, bill.shared, run, timeout_s)
        return self._run_alone(bill, run, timeout_s)

    async def _run_alone(self, bill: Bill, run: Run, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """The output for a request with only one client. If the client of the output leaves, the work stops."""
        opening = asyncio.create_task(self.writer.open(bill.opened))
        status, detail = Status.CANCELLED, CLIENT_LEFT
        try:
            async with contextlib.aclosing(run(bill.generation, timeout_s)) as outputs:
                while (piece := await self._next(outputs)) is not None:
                    await asyncio.shield(opening)
                    self.writer.mark(bill.opened, bill.used(bill.num_given))
                    yield piece
            await asyncio.shield(opening)
            status, detail = Status(bill.generation.finish_reason), ""
        except (GeneratorExit, asyncio.CancelledError):
            status, detail = self._ended_from_outside(bill)
            raise
        except Exception as err:
            status, detail = Status.FAILED, type(err).__name__
            raise
        finally:
            task = self._settle_soon(bill, opening, status, detail)
            if status is not Status.CANCELLED:
                await asyncio.shield(task)

    async def _run_shared(
        self, bill: Bill, shared: SharedRun, run: Run, timeout_s: float
    ) -> AsyncGenerator[OutputPiece, None]:
        """The output for one of several clients that read the same answer. The first client that has the whole answer
        is charged. If no client is left, the answer is still generated for a limited time.
        """
        if shared.settling is not None:
            raise Unavailable("the earlier attempt of this request was given up just now; send the request again")
        opening = shared.opening = shared.opening or asyncio.create_task(self.writer.open(bill.opened))
        shared.begin(run, timeout_s, on_end=lambda: self.retries.made(shared))
        shared.enter()
        num_read = 0
        end: tuple[Status, str] | None = None
        try:
            async with contextlib.aclosing(shared.read()) as outputs:
                while (piece := await self._next(outputs)) is not None:
                    await asyncio.shield(opening)
                    is_first, num_read = not num_read, num_read + len(piece.tokens)
                    if shared.give(bill, num_read) or is_first:
                        self.writer.mark(bill.opened, bill.used(bill.num_given))
                    yield piece
            await asyncio.shield(opening)
            end = Status(shared.generation.finish_reason), ""
        except (GeneratorExit, asyncio.CancelledError):
            status, detail = self._ended_from_outside(bill)
            if status is Status.STOP:
                shared.cut(bill.num_read)
            end = None if status is Status.CANCELLED else (status, detail)
            raise
        except Exception as err:
            shared.error = shared.error or err
            end = Status.FAILED, type(err).__name__
            raise
        finally:
            shared.leave()
            if end is not None:
                bill.settled = await asyncio.shield(self.retries.end(shared, bill, *end))
            else:
                self.retries.left(shared)

    async def _run_again(self, bill: Bill, run: Run, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        try:
            async with contextlib.aclosing(run(bill.generation, timeout_s)) as outputs:
                while (piece := await self._next(outputs)) is not None:
                    yield piece
        finally:
            self._running.discard(bill.opened.key)

    async def _next(self, outputs: AsyncGenerator[OutputPiece, None]) -> OutputPiece | None:
        with self.ending.guard():
            return await anext(outputs, None)

    def _ended_from_outside(self, bill: Bill) -> tuple[Status, str]:
        """The status and detail to record when the reader closes an output."""
        if bill.ended_here:
            return Status.STOP, ""
        return (Status.FAILED, Draining.__name__) if self.ending.is_over else (Status.CANCELLED, CLIENT_LEFT)

    @property
    def num_running(self) -> int:
        """Requests that were admitted and have not ended."""
        return len(self._running)

    async def close(self) -> None:
        """Write the records that are being settled, then close the ledger."""
        self.retries.close()
        while self._settling:
            await asyncio.gather(*self._settling.values(), return_exceptions=True)
        if self.shared is not None:
            await self.shared.close()
        if self.anchoring is not None:
            await self.anchoring.close()
        await self.writer.close()

    def _settle_shared(self, bill: Bill, status: Status, detail: str) -> asyncio.Task[Settled | None]:
        assert bill.shared is not None
        # The run never began if its only client left between admission and reading.
        opening = bill.shared.opening or asyncio.create_task(self.writer.open(bill.opened))
        return self._settle_soon(bill, opening, status, detail)

    def _settle_soon(
        self, bill: Bill, opening: asyncio.Task[OpenEntry], status: Status, detail: str
    ) -> asyncio.Task[Settled | None]:
        """Settle in a task of its own, so that the record is written even if the caller is cancelled."""
        key = bill.opened.key
        task = asyncio.create_task(self._settle(bill, opening, status, detail))
        self._settling[key] = task
        task.add_done_callback(lambda _: self._settling.pop(key, None))
        return task

    async def _settle(
        self, bill: Bill, opening: asyncio.Task[OpenEntry], status: Status, detail: str
    ) -> Settled | None:
        record: UsageRecord | None = None
        try:
            if bill.shared is not None:
                await bill.shared.stop()
            await asyncio.gather(opening, return_exceptions=True)
            record = priced(self.records.ended(bill, status, detail), self.cards)
            if record.write_error and bill.kept is None:
                self.num_unstored, self.unstored_reason = self.num_unstored + 1, record.write_error
            with span("settle", status=status.value):
                bill.settled = await self._write(record)
            if bill.settled.record is record:
                self.measures.count(record)
                self.activity.note(record, bill.generation.restore)
        except AntefixError as err:
            log.error("the charge for request %s could not be recorded: %s", bill.opened.request_id, err)  # noqa: TRY400 - no trace needed
            if status is not Status.CANCELLED and status is not Status.FAILED:
                raise
        finally:
            self._running.discard(bill.opened.key)
            if bill.reservation is not None:
                is_used = record and bill.settled and record.is_charged
                tokens = record.prompt_tokens + record.output_tokens if record and is_used else 0
                price = record.price if record and bill.settled else bill.reservation.money * 0
                self.quotas.settle(bill.reservation, tokens=tokens, money=price)
                if self.shared is not None:
                    self.shared.quotas.changed(bill.reservation.tenant)
            if bill.settled is None:
                await self._let_go(bill.opened.key)
        return bill.settled

    async def _write(self, record: UsageRecord) -> Settled:
        """Write a record into the ledger, and then tell the other routers, because they may be asked for the record as
        soon as the answer ends.
        """
        if self.shared is None:
            return await self.writer.settle(record)
        number = self.shared.begin()
        try:
            settled = await self.writer.settle(record)
        except BaseException:
            self.shared.failed(number)
            raise
        await self.shared.settled(number, settled)
        return settled

    @property
    def keyring(self) -> Keyring:
        return self._keyring

    async def _reserve(self, request: GenerationRequest) -> Reservation:
        now = datetime.now(UTC)
        num_output = request.sampling.max_tokens * request.num_samples
        most = worst_price(
            self.cards.quote(request.model or self.served.model, now),
            prompt_tokens=request.num_tokens,
            output_tokens_max=num_output,
        )
        tokens = request.num_tokens + num_output
        quotas = self.quotas if self.shared is None else self.shared.quotas
        reserved = quotas.reserve(request.caller.tenant, tokens=tokens, money=most, now=now)
        return await reserved if isinstance(reserved, Awaitable) else reserved

    def _repeat(self, generation: Generation, opened: OpenEntry, standing: Settled, kept: KeptAnswer | None) -> Bill:
        """The bill for giving a finished request's answer again: either the kept answer, or the answer generated again
        without a charge.
        """
        if kept is None:
            self._count_repeat(generation.request, opened)
        bill = Bill(generation, opened, None)
        bill.settled = standing
        return bill

    def _count_repeat(self, request: GenerationRequest, opened: OpenEntry) -> None:
        num_repeats = self._repeats.pop(opened.key, 0) + 1
        if num_repeats > NUM_REPEATS_MAX:
            raise Overloaded(
                f"request {request.request_id} was repeated {NUM_REPEATS_MAX} times, which is the limit; use "
                "another request id"
            )
        self._repeats[opened.key] = num_repeats
        while len(self._repeats) > _NUM_REPEATED_IDS_MAX:
            self._repeats.popitem(last=False)
