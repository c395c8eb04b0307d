"""Shrinks the stores' logs: drops the lines that no billed hit needs. The result of `antefix usage verify` stays the
same.

Of each old file it keeps three kinds of lines: when each block was first stored; reads of a block during a request
that, by the ledgers, hit that block; and the lines around a moment when a clock was set back. Files keep their names
and the order of their lines, and each is replaced as a whole. Compaction should run after `prune`, so that lines needed
only by pruned records are dropped as well.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

from antefix.private_file import write_private
from antefix.store_files.hit_log import QUIET_S, StoreEvent, StoreEventKind, log_files, read_log_file
from antefix_billing.hit_evidence import CLOCK_SLACK_US, STEP_SLACK_US
from antefix_billing.ledger_files import read_settled

# When a clock is set back, a request that ran at that moment may have been served up to this long before or after.
_AFTER_STEP_US: Final = 15 * 60_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    num_files: int
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def compact(logs: Sequence[Path], ledgers: Sequence[Path], *, before_us: int) -> Compacted:
    """Compact the log files that ended before `before_us` and to which no process appends any more
    (`hit_log.QUIET_S`).
    """
    needed = _NeededReads.of(ledgers)
    first_stored = _first_stored(path for log in logs for path in log_files(log))
    num_files = bytes_before = bytes_after = 0
    for path in (path for log in logs for path in log_files(log)):
        found = path.stat()
        if found.st_mtime >= min(before_us / 1e6, time.time() - QUIET_S):
            continue
        text = "".join(_kept(read_log_file(path), needed, first_stored))
        if len(text) < found.st_size:
            write_private(path, text)
            num_files += 1
            bytes_before, bytes_after = bytes_before + found.st_size, bytes_after + len(text)
    return Compacted(num_files=num_files, bytes_before=bytes_before, bytes_after=bytes_after)


@dataclass(frozen=True, slots=True)
class _NeededReads:
    """When requests ran that hit a given block in the store: their start times in order, and for each start the latest
    end of all requests that started by then.
    """

    starts: dict[str, list[int]]
    ends: dict[str, list[int]]

    @classmethod
    def of(cls, ledgers: Sequence[Path]) -> _NeededReads:
        spans: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for record in (item.record for ledger in ledgers for item in read_settled(ledger)):
            if record.is_proved_hit and record.hit_store_tokens:
                spans[record.last_hit_hash].append((record.started_us, record.finished_us))
        starts: dict[str, list[int]] = {}
        ends: dict[str, list[int]] = {}
        for name, pairs in spans.items():
            pairs.sort()
            starts[name] = [start - CLOCK_SLACK_US for start, _ in pairs]
            ends[name] = []
            for _, end in pairs:
                ends[name].append(max(end + CLOCK_SLACK_US, ends[name][-1] if ends[name] else 0))
        return cls(starts, ends)

    def has(self, name: str, time_us: int) -> bool:
        index = bisect_right(self.starts.get(name, []), time_us) - 1
        return index >= 0 and self.ends[name][index] >= time_us


def _first_stored(paths: Iterable[Path]) -> dict[str, int]:
    """When each block was first stored."""
    first: dict[str, int] = {}
    for event in (event for path in paths for event in read_log_file(path)):
        if event.kind is StoreEventKind.STORED:
            first[event.hash] = min(event.time_us, first.get(event.hash, event.time_us))
    return first


def _kept(events: Iterator[StoreEvent], needed: _NeededReads, first_stored: dict[str, int]) -> Iterator[str]:
    """The lines of one file that are kept. Some kept lines list fewer blocks than before."""
    previous = ""
    previous_us = after_step_us = 0
    is_previous_kept = True
    for (time_us, kind), line in groupby(events, key=lambda event: (event.time_us, event.kind)):
        names = [event.hash for event in line]
        is_step = time_us < previous_us - CLOCK_SLACK_US
        if is_step:
            after_step_us = time_us
            if not is_previous_kept:
                yield previous
        is_near_step = after_step_us and after_step_us - STEP_SLACK_US <= time_us <= after_step_us + _AFTER_STEP_US
        if kind is StoreEventKind.STORED:
            kept = [name for name in names if first_stored[name] == time_us]
        else:
            kept = [name for name in names if is_near_step or needed.has(name, time_us)]
        previous, previous_us = f"{time_us} {kind.value} {','.join(names)}\n", time_us
        is_previous_kept = bool(kept) or is_step
        if is_previous_kept:
            yield f"{time_us} {kind.value} {','.join(kept or names)}\n"
