"""The ledger's end, and the entries about to be appended to it. This module knows payloads and hashes, but no files."""

from __future__ import annotations

from dataclasses import dataclass, field

from antefix.errors import InvalidRequest
from antefix_billing.adjustment import Adjusted, Adjustment, Change
from antefix_billing.ledger_files import Settled
from antefix_billing.ledger_format import (
    FLAG_BATCH_START,
    GENESIS,
    PAYLOAD_BYTES_MAX,
    Entry,
    EntryKind,
    chain_hash,
    pack_entry,
)
from antefix_billing.ledger_index import EntryPlace
from antefix_billing.usage_record import OpenEntry, UsageRecord


@dataclass(slots=True)
class LedgerTail:
    """The end of the ledger: its last entry's number and hash, and the contents of its last segment."""

    sequence: int = 0
    hash: bytes = GENESIS
    segment: int = 1
    offset: int = 0
    places: dict[str, EntryPlace] = field(default_factory=dict)
    unsettled: dict[str, OpenEntry] = field(default_factory=dict)

    def note_open(self, entry: OpenEntry) -> None:
        self.unsettled[entry.key] = entry

    def note_settled(self, key: str, sequence: int, offset: int) -> None:
        self.unsettled.pop(key, None)
        self.places[key] = EntryPlace(sequence=sequence, segment=self.segment, offset=offset)

    def note_adjusted(self, key: str, sequence: int, offset: int) -> None:
        self.places[key] = EntryPlace(sequence=sequence, segment=self.segment, offset=offset)

    def note(self, entry: Entry) -> None:
        if entry.kind is EntryKind.OPEN:
            self.note_open(OpenEntry.from_payload(entry.payload))
        elif entry.kind is EntryKind.ADJUST:
            self.note_adjusted(Adjustment.from_payload(entry.payload).key, entry.sequence, entry.offset)
        elif entry.kind is EntryKind.SETTLE:
            self.note_settled(UsageRecord.from_payload(entry.payload).key, entry.sequence, entry.offset)


class LedgerBatch:
    """Entries to be written together in one write. The ledger's tail changes only in `accept`, once the entries are
    durable.
    """

    def __init__(self, tail: LedgerTail) -> None:
        self._tail = tail
        self._sequence, self._hash = tail.sequence, tail.hash
        self._notes: list[tuple[OpenEntry | Settled | Adjusted, int]] = []
        self._last: dict[str, OpenEntry | Settled | Adjusted] = {}
        self._settled: dict[str, Settled] = {}
        self.data = bytearray()

    def unsettled(self, key: str) -> OpenEntry | None:
        if isinstance(self._last.get(key), Settled):
            return None
        opened = self._last.get(key) or self._tail.unsettled.get(key)
        return opened if isinstance(opened, OpenEntry) else None

    def settled(self, key: str) -> Settled | None:
        return self._settled.get(key)

    def open(self, item: OpenEntry) -> OpenEntry:
        self._put(EntryKind.OPEN, item.to_payload())
        self._note(item.key, item, 0)
        return item

    def settle(self, item: UsageRecord) -> Settled:
        previous, offset = self._hash, self._tail.offset + len(self.data)
        self._put(EntryKind.SETTLE, item.to_payload())
        settled = Settled(sequence=self._sequence, hash=self._hash, previous_hash=previous, record=item)
        self._note(item.key, settled, offset)
        self._settled[item.key] = settled
        return settled

    def adjusted(self, key: str) -> Adjusted | None:
        standing = self._last.get(key)
        return standing if isinstance(standing, Adjusted) else None

    def adjust(self, item: Adjustment) -> Adjusted:
        previous, offset = self._hash, self._tail.offset + len(self.data)
        self._put(EntryKind.ADJUST, item.to_payload())
        adjusted = Adjusted(sequence=self._sequence, hash=self._hash, previous_hash=previous, adjustment=item)
        self._note(item.key, adjusted, offset)
        return adjusted

    def change(self, item: Change) -> Change:
        self._put(EntryKind.CHANGE, item.to_payload())
        return item

    def _note(self, key: str, note: OpenEntry | Settled | Adjusted, offset: int) -> None:
        self._notes.append((note, offset))
        self._last[key] = note

    def _put(self, kind: EntryKind, payload: bytes) -> None:
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise InvalidRequest(
                f"a ledger entry may have at most {PAYLOAD_BYTES_MAX} bytes, this entry has {len(payload)}"
            )
        flags = 0 if self.data else FLAG_BATCH_START
        self._sequence += 1
        self._hash = chain_hash(self._hash, self._sequence, kind, payload)
        self.data += pack_entry(self._sequence, kind, flags, self._hash, payload)

    def accept(self) -> None:
        tail = self._tail
        for note, offset in self._notes:
            if isinstance(note, OpenEntry):
                tail.note_open(note)
            elif isinstance(note, Adjusted):
                tail.note_adjusted(note.adjustment.key, note.sequence, offset)
            else:
                tail.note_settled(note.record.key, note.sequence, offset)
        tail.sequence, tail.hash = self._sequence, self._hash
        tail.offset += len(self.data)
