"""Checks billed hits against the stores' logs: was the block stored before the request ended, and read while it ran?

Logs and records have wall-clock times. If a log shows that its host's clock was set back, lines logged before that step
count as earlier than the step, and a request that ran across the step may have been served before or after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

from antefix.store_files.hit_log import StoreEvent, StoreEventKind, read_store_log_files
from antefix_billing.computed_prefixes import Computed
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import UsageRecord

# Store and router each have a clock. NTP keeps the hosts of one deployment within a second of each other.
CLOCK_SLACK_US: Final = 2_000_000
# When a clock is set back, the log's nearest lines before and after that step are at most this far from it.
STEP_SLACK_US: Final = 60_000_000


class StepBack(NamedTuple):
    """A moment when a clock was set back: the log's last time before the step, and its first time after the step."""

    before_us: int
    after_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HitEvidence:
    """For the block hashes that records name: when each block was first stored, and when it was read.

    records: the records of all ledgers of the deployment, since another router's request may have computed a prefix.
    """

    stored_us: dict[str, int]
    reads_us: dict[str, list[int]]
    records: tuple[UsageRecord, ...]
    steps: tuple[StepBack, ...] = ()

    @classmethod
    def of(cls, settled: Sequence[Settled], store_log: Path | Sequence[Path]) -> HitEvidence:
        wanted = {item.record.last_hit_hash for item in settled if item.record.is_proved_hit}
        stored: dict[str, int] = {}
        reads: defaultdict[str, list[int]] = defaultdict(list)
        steps: set[StepBack] = set()
        for log in [store_log] if isinstance(store_log, Path) else store_log:
            for events in read_store_log_files(log):
                for event in _noting_steps(events, steps):
                    if event.hash not in wanted:
                        continue
                    if event.kind is StoreEventKind.STORED:
                        stored[event.hash] = min(event.time_us, stored.get(event.hash, event.time_us))
                    else:
                        reads[event.hash].append(event.time_us)
        return cls(
            stored_us=stored,
            reads_us=reads,
            records=tuple(item.record for item in settled),
            steps=tuple(sorted(steps, reverse=True)),
        )

    def unsupported(self, settled: Sequence[Settled], slack_us: int) -> list[str]:
        """The event ids of records whose hit is not supported by the log. Hits reported by workers of other engines are
        left out, because a log cannot support them.
        """
        hits = [item.record for item in settled if item.record.is_proved_hit]
        doubtful = [record for record in hits if not self._supports(record, slack_us)]
        # A store that was damaged, full or down did not take the blocks that a worker computed. The worker continued to
        # hit them in its memory.
        computed = Computed.of(self.records, self._earliest) if doubtful else None
        return [
            record.event_id
            for record in doubtful
            if record.hit_store_tokens or computed is None or not computed.supports(record, slack_us)
        ]

    def _supports(self, record: UsageRecord, slack_us: int) -> bool:
        stored_us = self.stored_us.get(record.last_hit_hash)
        if stored_us is None or self._earliest(stored_us) > record.finished_us + slack_us:
            return False
        if record.hit_store_tokens == 0:
            return True
        return any(
            self._is_during(read_us, record, slack_us) for read_us in self.reads_us.get(record.last_hit_hash, ())
        )

    def _earliest(self, time_us: int) -> int:
        """The lowest time that the clock showed after it showed `time_us`, as far as the logs show."""
        for step in self.steps:
            if step.before_us >= time_us:
                time_us = min(time_us, step.after_us)
        return time_us

    def _is_during(self, read_us: int, record: UsageRecord, slack_us: int) -> bool:
        if record.started_us - slack_us <= read_us <= record.finished_us + slack_us:
            return True
        lasted_us = record.finished_us - record.started_us
        return any(
            record.started_us - STEP_SLACK_US <= step.before_us <= record.finished_us + slack_us
            and step.after_us - STEP_SLACK_US <= read_us <= step.after_us + lasted_us + STEP_SLACK_US
            for step in self.steps
        )


def _noting_steps(events: Iterable[StoreEvent], steps: set[StepBack]) -> Iterable[StoreEvent]:
    """The events of one log file, in the order in which its one process wrote them; clock steps are added to
    `steps`.
    """
    last_us = 0
    for time_us, line in groupby(events, key=lambda event: event.time_us):
        if time_us < last_us - CLOCK_SLACK_US:
            steps.add(StepBack(before_us=last_us, after_us=time_us))
        last_us = time_us
        yield from line
