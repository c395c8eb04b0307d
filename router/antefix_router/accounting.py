"""Every admitted request ends in exactly one ledger record, durable before its response ends.

    admit: reserve quota, begin the OPEN entry -> run -> (OPEN is durable) first token ... -> settle -> response ends

The OPEN entry is synced while the prompt is worked on, so it costs no time. Before each piece of output is handed on,
how far the request is goes into the ledger's progress file. Cancelled requests are settled behind the client's back;
requests that a crash cut off are closed at the next start, and cost what their clients were given.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from antefix.errors import AntefixError, Conflict, InvalidRequest, Overloaded
from antefix.generation_request import GenerationRequest
from antefix.secret import Keyring
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import Settled, read_settled, sequence_before
from antefix_billing.limits import LimitWindow, QuotaBook, Reservation
from antefix_billing.pricing import priced, worst_price
from antefix_billing.ratecard import RateCards
from antefix_billing.tenants import TenantBook
from antefix_billing.usage_commit import LedgerWriter, NoLedger, UsageWriter
from antefix_billing.usage_record import OpenEntry, Status, UsageRecord, WorkDone, request_key
from antefix_router.generation import Generation, Piece
from antefix_router.open_bill import Bill, Served

log = logging.getLogger("antefix.router")

# A finished request may be asked for again, with the same answer and without a second charge, this often.
NUM_REPEATS_MAX = 3
_NUM_REPEATED_IDS_MAX = 65536

Run = Callable[[Generation, float], AsyncGenerator[Piece, None]]


class Accounts:
    """The bills of one router; owns its ledger. Without one, requests are counted and priced but nothing is kept."""

    def __init__(
        self, ledger: Ledger | None, *, served: Served, keyring: Keyring, cards: RateCards, tenants: TenantBook
    ) -> None:
        self.ledger = ledger
        self.writer: UsageWriter = LedgerWriter(ledger) if ledger is not None else NoLedger()
        self._keyring = keyring
        self._served = served
        self._cards = cards
        self._quotas = QuotaBook(tenants.limits, tenants.default)
        self._running: set[str] = set()
        self._repeats: OrderedDict[str, int] = OrderedDict()
        self._settling: set[asyncio.Task[None]] = set()
        if ledger is not None:
            self._take_up(ledger)

    def _take_up(self, ledger: Ledger) -> None:
        """Close what a crash left open, and count what tenants used before."""
        crashed = [self._crashed(ledger, entry) for entry in ledger.unsettled()]
        for start in range(0, len(crashed), 1024):
            ledger.append(crashed[start : start + 1024])
        ledger.progress.clear()
        if crashed:
            num_charged = sum(record.is_charged for record in crashed)
            log.warning("%d requests were cut off by the last stop; %d had output", len(crashed), num_charged)
        now = datetime.now(UTC)
        after = sequence_before(ledger.directory, LimitWindow.MONTH.start(now).timestamp())
        self._quotas.restore((item.record for item in read_settled(ledger.directory, after=after)), now)

    async def admit(self, request: GenerationRequest) -> Bill:
        """Check id, quota and budget.

        Raises:  QuotaExceeded: over a limit.  Conflict: the id is in use, or was used up.
        """
        tenant = request.caller.tenant
        request, opened = self._open_entry(request)
        if opened.key in self._running:
            raise Conflict(f"request {request.request_id} is running; wait for it or use another id")
        self._running.add(opened.key)
        try:
            standing = await self.writer.find(opened.key)
            if standing is not None and standing.record.request_digest != opened.request_digest:
                raise InvalidRequest(f"request id {request.request_id} was used for another request")
            if standing is not None and standing.record.is_final:
                return self._repeat(request, opened, standing)
            if standing is None:
                return Bill(Generation(request), opened, self._reserve(request, tenant))
            opened = dataclasses.replace(opened, attempt=standing.record.attempt + 1)
            return Bill(Generation(request), opened, self._reserve(request, tenant), standing.record.paid)
        except BaseException:
            self._running.discard(opened.key)
            raise

    async def run(self, bill: Bill, run: Run, timeout_s: float) -> AsyncGenerator[Piece, None]:
        """The request's output; when this ends, `bill.record` is durable.

        Raises:  what running it raised, after settling.  Unavailable: the ledger could not be written.
        """
        if bill.settled is not None:
            async for piece in self._run_again(bill, run, timeout_s):
                yield piece
            return
        opening = asyncio.create_task(self.writer.open(bill.opened))
        status, detail = Status.CANCELLED, ""
        try:
            async with contextlib.aclosing(run(bill.generation, timeout_s)) as outputs:
                async for piece in outputs:
                    await asyncio.shield(opening)
                    self.writer.mark(bill.opened, bill.work_done(bill.num_given))
                    yield piece
            await asyncio.shield(opening)
            status = bill.status
        except (GeneratorExit, asyncio.CancelledError):
            detail = "the client went away"
            raise
        except Exception as err:
            status, detail = Status.FAILED, type(err).__name__
            raise
        finally:
            # In a task of its own: whatever happens to the caller now, the record gets written.
            task = asyncio.create_task(self._settle(bill, opening, status, detail))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
            if status is not Status.CANCELLED:
                await asyncio.shield(task)

    async def close(self) -> None:
        """Write what is being settled, then close the ledger."""
        while self._settling:
            await asyncio.gather(*self._settling, return_exceptions=True)
        await self.writer.close()

    async def _run_again(self, bill: Bill, run: Run, timeout_s: float) -> AsyncGenerator[Piece, None]:
        try:
            async with contextlib.aclosing(run(bill.generation, timeout_s)) as outputs:
                async for piece in outputs:
                    yield piece
        finally:
            self._running.discard(bill.opened.key)

    async def _settle(self, bill: Bill, opening: asyncio.Task[OpenEntry], status: Status, detail: str) -> None:
        record: UsageRecord | None = None
        try:
            await asyncio.gather(opening, return_exceptions=True)
            record = priced(self._record(bill, status, detail), self._cards)
            bill.settled = await self.writer.settle(record)
        except AntefixError as err:
            log.error("request %s could not be settled: %s", bill.opened.request_id, err)  # noqa: TRY400 - no trace needed
            if status is not Status.CANCELLED and status is not Status.FAILED:
                raise
        finally:
            self._running.discard(bill.opened.key)
            if bill.reservation is not None:
                tokens = record.prompt_tokens + record.output_tokens if record and bill.settled else 0
                price = record.price if record and bill.settled else bill.reservation.money * 0
                self._quotas.settle(bill.reservation, tokens=tokens, money=price)

    def _record(self, bill: Bill, status: Status, detail: str) -> UsageRecord:
        """Where we failed the client, output counts as far as it was given; else as far as it was made."""
        num_output = bill.num_given if status.is_ours else bill.generation.num_emitted
        return UsageRecord(
            **self._common(bill.opened),
            **bill.work_done(num_output).counts(),
            status=status,
            detail=detail,
            output_write_tokens=bill.generation.output_written_tokens,
            paid_before=bill.paid_before,
            finished_us=max(_now_us(), bill.opened.started_us),
        )

    def _crashed(self, ledger: Ledger, entry: OpenEntry) -> UsageRecord:
        """A request that the last process left open, as far as its progress was noted."""
        standing = ledger.find(entry.key)
        done = ledger.progress.found(entry.event_id) or WorkDone()
        return priced(
            UsageRecord(
                **self._common(entry),
                **done.counts(),
                status=Status.CRASHED,
                detail="the router stopped in the middle",
                paid_before=Decimal(0) if standing is None else standing.record.paid,
                finished_us=max(_now_us(), entry.started_us),
            ),
            self._cards,
        )

    def _common(self, entry: OpenEntry) -> dict[str, Any]:
        values = dataclasses.asdict(entry)
        del values["prompt_tokens"]
        return {**values, "source": self.writer.source_name}

    def _open_entry(self, request: GenerationRequest) -> tuple[GenerationRequest, OpenEntry]:
        """The request with a seed, and how its record begins."""
        sampling, tenant = request.sampling, request.caller.tenant
        if sampling.temperature and sampling.seed is None:
            # From the id, so that a repeat of this request draws the same numbers and gives the same answer.
            drawn = hashlib.blake2b(request_key(tenant, request.request_id).encode(), digest_size=7).digest()
            sampling = dataclasses.replace(sampling, seed=int.from_bytes(drawn, "little"))
            request = dataclasses.replace(request, sampling=sampling)
        # Keyed: whoever reads the ledger must not be able to try out guesses of a prompt.
        digest = hashlib.blake2b(key=self._keyring.key(tenant), digest_size=16, person=b"antefix-digest")
        # Log probabilities tell of the answer and do not change it.
        digest.update(repr(dataclasses.replace(sampling, num_top_logprobs=None)).encode())
        digest.update(request.tokens.tobytes())
        if request.num_samples > 1:
            digest.update(f"{request.num_samples} samples".encode())
        return request, OpenEntry(
            request_id=request.request_id,
            attempt=1,
            tenant=tenant,
            user=request.caller.user,
            model=self._served.model,
            revision=self._served.revision,
            fingerprint=self._served.fingerprint,
            request_digest=digest.hexdigest(),
            prompt_tokens=len(request.tokens),
            started_us=_now_us(),
        )

    def _reserve(self, request: GenerationRequest, tenant: str) -> Reservation:
        now = datetime.now(UTC)
        num_output = request.sampling.max_tokens * request.num_samples
        most = worst_price(
            self._cards.quote(self._served.model, now),
            prompt_tokens=len(request.tokens),
            output_tokens_max=num_output,
        )
        tokens = len(request.tokens) + num_output
        return self._quotas.reserve(tenant, tokens=tokens, money=most, now=now)

    def _repeat(self, request: GenerationRequest, opened: OpenEntry, standing: Settled) -> Bill:
        if standing.record.status is Status.CANCELLED:
            raise Conflict(f"request {request.request_id} was cancelled and is settled; use another id")
        num_repeats = self._repeats.pop(opened.key, 0) + 1
        if num_repeats > NUM_REPEATS_MAX:
            raise Overloaded(f"request {request.request_id} was repeated {NUM_REPEATS_MAX} times; use another id")
        self._repeats[opened.key] = num_repeats
        while len(self._repeats) > _NUM_REPEATED_IDS_MAX:
            self._repeats.popitem(last=False)
        bill = Bill(Generation(request), opened, None)
        bill.settled = standing
        return bill


def _now_us() -> int:
    return time.time_ns() // 1000
