"""Is the ledger whole, and is every billed hit supported by the store's own log? Reads only; trusts neither side.

A hit of a record is supported when its last block was stored before the request ended, and, for tokens billed from the
store's tier, read between the request's start and end. Tokens from a worker's memory were stored before, not read then.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from antefix.errors import AntefixError
from antefix.usage.ledger_files import Settled, read_entries, settled_of
from antefix.usage.ledger_format import EntryKind
from antefix.usage.record import OpenEntry, UsageRecord
from antefix.usage.storelog import StoreEventKind, read_store_log

# Store and router have a clock each; hosts of one deployment are kept within a second of one another by NTP.
CLOCK_SLACK_US = 2_000_000
_NUM_EXAMPLES_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verification found. head: last sequence number and its hash, to be kept elsewhere: a ledger cut at its end
    is still a good chain, but no longer has that entry. unsupported_hits is None where no store log was given."""

    records: int
    open_requests: int
    chain_ok: bool
    chain_error: str
    head_sequence: int
    head_hash: str
    head_ok: bool
    duplicates: int
    unsupported_hits: int | None
    unsupported_examples: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.chain_ok and self.head_ok and not self.duplicates and not self.unsupported_hits

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


@dataclass(slots=True)
class _Chain:
    """The ledger as read."""

    settled: list[Settled]
    open_requests: int = 0
    sequence: int = 0
    hash: bytes = b""
    anchor_seen: bool = False
    error: str = ""


def verify(
    ledger: Path,
    *,
    store_log: Path | None = None,
    anchor: tuple[int, str] | None = None,
    slack_us: int = CLOCK_SLACK_US,
) -> Verdict:
    """Read the whole ledger and, where given, the store's log.

    anchor: a head that an earlier run reported; the entry must still be there with that hash.
    """
    chain = _read(ledger, anchor)
    unsupported = None if store_log is None else _unsupported(chain.settled, store_log, slack_us)
    return Verdict(
        records=len(chain.settled),
        open_requests=chain.open_requests,
        chain_ok=not chain.error,
        chain_error=chain.error,
        head_sequence=chain.sequence,
        head_hash=chain.hash.hex(),
        head_ok=anchor is None or chain.anchor_seen,
        duplicates=_num_duplicates(chain.settled),
        unsupported_hits=None if unsupported is None else len(unsupported),
        unsupported_examples=tuple(unsupported[:_NUM_EXAMPLES_MAX]) if unsupported else (),
    )


def _read(ledger: Path, anchor: tuple[int, str] | None) -> _Chain:
    chain, opened = _Chain(settled=[]), set[str]()
    try:
        for previous, entry in read_entries(ledger):
            chain.sequence, chain.hash = entry.sequence, entry.hash
            chain.anchor_seen = chain.anchor_seen or (entry.sequence, entry.hash.hex()) == anchor
            if entry.kind is EntryKind.OPEN:
                opened.add(OpenEntry.from_payload(entry.payload).key)
                continue
            settled = settled_of(previous, entry)
            opened.discard(settled.record.key)
            chain.settled.append(settled)
    except AntefixError as err:
        chain.error = str(err)
    chain.open_requests = len(opened)
    return chain


def _num_duplicates(settled: list[Settled]) -> int:
    """Records beyond the one that each attempt may have, and charges beyond the one that each request may have."""
    seen: set[str] = set()
    final: set[str] = set()
    num_duplicates = 0
    for item in settled:
        record = item.record
        twice = record.event_id in seen or (record.is_final and record.key in final)
        num_duplicates += twice
        seen.add(record.event_id)
        if record.is_final:
            final.add(record.key)
    return num_duplicates


def _unsupported(settled: list[Settled], store_log: Path, slack_us: int) -> list[str]:
    """Event ids of records whose hit the store's log does not support."""
    hits = [item.record for item in settled if item.record.cache_hit_tokens]
    wanted = {record.last_hit_hash for record in hits}
    stored: dict[str, int] = {}
    reads: defaultdict[str, list[int]] = defaultdict(list)
    for event in read_store_log(store_log):
        if event.hash not in wanted:
            continue
        if event.kind is StoreEventKind.STORED:
            stored[event.hash] = min(event.time_us, stored.get(event.hash, event.time_us))
        else:
            reads[event.hash].append(event.time_us)
    return [record.event_id for record in hits if not _is_supported(record, stored, reads, slack_us)]


def _is_supported(
    record: UsageRecord, stored: dict[str, int], reads: defaultdict[str, list[int]], slack_us: int
) -> bool:
    stored_us = stored.get(record.last_hit_hash)
    if stored_us is None or stored_us > record.finished_us + slack_us:
        return False
    if record.hit_store_tokens == 0:
        return True
    start, stop = record.started_us - slack_us, record.finished_us + slack_us
    return any(start <= read_us <= stop for read_us in reads.get(record.last_hit_hash, ()))
