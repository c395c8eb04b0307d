"""The first half of a request: which tokens of its prompt must still be computed, which worker computes them, and what
happens if that worker fails.

Equal prefixes in flight are computed once: the first request leads, and the others wait for its blocks, up to a
deadline. When a leader ends in any way, its followers wake up and one of them becomes the leader.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from antefix.clients import Prefilled
from antefix.errors import AntefixError
from antefix.generation_request import GenerationRequest
from antefix.located import Located
from antefix.security.grants import hold
from antefix.store.api import Store
from antefix.store.many_stores import ManyStores
from antefix.store.patience import BASE_S, Patience
from antefix.store.store_feed import StoreFeed
from antefix.telemetry import span
from antefix_router.hedging import HedgeBudget
from antefix_router.inflight import InFlight, wait_deadline_s, worth_waiting
from antefix_router.load_shedding import note_own_work
from antefix_router.naming import NamedPrompt
from antefix_router.placement.directory import Directory
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import Work
from antefix_router.placement.workers import Workers
from antefix_router.prefill_calls import Flight, Limits, Order, PrefillCalls, PrefillingCounters

log = logging.getLogger("antefix.router")

# More uncached tokens than this are never left to decode, because they would delay the sequences that run there.
_STRAIGHT_TOKENS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A prompt on which decode may start. answer: what prefill returned; None if decode must prefill the prompt.

    located: which of several stores probably holds which of its blocks now.  has_failed: a worker that answers could
    not compute the prompt, so one more worker may try it, and no third one.
    """

    work: Work
    answer: Prefilled | None
    located: Located | None = None
    has_failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """num_blocks: leading stored blocks; None: the store did not answer, or is late. located: set if there are several
    stores.
    """

    num_blocks: int | None = None
    located: Located | None = None


class Prefilling:
    """Runs prompts on the prefill workers. num_decoding: returns the number of sequences on the decode worker with the
    fewest.
    """

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
        budget: HedgeBudget | None = None,
    ) -> None:
        self._feed = feed
        self._sessions = sessions or Sessions()
        self.counters = PrefillingCounters()
        self._workers = workers
        self._store = store
        self.fingerprint = fingerprint
        self._limits = limits
        self._num_decoding = num_decoding
        self._patience = Patience()
        self._in_flight: InFlight[Flight] = InFlight()
        # The tokens of prompts that were left to decode and have no first token yet.
        self._num_left_tokens = 0
        self._calls = PrefillCalls(workers, directory, self._sessions, limits, self.counters, budget or HedgeBudget())

    async def run(self, request: GenerationRequest, prompt: NamedPrompt, *, timeout_s: float) -> Ready:
        """prompt: the request's prompt, named.

        Raises:  Overloaded: every worker that was asked is full, or the wait would be too long.
        """
        ends = time.monotonic() + timeout_s
        order = Order(request=request, prompt=prompt, ends=ends)
        patience: float | None = None
        hold(prompt.grant)
        while True:
            # 1. Ask what is stored. This decides how much work the request is, and for which worker.
            stored = await self._look_up(prompt, request.request_id, ask=patience is not None)
            num_stored = stored.num_blocks
            work = prompt.work(num_stored, located=stored.located)
            if num_stored is not None and patience is None:
                note_own_work((work.num_tokens - (work.stored_tokens or 0)) / self._calls.tokens_per_s())
            # 2. If few tokens are uncached, the decode worker computes them and needs no handoff. It then keeps no
            # breakpoints and serves one output only. If the store does not answer, it would lose the handoff too, and
            # the prompt would be computed twice.
            can_go_straight = not request.breakpoints and request.num_samples == 1
            if can_go_straight and (num_stored is None or self._goes_straight(work)):
                self.counters.num_straight += 1
                return Ready(work=work, answer=None, located=stored.located)
            # 3. Wait for blocks that are being computed already. There is no await from here to `lead`, because two
            # requests could otherwise both lead.
            found = self._in_flight.find(prompt.keys, num_stored or 0)
            now = time.monotonic()
            if found is None or (patience is not None and now >= patience):
                break
            flight, num_blocks = found
            shared_s = (num_blocks - (num_stored or 0)) * prompt.chain.block_size / self._calls.tokens_per_s()
            if patience is None:
                if not worth_waiting(flight.until - now, shared_s):
                    break
                self.counters.num_followed += 1
                patience = min(order.ends, now + wait_deadline_s(flight.until - now, shared_s))
            if not await _set_within(flight.done, patience - now):
                self.counters.num_gave_up_waiting += 1
        # 4. Prefill. If a worker goes away, another one is tried. A leader's blocks are expected in time only if this
        # request did not have to wait for that leader before.
        soon = (found[0].address, found[1]) if found and patience is None else None
        order = replace(order, located=stored.located)
        answer, has_failed = await self._lead(order, work, num_stored or 0, soon)
        located = _located_now(stored.located, answer, prompt)
        return Ready(work=work, answer=answer, located=located, has_failed=has_failed and answer is None)

    @contextlib.contextmanager
    def left_to_decode(self, ready: Ready) -> Iterator[None]:
        """Hold this from `run` until the first token, because prompts that decode computes make others wait there."""
        rest = 0 if ready.answer is not None else ready.work.num_tokens - (ready.work.stored_tokens or 0)
        self._num_left_tokens += rest
        try:
            yield
        finally:
            self._num_left_tokens -= rest

    @property
    def tokens_per_s(self) -> float:
        """The measured speed of one prefill worker, on average."""
        return self._calls.tokens_per_s()

    async def _look_up(self, prompt: NamedPrompt, request_id: str, *, ask: bool) -> _Stored:
        """ask: ask the stores even if their events are followed, because events lag behind what was just stored."""
        if not ask and self._feed is not None and (known := self._feed.num_leading(prompt.keys)) is not None:
            return _Stored(num_blocks=known)
        hashes, store = prompt.chain.hashes, self._store
        try:
            with span("look-up", num_blocks=len(hashes)):
                if not isinstance(store, ManyStores):
                    asked = store.lookup(hashes, fingerprint=self.fingerprint, tenant=prompt.owner)
                    found = await self._patience.within(self._patience.look_ups, BASE_S, asked)
                    return _Stored(num_blocks=found.num_blocks)
                located = await store.locate(hashes, fingerprint=self.fingerprint, tenant=prompt.owner, ask=ask)
                return _Stored(num_blocks=located.found.num_blocks, located=located)
        except AntefixError as err:
            # Placement works without the store's answer. The worker finds out itself what is stored.
            log.warning("request %s: the store did not answer: %s", request_id, err)
            return _Stored()

    def _goes_straight(self, work: Work) -> bool:
        """Whether decode should compute the uncached tokens itself, compared with a call to a prefill worker.

        Prefill on a decode worker delays the running sequences, so its time counts once for each of them, and it waits
        for other prompts that were left to decode. A call to a prefill worker costs the measured overhead of calls,
        plus the waiting work at the worker that has least.
        """
        rest = work.num_tokens - (work.stored_tokens or 0)
        if self._limits.prefill_tokens_min >= 0:
            return rest <= self._limits.prefill_tokens_min
        if rest > _STRAIGHT_TOKENS_MAX or not self.counters.overhead_s:
            return False
        rate, now = self._calls.tokens_per_s(), time.monotonic()
        waiting = min((worker.backlog.pending_tokens(now) for worker in self._workers.workers), default=0.0)
        num_decoding = self._num_decoding()
        # Layers of a prompt's chunk take turns with decode steps, so a prompt gets half of a worker that decodes.
        own = (self._num_left_tokens + rest) * (2 if num_decoding else 1)
        return own + rest * num_decoding <= self.counters.overhead_s * rate + waiting + rest

    async def _lead(
        self, order: Order, work: Work, num_stored: int, soon: tuple[str, int] | None
    ) -> tuple[Prefilled | None, bool]:
        """The answer of a prefill worker, and whether one that answers could not compute the prompt."""
        flight = Flight(until=time.monotonic() + work.num_tokens / self._calls.tokens_per_s())
        claimed = self._in_flight.lead(flight, order.prompt.keys, num_stored)
        self.counters.num_led += 1
        try:
            return await self._calls.run(order, work, flight, soon), flight.has_failed
        finally:
            self._in_flight.end(claimed)
            flight.done.set()


def _located_now(located: Located | None, answer: Prefilled | None, prompt: NamedPrompt) -> Located | None:
    """The stores' contents, including the blocks that a prefill worker has stored since the look-up. None: the contents
    are not known, so the stores are asked.
    """
    if located is None or answer is None or not answer.near_stores:
        return None
    num_there = answer.restore.hit_tokens // prompt.chain.block_size
    return located.with_span(answer.near_stores, num_there, len(prompt.chain.hashes))


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return False
    return True
