"""The bill of one admitted request until its record is written: the work done, and how much of the output its client
has.
"""

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

# From this lifetime on, written tokens count under the longer of the two lifetimes in bills, as in Anthropic's API.
LONG_TTL_S: Final = 3600.0
# Enough to describe an error; a ledger entry has a maximum size.
WRITE_ERROR_CHARACTERS_MAX: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The values that are the same in all records of this router."""

    model: str
    revision: str
    fingerprint: str


class Bill:
    """One admitted request. `reasoning_tokens` is set by the reader of the output, before its end.

    mode: the thinking mode, in the words that clients are told; empty if the prompt is not a conversation.

    prefix_volatile: as `volatile_prefix` found it at admission. is_held: the reader holds the output until it is
    complete, so a client has none of an output that breaks off. shared: the answer is made for several readers, each
    with a bill of its own; one record is written for all of them. kept: an existing answer, which is given instead of a
    new one.
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
        """The reader found the answer's end after this many tokens, so closing the output is not a cancellation."""
        self.ended_here = True
        self.num_read = num_tokens

    def used(self, num_output: int) -> Usage:
        """The usage for the record."""
        used = self.generation.used(num_output, min(self.reasoning_tokens, num_output))
        # Written blocks follow the hit, so the tokens before such a breakpoint are the first part of what was written.
        longest = max((num for num, ttl_s in self.generation.request.breakpoints if ttl_s >= LONG_TTL_S), default=0)
        kept = min(used.cache_write_tokens, max(0, longest - used.cache_hit_tokens))
        return dataclasses.replace(used, cache_write_1h_tokens=kept) if kept else used

    @property
    def write_error(self) -> str:
        """Why some computed blocks could not be stored; empty if all of them were stored."""
        report = self.generation.restore
        return ((report.write_error if report else "") or self.generation.write_error)[:WRITE_ERROR_CHARACTERS_MAX]

    @property
    def num_given(self) -> int:
        """Output tokens that the client has been given so far; if there are several clients, those of the client that
        has most.
        """
        if self.shared is not None:
            return self.shared.num_given
        return 0 if self.is_held else self.generation.num_emitted

    @property
    def record(self) -> UsageRecord:
        """The request's record. The record exists only after the output has ended."""
        assert self.settled is not None
        return self.settled.record

    def usage(self) -> Usage:
        """The usage that the client is told: the record's counts, with this run's time to the first token."""
        return dataclasses.replace(self.record, ttft_us=round(self.generation.ttft_s * 1e6))

    @property
    def total_s(self) -> float:
        """Seconds since this run began."""
        return time.perf_counter() - self.generation.started
