"""Turns the ledger into a trace: usage records have times, lengths, hits, and hashes of prompt prefixes, but no text.

A record has a hash (mark) of its prompt after 1, 2, 3, 4, 6, 8, 12, ... blocks and after the last one. So the length of
a beginning that two prompts share is known to a factor of 1.5 from marks alone. Blocks that were hit were shared as
well, and their number is known exactly. Of the two numbers the larger is used, which is never more than was shared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from antefix import prompt_marks
from antefix.errors import InvalidRequest
from antefix_billing.ledger_files import ledgers_of, read_settled
from antefix_billing.usage_record import UsageRecord
from antefix_simulate.logs.import_log import ImportedLog
from antefix_simulate.logs.logged_call import Ignored
from antefix_simulate.prefix_names import NAME_BITS
from antefix_simulate.trace import TraceRequest

_BLOCK_SIZE_MAX: Final = 1 << 20


def import_ledger(paths: Sequence[Path], *, block_size: int | None = None) -> tuple[ImportedLog, int]:
    """All settled requests in the ledgers, in order of their start, and the block size: as given, or one that fits all
    records.

    Raises:  InvalidRequest: no record has marks, or no block size fits.  LedgerCorrupt: as `read_settled`.
    """
    ignored = Ignored()
    records = sorted(
        (settled.record for settled in chain.from_iterable(map(read_settled, ledgers_of(paths)))),
        key=lambda record: record.started_us,
    )
    marked = [record for record in records if record.prompt_marks]
    if not marked:
        raise InvalidRequest(
            f"no record in {', '.join(map(str, paths))} has marks of its prompt, so nothing tells which prompts "
            "share a prefix"
        )
    size = block_size or _block_size(marked)
    names = _Names(size)
    requests = []
    for record in records:
        if record.prompt_tokens < 1:
            ignored.count("requests without a prompt")
            continue
        requests.append(
            TraceRequest(
                at_s=record.started_us / 1e6,
                num_tokens=record.prompt_tokens,
                output_tokens=record.output_tokens,
                names=np.asarray(names.of(record), dtype=np.int64),
                session=f"{record.tenant}\x00{record.user}",
                cached_tokens=record.cache_hit_tokens,
            )
        )
    if len(marked) < len(records):
        ignored.count(
            "requests without marks, shorter than a block: taken as sharing nothing", len(records) - len(marked)
        )
    imported = ImportedLog(
        requests=tuple(requests), counted="logged", bytes_per_token=0.0, has_times=True, ignored=ignored
    )
    return imported, size


def _block_size(records: Iterable[UsageRecord]) -> int:
    """The block size that fits nearly all records: N blocks and T tokens mean T / (N + 1) to T / N tokens per block."""
    votes: Counter[int] = Counter()
    spans = []
    for record in records:
        num_blocks = _num_blocks(record)
        if num_blocks:
            spans.append((record.prompt_tokens // (num_blocks + 1) + 1, record.prompt_tokens // num_blocks))
    for low, high in sorted(spans, key=lambda span: span[1] - span[0])[:1000]:
        votes.update(range(low, min(high, _BLOCK_SIZE_MAX, low + 4096) + 1))
    if not votes:
        raise InvalidRequest("no block size fits the marks of prompts in the records: give --unit-tokens")
    most = max(votes.values())
    fitting = [size for size, number in votes.items() if number == most]
    return next((size for size in sorted(fitting) if size & (size - 1) == 0), min(fitting))


def _num_blocks(record: UsageRecord) -> int:
    return int(record.prompt_marks.partition(":")[0]) if record.prompt_marks else 0


@dataclass(slots=True)
class _Names:
    """Names for the records' blocks. by_mark: (blocks, mark) to the names of the latest prompt with this mark."""

    block_size: int
    by_mark: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def of(self, record: UsageRecord) -> list[int]:
        num_blocks = min(_num_blocks(record), record.prompt_tokens // self.block_size)
        places = [(place, prompt_marks.mark_at(record.prompt_marks, place)) for place in _places(record)]
        # 1. Find the earlier prompt that shares most marks, and the number of blocks that are certainly shared.
        known: list[int] = []
        shared = 0
        for place, mark in reversed(places):
            if (place, mark) in self.by_mark:
                known, shared = self.by_mark[place, mark], place
                break
        # 2. Blocks that were hit had been stored, so they were shared, even if marks do not show it.
        shared = max(shared, min(record.cache_hit_tokens // self.block_size, len(known)) if known else 0)
        names = known[: min(shared, num_blocks)]
        # 3. The other blocks are new.
        for index in range(len(names), num_blocks):
            text = f"{record.source}\x00{record.event_id}\x00{index}".encode()
            names.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> (64 - NAME_BITS))
        for place, mark in places:
            if place <= num_blocks:
                self.by_mark[place, mark] = names
        return names


def _places(record: UsageRecord) -> list[int]:
    return prompt_marks.places(_num_blocks(record))
