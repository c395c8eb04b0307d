"""Evidence from the ledger for a hit in a worker's memory: did an earlier request have that prefix computed?

The store's log cannot give this evidence for blocks that the store never accepted because it was damaged, full or down.
A worker keeps such blocks in memory and hits them there. The usage records hold prompt marks (hashes of a few prefixes,
`antefix.prompt_marks`) that show which prefixes each request computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from antefix.errors import InvalidRequest
from antefix.prompt_marks import block_size_of, mark_at, parting
from antefix_billing.usage_record import UsageRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """The records, indexed by the mark of their prompt's first block. The first block's mark also depends on tenant and
    model.

    earliest: a function that maps a time to the lowest time that the clock showed later, in case the clock was set
    back.
    """

    by_first: Mapping[str, list[UsageRecord]]
    earliest: Callable[[int], int]

    @classmethod
    def of(cls, records: Iterable[UsageRecord], earliest: Callable[[int], int] = lambda time_us: time_us) -> Computed:
        by_first: defaultdict[str, list[UsageRecord]] = defaultdict(list)
        for record in records:
            if first := mark_at(record.prompt_marks, 1):
                by_first[first].append(record)
        return cls(by_first=by_first, earliest=earliest)

    def supports(self, record: UsageRecord, slack_us: int) -> bool:
        """Whether another request that began before this one ended had the prefix of this record's hit in its prompt or
        its output.
        """
        others = self.by_first.get(mark_at(record.prompt_marks, 1), [])
        return any(
            _had(other, record)
            for other in others
            if other is not record and self.earliest(other.started_us) <= record.finished_us + slack_us
        )


def _had(other: UsageRecord, record: UsageRecord) -> bool:
    try:
        block_size = block_size_of(record.prompt_marks, record.prompt_tokens)
        shared = parting(other.prompt_marks, record.prompt_marks)
    except InvalidRequest:
        return False
    if not block_size:
        return False
    num_hit = record.cache_hit_tokens // block_size
    if named := mark_at(other.prompt_marks, num_hit):
        return record.last_hit_hash.startswith(named)
    if shared.blocks_min >= num_hit:
        return True
    # The hit ends between two marks, or in the other request's output. It counts as supported if all earlier marks
    # agree.
    reaches = (other.prompt_tokens + other.output_tokens) // block_size >= num_hit
    ends_before = shared.blocks_max == shared.blocks_min == other.prompt_tokens // block_size
    return reaches and (shared.blocks_max >= num_hit or ends_before)
