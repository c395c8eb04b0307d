"""Admission to a prefill worker: a bounded queue in front of the one compute thread, and places for short rests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from antefix.fair_turns import FairTurns
from antefix.telemetry import span
from antefix.telemetry.exposition import SECONDS, histogram

# For every 8 places there is one more, for tenants that have no place.
_EXTRA_OF = 8


class PrefillQueue:
    """At most `num_running_max` prompts run and `num_waiting_max` wait; tenants take turns.

    With two running prompts, one loads and writes while the other computes; more running prompts would only hold pool
    blocks. Prompts with little left to compute do not wait for these places: up to `num_short_max` of them run in
    addition, because the compute thread takes their chunks first.
    """

    def __init__(self, num_running_max: int, num_waiting_max: int, num_short_max: int = 0) -> None:
        # An extra place lets a tenant without running prompts start before another tenant's long prompt ends: the
        # compute thread takes tenants' chunks in turn.
        self._turns = FairTurns(num_running_max, num_waiting_max, num_extra=max(1, num_running_max // _EXTRA_OF))
        self._short_turns = FairTurns(num_short_max, num_waiting_max, num_extra=-(-num_short_max // _EXTRA_OF))
        self._has_short_turns = num_short_max > 0
        self.num_running = 0
        self.wait_s = histogram("antefix_prefill_wait_seconds", "How long prompts waited for a turn.", buckets=SECONDS)

    @property
    def num_waiting(self) -> int:
        return self._turns.num_waiting + self._short_turns.num_waiting

    @contextlib.asynccontextmanager
    async def turn(
        self,
        retry_after_s: float,
        is_short: Callable[[], Awaitable[bool]],
        *,
        tenant: str = "",
        share: int = 1,
        num_tokens: int = 0,
    ) -> AsyncIterator[None]:
        """Wait for the prompt's turn. is_short: tells whether few tokens are left to compute; called only if the prompt
        would wait. num_tokens: tokens to compute, as far as known. share: the tenant's share.

        Raises:  Overloaded: the queue is full; nothing was queued.
        """
        async with contextlib.AsyncExitStack() as place:
            with self.wait_s.time(), span("queue", num_waiting=self.num_waiting):
                turns = self._turns
                # A prompt must not pass the tenant's earlier ones, although one of the other places has just become
                # free: under overload some of them would wait twice as long as others.
                would_pass = turns.is_full or self._short_turns.has_waiting(tenant)
                if would_pass and self._has_short_turns and await is_short():
                    turns = self._short_turns
                turn = turns.turn(tenant, float(num_tokens), share=share, retry_after_s=retry_after_s)
                await place.enter_async_context(turn)
            self.num_running += 1
            try:
                yield
            finally:
                self.num_running -= 1
