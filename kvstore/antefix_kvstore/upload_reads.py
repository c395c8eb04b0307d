"""Reads the records to be uploaded from the store's segments, into buffers that are used repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from antefix.record import Record, RecordKind
from antefix.store.record_source import records_of
from antefix_kvstore.storage_engine import StorageEngine

# A payload lies within one buffer; if the next payload does not fit the rest of a buffer, that rest stays unused.
_BUFFER_BYTES: Final = 8 << 20


class UploadBuffers:
    """Reused memory for the payloads of one segment at a time: fresh memory costs as much as reading into it."""

    def __init__(self) -> None:
        self._blocks: list[memoryview] = []
        self._number = self._at = 0

    def begin(self) -> None:
        """Mark all memory as free again."""
        self._number = self._at = 0

    def take(self, nbytes: int) -> memoryview:
        if nbytes > _BUFFER_BYTES:
            return memoryview(bytearray(nbytes))
        if self._at + nbytes > _BUFFER_BYTES:
            self._number, self._at = self._number + 1, 0
        if self._number == len(self._blocks):
            self._blocks.append(memoryview(bytearray(_BUFFER_BYTES)))
        self._at += nbytes
        return self._blocks[self._number][self._at - nbytes : self._at]


def read_records(
    engine: StorageEngine,
    kind: RecordKind,
    hashes: Sequence[bytes],
    fingerprint: bytes,
    allocate: Callable[[int], memoryview],
) -> Iterator[Record]:
    """The records that can be read.  allocate: returns memory for a payload of the given size."""
    left = list(hashes)
    while left:
        located = engine.reader.locate(kind, left, fingerprint=fingerprint)
        payloads = [allocate(nbytes) for nbytes in located.sizes]
        outcome = engine.reader.fill(located, _into(payloads))
        sealed = [want.sealed for want in located.wanted[: outcome.num_good]]
        records = records_of(sealed, payloads[: outcome.num_good])
        yield from records
        # Continue after a record that is damaged or gone.
        left = left[len(records) + 1 :]


def _into(payloads: Sequence[memoryview]) -> Callable[[int, int], Sequence[memoryview]]:
    return lambda number, _: (payloads[number],)
