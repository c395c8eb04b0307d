"""Where a stream of payloads stands. Checks what arrives, and puts it where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.record import RecordKind
from antefix.store.payload_wire import Stretch, unpack_get_response
from antefix.store.pieces import piece_checksum
from antefix.store_files.record_format import RECORD_HEADER_BYTES, extent_bytes, payload_checksum, plain_record
from antefix.v1 import kvstore_pb2

# Payload number and bytes to where it goes.
BufferOf = Callable[[int, int], memoryview]


@dataclass(slots=True)
class Progress:
    """Of payloads `hashes`: byte `offset` of number `index` comes next, and all before it is right."""

    kind: RecordKind
    hashes: Sequence[bytes]
    fingerprint: bytes
    index: int = 0
    offset: int = 0

    def accept(self, raw: bytes, buffer: BufferOf) -> None:
        """Check a message, a GetResponse, and put its bytes where they belong.

        Raises:  BlockCorrupt: damaged or out of order.  InvalidRequest: a buffer has another size than its payload.
        """
        got = unpack_get_response(raw)
        begins = (got.first, 0) if isinstance(got, Stretch) else (got.message.index, got.message.offset)
        if begins != (self.index, self.offset):
            raise BlockCorrupt("the store sent a message out of order")
        if isinstance(got, Stretch):
            self._accept_records(got, buffer)
        else:
            self._accept_piece(got.message, got.data, buffer)

    def _accept_records(self, got: Stretch, buffer: BufferOf) -> None:
        """Records as they lie in a segment, which nobody has verified yet."""
        records, end = got.records, got.records.nbytes
        at = 0
        while at < end:
            if self.index == len(self.hashes):
                raise BlockCorrupt("the store sent more than it was asked for")
            body = at + RECORD_HEADER_BYTES
            found = plain_record(
                bytes(records[at:body]),
                got.seed,
                kind=self.kind,
                block_hash=self.hashes[self.index],
                fingerprint=self.fingerprint,
                segment=got.segment,
                offset=got.offset + at,
            )
            if found is None:
                raise BlockCorrupt("a record came with a header that is not its own")
            payload_bytes, checksum = found
            payload = records[body : body + payload_bytes]
            if payload_checksum(payload) != checksum:
                raise BlockCorrupt("a record came with a wrong checksum")
            _buffer_of(self.index, payload_bytes, buffer)[:] = payload
            self.index += 1
            at += extent_bytes(payload_bytes)

    def _accept_piece(self, message: kvstore_pb2.GetResponse, data: memoryview, buffer: BufferOf) -> None:
        """Payload bytes that the store has verified."""
        if piece_checksum(data) != message.checksum:
            raise BlockCorrupt("a piece was damaged on its way from the store")
        for payload_bytes in message.payload_bytes:
            into = _buffer_of(self.index, payload_bytes, buffer)
            part = data[: payload_bytes - self.offset]
            data = data[part.nbytes :]
            into[self.offset : self.offset + part.nbytes] = part
            self.offset += part.nbytes
            if self.offset == payload_bytes:
                self.index, self.offset = self.index + 1, 0


def _buffer_of(index: int, payload_bytes: int, buffer: BufferOf) -> memoryview:
    into = buffer(index, payload_bytes)
    if into.nbytes != payload_bytes:
        raise InvalidRequest(f"buffer {index} has {into.nbytes} bytes, the payload {payload_bytes}")
    return into
