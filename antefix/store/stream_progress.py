"""The position in a stream of payloads. Checks the messages that arrive, and copies their bytes into buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.record import RecordKind
from antefix.store.payload_wire import Stretch, unpack_get_response
from antefix.store.pieces import piece_checksum
from antefix.store_files.record_format import RECORD_HEADER_BYTES, extent_bytes, payload_checksum
from antefix.store_files.record_header import SEALED_BYTES, plain_record, sealed_part
from antefix.store_files.seal import SealBroken, Seals
from antefix.v1 import kvstore_pb2

# Maps (payload number, payload bytes) to the buffer for that payload.
BufferOf = Callable[[int, int], memoryview]


@dataclass(slots=True)
class Progress:
    """The progress through payloads `hashes`: byte `offset` of payload number `index` comes next. All bytes before this
    position have arrived undamaged.

    seals: if given, only sealed payloads are accepted. tenant: the owner that payloads must then have; empty: any
    owner. sealed: if given, the sealed part of each payload's header is appended to it.
    """

    kind: RecordKind
    hashes: Sequence[bytes]
    fingerprint: bytes
    index: int = 0
    offset: int = 0
    tenant: bytes = b""
    seals: Seals | None = None
    sealed: list[bytes] | None = None
    # The sealed header part of the payload whose bytes are arriving.
    _sealed: bytes = b""

    def accept(self, raw: bytes, buffer: BufferOf) -> None:
        """Check a message of the type GetResponse, and copy its bytes into the buffers.

        Raises:  BlockCorrupt: damaged or out of order.  SealBroken: a record arrived undamaged but its seal is wrong.
                 InvalidRequest: a buffer has another size than its payload.
        """
        got = unpack_get_response(raw)
        begins = (got.first, 0) if isinstance(got, Stretch) else (got.message.index, got.message.offset)
        if begins != (self.index, self.offset):
            raise BlockCorrupt("the store sent the messages of a read out of order")
        if isinstance(got, Stretch):
            self._accept_records(got, buffer)
        else:
            self._accept_piece(got.message, got.data, buffer)

    def _accept_records(self, got: Stretch, buffer: BufferOf) -> None:
        """Accept records as they lie in a segment. The store has not verified these records, so this method does."""
        records, end = got.records, got.records.nbytes
        at = 0
        while at < end:
            if self.index == len(self.hashes):
                raise BlockCorrupt("the store sent more than it was asked for")
            body = at + RECORD_HEADER_BYTES
            head = bytes(records[at:body])
            found = plain_record(
                head,
                got.seed,
                kind=self.kind,
                block_hash=self.hashes[self.index],
                fingerprint=self.fingerprint,
                segment=got.segment,
                offset=got.offset + at,
            )
            if found is None:
                raise BlockCorrupt("the store sent a record with the header of another record")
            payload_bytes, checksum = found
            payload = records[body : body + payload_bytes]
            if payload_checksum(payload) != checksum:
                raise BlockCorrupt("the store sent a record with a wrong checksum")
            into = _buffer_of(self.index, payload_bytes, buffer)
            into[:] = payload
            # Check the copy: it is what the caller uses, and no other process can change it.
            self._check_seal(sealed_part(head), into)
            self.index += 1
            at += extent_bytes(payload_bytes)

    def _accept_piece(self, message: kvstore_pb2.GetResponse, data: memoryview, buffer: BufferOf) -> None:
        """Accept payload bytes that the store has verified."""
        if piece_checksum(data) != message.checksum:
            raise BlockCorrupt("a piece of a payload was damaged on its way from the store")
        seals = _split(message.seals)
        for payload_bytes in message.payload_bytes:
            if self.offset == 0:
                self._sealed = next(seals, b"")
            into = _buffer_of(self.index, payload_bytes, buffer)
            part = data[: payload_bytes - self.offset]
            data = data[part.nbytes :]
            into[self.offset : self.offset + part.nbytes] = part
            self.offset += part.nbytes
            if self.offset == payload_bytes:
                self._check_seal(self._sealed, into)
                self.index, self.offset = self.index + 1, 0

    def _check_seal(self, sealed: bytes, payload: memoryview) -> None:
        if self.seals is not None and not self.seals.holds(
            sealed,
            payload,
            kind=self.kind,
            block_hash=self.hashes[self.index],
            fingerprint=self.fingerprint,
            tenant=self.tenant,
        ):
            raise SealBroken(f"record {self.hashes[self.index].hex()[:16]} came without a valid seal")
        if self.sealed is not None:
            self.sealed.append(sealed)


def _split(seals: bytes) -> Iterator[bytes]:
    return (seals[at : at + SEALED_BYTES] for at in range(0, len(seals), SEALED_BYTES))


def _buffer_of(index: int, payload_bytes: int, buffer: BufferOf) -> memoryview:
    into = buffer(index, payload_bytes)
    if into.nbytes != payload_bytes:
        raise InvalidRequest(f"buffer {index} has {into.nbytes} bytes, the payload {payload_bytes}")
    return into
