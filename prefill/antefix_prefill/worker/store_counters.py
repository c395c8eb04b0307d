"""Counts how the store behaved towards one worker: each error that is counted here led to a recomputation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from antefix.record import Refusal


@dataclass(slots=True)
class StoreCounters:
    """How the store has behaved towards this worker since the worker started. Each counted error led to a
    recomputation.

    late_by_outcome: restores and writes that did not wait for a late store any longer, by what was used instead.
    tokens_by_tier, bytes_by_tier: what was read from each tier, by its label, if there are several stores.
    refused_by_reason: records that the store refused, by `antefix.record.Reason`.
    """

    errors: int = 0
    refused: int = 0
    short_reads: int = 0
    pool_refused: int = 0
    last_error: str = ""
    by_kind: dict[str, int] = field(default_factory=dict)
    refused_by_reason: dict[str, int] = field(default_factory=dict)
    last_refusal: str = ""
    late_by_outcome: dict[str, int] = field(default_factory=dict)
    tokens_by_tier: dict[str, int] = field(default_factory=dict)
    bytes_by_tier: dict[str, int] = field(default_factory=dict)

    def note(self, err: Exception) -> None:
        self.errors += 1
        self.last_error = f"{type(err).__name__}: {err}"
        name = type(err).__name__
        self.by_kind[name] = self.by_kind.get(name, 0) + 1

    def note_late(self, outcome: str) -> None:
        self.late_by_outcome[outcome] = self.late_by_outcome.get(outcome, 0) + 1

    def note_tier(self, label: str, tokens: int, nbytes: int) -> None:
        self.tokens_by_tier[label] = self.tokens_by_tier.get(label, 0) + tokens
        self.bytes_by_tier[label] = self.bytes_by_tier.get(label, 0) + nbytes

    def note_refusals(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            self.refused += 1
            self.refused_by_reason[refusal.reason] = self.refused_by_reason.get(refusal.reason, 0) + 1
            self.last_refusal = refusal.text
