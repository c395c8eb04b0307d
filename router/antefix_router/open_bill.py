"""One admitted request on its way to its record: what was done of it, and what of that its client has."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from antefix.usage import Usage
from antefix_billing.ledger_files import Settled
from antefix_billing.limits import Reservation
from antefix_billing.usage_record import OpenEntry, UsageRecord
from antefix_router.answers import KeptAnswer, SharedRun
from antefix_router.generation import Generation

# From here on a lifetime is the longer one of the two that bills tell apart, as Anthropic does.
LONG_TTL_S: Final = 3600.0
# Enough to say what is wrong; an entry of the ledger is bounded.
WRITE_ERROR_CHARACTERS_MAX: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What all records of this router say alike."""

    model: str
    revision: str
    fingerprint: str


class Bill:
    """One admitted request. `reasoning_tokens` is set by the reader of the output, before its end.

    mode: how the model thinks, as clients are told; empty where nobody asked it to hold a conversation.

    prefix_volatile: as `volatile_prefix` found it at admission.
    is_held: the reader keeps the output until all of it is there, so that a client has nothing of one that broke off.
    shared: the answer is made for several readers, each with a bill of its own; one record is written for all of them.
    kept: the answer is there already, and is not made.
    """

    def __init__(
        self,
        generation: Generation,
        opened: OpenEntry,
        reservation: Reservation | None,
        paid_before: Decimal = Decimal(0),
    ) -> None:
        self.generation = generation
        self.opened = opened
        self.reservation = reservation
        self.paid_before = paid_before
        self.reasoning_tokens = 0
        self.mode = ""
        self.prefix_volatile = False
        self.is_held = False
        self.ended_here = False
        self.num_read = 0
        self.shared: SharedRun | None = None
        self.kept: KeptAnswer | None = None
        self.settled: Settled | None = None

    def end_here(self, num_tokens: int) -> None:
        """The reader has found the end of the answer in its first tokens: closing the output is no cancellation."""
        self.ended_here = True
        self.num_read = num_tokens

    def used(self, num_output: int) -> Usage:
        """What the record says of it."""
        used = self.generation.used(num_output, min(self.reasoning_tokens, num_output))
        # What is written follows the hit, so what lies before such a breakpoint is the first part of it.
        longest = max((num for num, ttl_s in self.generation.request.breakpoints if ttl_s >= LONG_TTL_S), default=0)
        kept = min(used.cache_write_tokens, max(0, longest - used.cache_hit_tokens))
        return dataclasses.replace(used, cache_write_1h_tokens=kept) if kept else used

    @property
    def write_error(self) -> str:
        """Why what was computed could not all be stored; empty where it was."""
        report = self.generation.restore
        return ((report.write_error if report else "") or self.generation.write_error)[:WRITE_ERROR_CHARACTERS_MAX]

    @property
    def num_given(self) -> int:
        """Output tokens that the client has been given, if it ended now; of several clients, the one that has most."""
        if self.shared is not None:
            return self.shared.num_given
        return 0 if self.is_held else self.generation.num_emitted

    @property
    def record(self) -> UsageRecord:
        """The record that stands; there after the output's end."""
        assert self.settled is not None
        return self.settled.record

    def usage(self) -> Usage:
        """What the client is told: the record's counts, this run's time to the first token."""
        return dataclasses.replace(self.record, ttft_us=round(self.generation.ttft_s * 1e6))

    @property
    def total_s(self) -> float:
        """Since this run began."""
        return time.perf_counter() - self.generation.started
