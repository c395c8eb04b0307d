"""The answers that retries may have at one router: which clients read a running answer, when an answer without clients
is abandoned, and which answers are kept. `settle` writes the record, once for all clients of an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from antefix.clients import AnswerCounters
from antefix.errors import Conflict, InvalidRequest
from antefix.generation_request import GenerationRequest
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import OpenEntry, Status
from antefix_router.answers import KeptAnswer, RetryConfig, SharedRun, Shelf
from antefix_router.open_bill import Bill

CLIENT_LEFT: Final = "the client went away"
# Between its admission and its first read, a client is not counted as a reader. That takes milliseconds.
_ADMITTED_S: Final = 30.0
# An answer without a client is settled after this time, so that a client that was just admitted can still join it.
_MADE_S: Final = 2.0

Settle = Callable[[Bill, Status, str], asyncio.Task[Settled | None]]


class Retries:
    """The answers of one router.  settle: writes an answer's record."""

    def __init__(self, config: RetryConfig, settle: Settle) -> None:
        self._config = config
        self._settle = settle
        self._shared: dict[str, SharedRun] = {}
        self._shelf = Shelf(config.kept_answers_bytes, config.kept_answers_s)
        self._num_joined = 0
        self._num_given = 0
        self.is_draining = False

    def counts(self) -> AnswerCounters:
        return AnswerCounters(
            running=len(self._shared),
            unattended=self._num_unattended,
            unattended_max=self._config.unattended_max,
            kept=len(self._shelf),
            kept_bytes=self._shelf.nbytes,
            kept_bytes_max=self._shelf.bytes_max,
            dropped=self._shelf.num_dropped,
            joined=self._num_joined,
            given_again=self._num_given,
        )

    def kept(self, request: GenerationRequest, opened: OpenEntry) -> KeptAnswer | None:
        """The finished answer to this request, if it is still kept and has everything the request asks for."""
        kept = self._shelf.get(opened.key)
        if kept is None or not kept.fits(request, opened):
            return None
        self._num_given += 1
        return kept

    def share(self, bill: Bill) -> None:
        """Allow other clients to read the answer of an admitted request from now on."""
        bill.shared = self._shared[bill.opened.key] = SharedRun(bill)
        self._expect(bill.shared)

    def join(self, request: GenerationRequest, opened: OpenEntry) -> Bill | None:
        """Join another client to a running answer, which it reads from the beginning. None: no answer to this request
        is running.

        Raises:  InvalidRequest: the id belongs to another request.  Conflict: the answer lacks something that this
        request asks for.
        """
        shared = self._shared.get(opened.key)
        if shared is None:
            return None
        first = shared.bill
        if (first.opened.request_digest, first.opened.user) != (opened.request_digest, opened.user):
            raise InvalidRequest(f"request id {request.request_id} is in use for another request")
        if shared.generation.request.sampling.num_top_logprobs != request.sampling.num_top_logprobs:
            raise Conflict(f"request {request.request_id} is running with another number of logprobs; wait for its end")
        self._num_joined += 1
        self._expect(shared)
        bill = Bill(shared.generation, first.opened, first.reservation, first.paid_before)
        bill.shared = shared
        return bill

    def left(self, shared: SharedRun) -> None:
        """A client left. If the client was the last one, the answer is still generated, within limits, because the
        client may ask again.
        """
        if shared.num_readers or shared.settling is not None:
            return
        is_full = self._num_unattended > self._config.unattended_max
        if shared.num_expected:
            self._wait_for_a_reader(shared, _MADE_S if shared.is_over else _ADMITTED_S)
        elif shared.is_over or self.is_draining or is_full or not self._config.unattended_s:
            self._give_up(shared)
        else:
            self._wait_for_a_reader(shared, self._config.unattended_s)

    def made(self, shared: SharedRun) -> None:
        """Record that the answer is complete or has failed. If an answer has no reader, it is charged here, and kept
        for a retry.
        """
        if not shared.num_readers and shared.settling is None:
            self._wait_for_a_reader(shared, _MADE_S)

    def end(self, shared: SharedRun, bill: Bill, status: Status, detail: str) -> asyncio.Task[Settled | None]:
        """Write the answer's record, once for all of its clients. bill: that of a client that has the whole answer, if
        there is one.
        """
        if shared.settling is None:
            if shared.error is None and shared.generation.finish_reason and status is not Status.FAILED:
                self._shelf.put(bill.opened.key, KeptAnswer.of(shared.generation, bill.opened))
            del self._shared[bill.opened.key]
            if status in (Status.STOP, Status.LENGTH):
                shared.bill = bill
            shared.settling = self._settle(shared.bill, status, detail)
        return shared.settling

    def drain(self) -> None:
        """Abandon answers whose clients left, now and later, because no new client comes any more. A client that was
        admitted before can still begin to read.
        """
        self.is_draining = True
        for shared in list(self._shared.values()):
            if not shared.num_expected:
                self._give_up(shared)

    def close(self) -> None:
        """Abandon all answers without a reader."""
        self.is_draining = True
        for shared in list(self._shared.values()):
            self._give_up(shared)

    @property
    def _num_unattended(self) -> int:
        return sum(not shared.num_readers for shared in self._shared.values())

    def _expect(self, shared: SharedRun) -> None:
        shared.num_expected += 1
        if not shared.num_readers:
            self._wait_for_a_reader(shared, _ADMITTED_S)

    def _wait_for_a_reader(self, shared: SharedRun, seconds: float) -> None:
        if shared.waiting_for_a_reader is not None:
            shared.waiting_for_a_reader.cancel()
        loop = asyncio.get_running_loop()
        shared.waiting_for_a_reader = loop.call_later(seconds, self._give_up, shared)

    def _give_up(self, shared: SharedRun) -> None:
        if shared.num_readers or shared.settling is not None:
            return
        if shared.error is not None:
            self.end(shared, shared.bill, Status.FAILED, type(shared.error).__name__)
        else:
            self.end(shared, shared.bill, Status.CANCELLED, CLIENT_LEFT)
