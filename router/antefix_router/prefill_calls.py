"""Calls prefill workers to compute prompts. If a worker fails or hangs, another one is called. If a worker is late, a
second one is called too, and the first answer counts.

Work done twice is charged once, because only the report of the answer that is used is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Final

from antefix.clients import PrefillClient, Prefilled
from antefix.errors import InternalError, Overloaded, Unavailable
from antefix.generation_request import GenerationRequest
from antefix.located import Located
from antefix.telemetry import span
from antefix_router.hedging import SLACK_S, HedgeBudget
from antefix_router.naming import NamedPrompt
from antefix_router.placement.directory import Directory
from antefix_router.placement.loading import loading_tokens
from antefix_router.placement.moves import FAILED_STEPS
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import FETCH_WEIGHT, Work, saved_by_replay
from antefix_router.placement.workers import Worker, WorkerRole, Workers

log = logging.getLogger("antefix.router")

_MEMORY: Final = 0.9
# A prompt that only one worker could compute is left to decode when it takes this many times the predicted time. Blocks
# that were computed and not yet stored are then lost.
_ALONE_FACTOR: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """prefill_tokens_min: a request with at most this many uncached tokens goes straight to decode; negative: measured
    speeds decide.

    ttft_s_max: a request whose first token would take longer than this is refused, unless a worker is idle.
    """

    prefill_tokens_min: int = 0
    ttft_s_max: float = 600.0


@dataclass(slots=True)
class PrefillingCounters:
    """Counts of requests since the router started.  overhead_s: the measured overhead of a call to an idle prefill
    worker.

    num_hedged: prompts given to a second worker because the first was late. num_hedges_won: those that the second
    worker finished first. num_left: prompts left to decode because no prefill worker finished.
    """

    num_led: int = 0
    num_followed: int = 0
    num_gave_up_waiting: int = 0
    num_refused: int = 0
    num_straight: int = 0
    num_hedged: int = 0
    num_hedges_won: int = 0
    num_left: int = 0
    overhead_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A prompt to be computed by a prefill worker. ends: the request's deadline, by the router's clock.

    located: which of several stores probably holds which blocks.
    """

    request: GenerationRequest
    prompt: NamedPrompt
    ends: float
    located: Located | None = None

    @property
    def timeout_s(self) -> float:
        return max(0.0, self.ends - time.monotonic())


@dataclass(slots=True, eq=False)
class Flight:
    """The prefill of a leading request. until: when it should be done, by the router's clock. address: the worker that
    computes it.  has_failed: a worker that answers could not compute the prompt.
    """

    until: float
    address: str = ""
    has_failed: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class _Attempt:
    """One prompt and the calls for it. calls: the running calls, the first one first. predicted_s: the prediction for
    the latest call.
    """

    order: Order
    work: Work
    flight: Flight
    soon: tuple[str, int] | None
    tried: set[str] = field(default_factory=set)
    calls: dict[asyncio.Task[Prefilled], Worker] = field(default_factory=dict)
    predicted_s: float = 0.0
    has_hedged: bool = False

    @property
    def late_s(self) -> float | None:
        """Seconds to wait for the running calls before a second worker is asked; None if none will be asked."""
        return None if self.has_hedged else self.predicted_s + SLACK_S


class PrefillCalls:
    """The calls of one router."""

    def __init__(
        self,
        workers: Workers,
        directory: Directory,
        sessions: Sessions,
        limits: Limits,
        counters: PrefillingCounters,
        budget: HedgeBudget,
    ) -> None:
        self._workers = workers
        self._directory = directory
        self._sessions = sessions
        self._limits = limits
        self._counters = counters
        self._budget = budget

    async def run(self, order: Order, work: Work, flight: Flight, soon: tuple[str, int] | None) -> Prefilled | None:
        """None: no prefill worker could compute the prompt, so a decode worker must compute it.

        soon: the worker that is computing the prompt's beginning, and how many blocks of it.
        Raises:  Overloaded: every worker that was asked is full, or the wait would be too long.  StepFailed, NotFinite,
            InternalError: two workers could not compute the prompt.
        """
        attempt = _Attempt(order, work, flight, soon)
        self._budget.note_request()
        try:
            while attempt.calls or self._workers.has_another(attempt.tried):
                if not attempt.calls:
                    self._begin(attempt)
                done, _ = await asyncio.wait(attempt.calls, timeout=attempt.late_s, return_when=asyncio.FIRST_COMPLETED)
                if not done and not await self._hedge(attempt):
                    break
                for task in done:
                    if (answer := self._taken(attempt, task)) is not None:
                        return answer
        finally:
            for task in attempt.calls:
                task.cancel()
            await asyncio.gather(*attempt.calls, return_exceptions=True)
        self._counters.num_left += 1
        return None

    def _begin(self, attempt: _Attempt) -> None:
        """Call the best worker that the prompt was not tried on. Raises: Overloaded: the first token would come too
        late.
        """
        order, prompt, tried = attempt.order, attempt.order.prompt, attempt.tried
        hint = self._sessions.last(prompt.tenant, order.request.caller.session, WorkerRole.PREFILL)
        with span("place", role="prefill", attempt=len(tried) + 1) as placing:
            worker = self._workers.place(
                attempt.work,
                self._directory,
                prompt.keys,
                prompt.chain.block_size,
                frozenset(tried),
                hint=hint,
                soon=attempt.soon,
            )
            placing.set(worker=worker.address)
        tried.add(worker.address)
        own = self._own_tokens(worker, prompt, attempt.work)
        attempt.flight.address = worker.address
        attempt.predicted_s = self._admit(worker, own)
        attempt.flight.until = time.monotonic() + attempt.predicted_s
        attempt.calls[asyncio.create_task(self._call(worker, order, own))] = worker

    async def _hedge(self, attempt: _Attempt) -> bool:
        """The call is late, so ask a second worker. Returns False to give up, and leave the prompt to decode."""
        attempt.has_hedged = True
        (task, late), *_ = attempt.calls.items()
        if not self._workers.may_help(late, attempt.tried):
            return await self._has_waited_alone(attempt, late, task)
        if self._budget.take():
            log.warning("request %s: %s is late", attempt.order.request.request_id, late.address)
            self._counters.num_hedged += 1
            # If no other worker has room, the late one may still finish.
            with contextlib.suppress(Overloaded):
                self._begin(attempt)
        return True

    async def _has_waited_alone(self, attempt: _Attempt, late: Worker, task: asyncio.Task[Prefilled]) -> bool:
        """Continue to wait for the only worker that has the prompt. Returns False if the answer is so late that decode
        would be faster.
        """
        if not late.backlog.tokens_per_s:
            return True  # the prediction is only a guess
        done, _ = await asyncio.wait({task}, timeout=(_ALONE_FACTOR - 1) * attempt.predicted_s)
        return bool(done) or not self._budget.take()

    def _taken(self, attempt: _Attempt, task: asyncio.Task[Prefilled]) -> Prefilled | None:
        """The answer of a call that has ended. None: the call failed, so the caller looks for another worker.

        Raises:  Overloaded: the worker was overloaded, and there is no other.  StepFailed, NotFinite, InternalError: a
            second worker could not compute the prompt either, so a third one is not tried.
        """
        is_second = next(iter(attempt.calls)) is not task
        worker, request = attempt.calls.pop(task), attempt.order.request
        try:
            answer = task.result()
        except (Unavailable, InternalError) as err:
            log.warning("request %s: prefill worker %s failed: %s", request.request_id, worker.address, err)
            self._directory.forget(worker.address)
            if isinstance(err, FAILED_STEPS):
                if attempt.flight.has_failed and not attempt.calls:
                    raise
                attempt.flight.has_failed = True
            return None
        except Overloaded:
            if not attempt.calls and not self._workers.has_another(attempt.tried):
                raise
            return None
        self._counters.num_hedges_won += is_second
        self._directory.guess(worker.address, attempt.order.prompt.keys)
        self._sessions.note(attempt.order.prompt.tenant, request.caller.session, WorkerRole.PREFILL, worker.address)
        return answer

    def _own_tokens(self, worker: Worker, prompt: NamedPrompt, work: Work) -> int:
        """The work of the request for this worker, in tokens. Tokens in the worker's memory need not be loaded; if the
        store did not answer, they need not be computed.
        """
        resident = int(self._directory.leading([worker.address], prompt.keys)[0]) * prompt.chain.block_size
        if work.stored_tokens is None:
            return max(1, round(work.num_tokens - float(saved_by_replay(resident, work.replay_tokens))))
        loading = FETCH_WEIGHT * max(0, work.stored_tokens - resident)
        if work.places and worker.speeds:
            loading = loading_tokens(work, resident, worker.speeds, self.tokens_per_s())
        return round(work.num_tokens - work.stored_tokens + loading)

    def _admit(self, worker: Worker, own_tokens: int) -> float:
        """Seconds until this worker would have computed the prompt.

        Raises:  Overloaded: too many seconds. The request is refused now instead of after a long wait.
        """
        rate = worker.backlog.tokens_per_s or self.tokens_per_s()
        pending_s = worker.backlog.pending_tokens(time.monotonic()) / rate
        ttft_s, most = pending_s + own_tokens / rate, self._limits.ttft_s_max
        if worker.num_requests and worker.backlog.tokens_per_s and ttft_s > most:
            self._counters.num_refused += 1
            raise Overloaded(
                f"the first token would take {ttft_s:.1f} s, more than {most:g} s",
                retry_after_s=min(ttft_s - most, most),
            )
        return ttft_s

    async def _call(self, worker: Worker, order: Order, own: int) -> Prefilled:
        client = worker.client
        assert isinstance(client, PrefillClient)
        was_idle, start = worker.num_requests == 0, time.monotonic()
        with self._workers.load(worker, own, num_active_tokens=len(order.prompt.tokens)), worker.guard():
            answer = await client.prefill(order.request, timeout_s=order.timeout_s, located=order.located)
        worker.note_speeds(answer.speeds)
        if was_idle:
            spent_s = time.monotonic() - start - answer.restore.restore_s - answer.restore.compute_s
            before = self._counters.overhead_s or max(spent_s, 0.0)
            self._counters.overhead_s = _MEMORY * before + (1 - _MEMORY) * max(spent_s, 0.0)
        return answer

    def tokens_per_s(self) -> float:
        """The measured prefill speed of one worker, on average."""
        return self._workers.tokens_per_s()
