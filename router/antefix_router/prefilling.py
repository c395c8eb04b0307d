"""The first half of a request: what its prompt still needs, which worker does it, and what if that one fails.

Equal prefixes in flight are computed once: whoever comes first leads, the others wait for its blocks, with a deadline.
A leader that ends in any way wakes its followers, and one of them leads on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from antefix.clients import PrefillClient, Prefilled
from antefix.errors import AntefixError, InternalError, Overloaded, Unavailable
from antefix.generation_request import GenerationRequest
from antefix.security.grants import hold
from antefix.store.api import Store
from antefix.store.store_feed import StoreFeed
from antefix.telemetry import span
from antefix_router.inflight import InFlight, wait_deadline_s, worth_waiting
from antefix_router.naming import NamedPrompt
from antefix_router.placement.directory import Directory
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import FETCH_WEIGHT, Work, saved_by_replay
from antefix_router.placement.workers import Worker, WorkerRole, Workers

log = logging.getLogger("antefix.router")

# Until a speed is measured: a slow one, as of a small machine.
_TOKENS_PER_S_PRIOR = 1_000.0
# A rest longer than this is never left to decode: it would hold up the sequences that run there.
_STRAIGHT_TOKENS_MAX = 1024
_MEMORY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """prefill_tokens_min: an uncached rest of at most this goes straight to decode; negative: measured speeds decide.

    ttft_s_max: a request that would wait longer than this for its first token is refused, unless a worker is idle.
    """

    prefill_tokens_min: int = 0
    ttft_s_max: float = 600.0


@dataclass(slots=True)
class PrefillingCounters:
    """Since the router started, in requests. overhead_s: of a call to an idle prefill worker, measured."""

    num_led: int = 0
    num_followed: int = 0
    num_gave_up_waiting: int = 0
    num_refused: int = 0
    num_straight: int = 0
    overhead_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A prompt that decode may start on. answer: None where decode has to prefill by itself."""

    work: Work
    answer: Prefilled | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What a prefill worker is asked for. ends: the request's deadline, by the router's clock."""

    request: GenerationRequest
    prompt: NamedPrompt
    ends: float

    @property
    def timeout_s(self) -> float:
        return max(0.0, self.ends - time.monotonic())


@dataclass(slots=True, eq=False)
class _Flight:
    """A leader's prefill. until: when it should be done, by the router's clock.  address: the worker that has it."""

    until: float
    address: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Prefilling:
    """Runs prompts over the prefill workers. num_decoding: sequences that run on the decode worker that has fewest."""

    def __init__(
        self,
        workers: Workers,
        store: Store,
        directory: Directory,
        *,
        fingerprint: bytes,
        limits: Limits,
        num_decoding: Callable[[], int] = lambda: 0,
        feed: StoreFeed | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._feed = feed
        self._sessions = sessions or Sessions()
        self.counters = PrefillingCounters()
        self._workers = workers
        self._store = store
        self._directory = directory
        self.fingerprint = fingerprint
        self._limits = limits
        self._num_decoding = num_decoding
        self._in_flight: InFlight[_Flight] = InFlight()

    async def run(self, request: GenerationRequest, prompt: NamedPrompt, *, timeout_s: float) -> Ready:
        """prompt: the request's, named.

        Raises:  Overloaded: every worker that was asked is full, or the wait would be too long.
        """
        ends = time.monotonic() + timeout_s
        order = _Order(request=request, prompt=prompt, ends=ends)
        patience: float | None = None
        hold(prompt.grant)
        while True:
            # 1. Ask what is stored: that decides how much work it is, and for whom.
            num_stored = await self._num_stored_blocks(prompt, request.request_id, ask=patience is not None)
            work = prompt.work(num_stored)
            # 2. A short rest is left to the decode worker, which then needs no handoff; but that one keeps nothing, and
            #    serves one output alone.
            if not request.breakpoints and request.num_samples == 1 and self._goes_straight(work):
                self.counters.num_straight += 1
                return Ready(work=work, answer=None)
            # 3. What is being computed already is waited for. No await from here to `lead`: two would lead.
            found = self._in_flight.find(prompt.keys, num_stored or 0)
            now = time.monotonic()
            if found is None or (patience is not None and now >= patience):
                break
            flight, num_blocks = found
            shared_s = (num_blocks - (num_stored or 0)) * prompt.chain.block_size / self._tokens_per_s()
            if patience is None:
                if not worth_waiting(flight.until - now, shared_s):
                    break
                self.counters.num_followed += 1
                patience = min(order.ends, now + wait_deadline_s(flight.until - now, shared_s))
            if not await _set_within(flight.done, patience - now):
                self.counters.num_gave_up_waiting += 1
        # 4. Prefill, elsewhere if a worker goes away.
        # Behind a leader that kept nobody waiting its blocks will be there in time; one that did is not believed again.
        soon = (found[0].address, found[1]) if found and patience is None else None
        return Ready(work=work, answer=await self._lead(order, work, num_stored or 0, soon))

    async def _num_stored_blocks(self, prompt: NamedPrompt, request_id: str, *, ask: bool) -> int | None:
        """ask: the store itself, though its events may tell: what was stored this moment is not among them yet."""
        if not ask and self._feed is not None and (known := self._feed.num_leading(prompt.keys)) is not None:
            return known
        chain = prompt.chain
        try:
            with span("look-up", num_blocks=len(chain.hashes)):
                found = await self._store.lookup(chain.hashes, fingerprint=self.fingerprint, tenant=prompt.owner)
        except AntefixError as err:
            # Placement without the store's word is still placement; the worker finds out what is there.
            log.warning("request %s: the store did not answer: %s", request_id, err)
            return None
        return found.num_blocks

    def _goes_straight(self, work: Work) -> bool:
        """Whether decode should do the rest itself: computing it there against a call to a prefill worker.

        There it delays whoever runs, so its time counts for each of them; the call costs what calls have cost, and
        what waits at the worker that has least.
        """
        rest = work.num_tokens - (work.stored_tokens or 0)
        if self._limits.prefill_tokens_min >= 0:
            return rest <= self._limits.prefill_tokens_min
        if rest > _STRAIGHT_TOKENS_MAX or not self.counters.overhead_s:
            return False
        rate, now = self._tokens_per_s(), time.monotonic()
        waiting = min((worker.backlog.pending_tokens(now) for worker in self._workers.workers), default=0.0)
        here_s = rest / rate * (1 + self._num_decoding())
        return here_s <= self.counters.overhead_s + (waiting + rest) / rate

    async def _lead(self, order: _Order, work: Work, num_stored: int, soon: tuple[str, int] | None) -> Prefilled | None:
        flight = _Flight(until=time.monotonic() + work.num_tokens / self._tokens_per_s())
        claimed = self._in_flight.lead(flight, order.prompt.keys, num_stored)
        self.counters.num_led += 1
        try:
            return await self._prefill(order, work, flight, soon)
        finally:
            self._in_flight.end(claimed)
            flight.done.set()

    async def _prefill(
        self, order: _Order, work: Work, flight: _Flight, soon: tuple[str, int] | None
    ) -> Prefilled | None:
        tried: set[str] = set()
        prompt = order.prompt
        hint = self._sessions.last(prompt.tenant, order.request.caller.session, WorkerRole.PREFILL)
        while self._workers.has_another(tried):
            with span("place", role="prefill", attempt=len(tried) + 1) as placing:
                worker = self._workers.place(
                    work, self._directory, prompt.keys, prompt.chain.block_size, frozenset(tried), hint=hint, soon=soon
                )
                placing.set(worker=worker.address)
            tried.add(worker.address)
            own = self._own_tokens(worker, prompt, work)
            flight.address = worker.address
            flight.until = time.monotonic() + self._admit(worker, own)
            try:
                answer = await self._call(worker, order, own)
            except (Unavailable, InternalError) as err:
                log.warning("request %s: prefill worker %s: %s", order.request.request_id, worker.address, err)
                self._directory.forget(worker.address)
                continue
            except Overloaded:
                if not self._workers.has_another(tried):
                    raise
                continue
            self._directory.guess(worker.address, prompt.keys)
            self._sessions.note(prompt.tenant, order.request.caller.session, WorkerRole.PREFILL, worker.address)
            return answer
        return None

    def _own_tokens(self, worker: Worker, prompt: NamedPrompt, work: Work) -> int:
        """What the request is to this worker; what it has in memory need not be loaded, or computed if nobody tells."""
        resident = int(self._directory.leading([worker.address], prompt.keys)[0]) * prompt.chain.block_size
        if work.stored_tokens is None:
            return max(1, round(work.num_tokens - float(saved_by_replay(resident, work.replay_tokens))))
        return round(work.num_tokens - work.stored_tokens + FETCH_WEIGHT * max(0, work.stored_tokens - resident))

    def _admit(self, worker: Worker, own_tokens: int) -> float:
        """Seconds until this worker would be done.

        Raises:  Overloaded: too many of them; it is said now, not after waiting.
        """
        rate = worker.backlog.tokens_per_s or self._tokens_per_s()
        pending_s = worker.backlog.pending_tokens(time.monotonic()) / rate
        ttft_s, most = pending_s + own_tokens / rate, self._limits.ttft_s_max
        if worker.num_requests and worker.backlog.tokens_per_s and ttft_s > most:
            self.counters.num_refused += 1
            raise Overloaded(
                f"the first token would take {ttft_s:.1f} s, more than {most:g} s",
                retry_after_s=min(ttft_s - most, most),
            )
        return ttft_s

    async def _call(self, worker: Worker, order: _Order, own: int) -> Prefilled:
        client = worker.client
        assert isinstance(client, PrefillClient)
        was_idle, start = worker.num_requests == 0, time.monotonic()
        with self._workers.load(worker, own, num_active_tokens=len(order.prompt.tokens)):
            answer = await client.prefill(order.request, timeout_s=order.timeout_s)
        if was_idle:
            spent_s = time.monotonic() - start - answer.restore.restore_s - answer.restore.compute_s
            before = self.counters.overhead_s or max(spent_s, 0.0)
            self.counters.overhead_s = _MEMORY * before + (1 - _MEMORY) * max(spent_s, 0.0)
        return answer

    def _tokens_per_s(self) -> float:
        speeds = [worker.backlog.tokens_per_s for worker in self._workers.workers if worker.backlog.tokens_per_s]
        return sum(speeds) / len(speeds) if speeds else _TOKENS_PER_S_PRIOR


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return False
    return True
