"""Payloads in pieces of at most 1 MiB, as the store's streams carry them: cutting, checking, putting together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import xxhash

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.store.api import Buffer, Record, RecordKind
from antefix.store.format import HASH_BYTES
from antefix.store.wire import Piece
from antefix.v1 import kvstore_pb2

PIECE_BYTES: Final = 1 << 20
HASHES_MAX: Final = 16_384


def piece_checksum(data: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(data)


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    return b"".join(hashes)


def split_hashes(joined: bytes) -> list[bytes]:
    """Raises:  InvalidRequest: not a whole number of hashes."""
    if len(joined) % HASH_BYTES:
        raise InvalidRequest(f"{len(joined)} bytes are not a whole number of {HASH_BYTES}-byte hashes")
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]


def response_pieces(
    first: int, payloads: Sequence[Buffer], *, offset: int = 0
) -> Iterator[Piece[kvstore_pb2.GetResponse]]:
    """Payloads number `first` and on as pieces, from byte `offset` of the first one."""
    parts: list[memoryview] = []
    sizes: list[int] = []
    room, index, start = PIECE_BYTES, first, offset
    for number, payload in enumerate(payloads, start=first):
        view = memoryview(payload).cast("B")
        at = offset if number == first else 0
        while at < view.nbytes:
            if not parts:
                index, start = number, at
            part = view[at : at + room]
            parts.append(part)
            sizes.append(view.nbytes)
            at += part.nbytes
            room -= part.nbytes
            if room == 0:
                yield _response_piece(index, start, sizes, parts)
                parts, sizes, room = [], [], PIECE_BYTES
    if parts:
        yield _response_piece(index, start, sizes, parts)


def _response_piece(
    index: int, offset: int, sizes: list[int], parts: list[memoryview]
) -> Piece[kvstore_pb2.GetResponse]:
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    message = kvstore_pb2.GetResponse(index=index, offset=offset, payload_bytes=sizes, checksum=checksum.intdigest())
    return Piece(message, parts[0], tuple(parts[1:]))


def request_pieces(records: Iterable[Record]) -> Iterator[Piece[kvstore_pb2.PutRequest]]:
    """The pieces of a put."""
    for record in records:
        view = memoryview(record.payload).cast("B")
        header = kvstore_pb2.RecordHeader(
            kind=record.kind.value,  # type: ignore[arg-type]
            hash=record.hash,
            parent=record.parent,
            fingerprint=record.fingerprint,
            position=record.position,
            payload_bytes=view.nbytes,
            tenant=record.tenant,
            ttl_s=record.ttl_s,
            cost_s=record.cost_s,
        )
        for start in range(0, max(view.nbytes, 1), PIECE_BYTES):
            data = view[start : start + PIECE_BYTES]
            message = kvstore_pb2.PutRequest(
                header=None if start else header, offset=start, checksum=piece_checksum(data)
            )
            yield Piece(message, data)


class RecordAssembler:
    """Puts the pieces of a put together again; holds one record at a time."""

    def __init__(self, record_bytes_max: int) -> None:
        self._record_bytes_max = record_bytes_max
        self._header: kvstore_pb2.RecordHeader | None = None
        self._payload = bytearray()
        self._filled = 0

    def add(self, piece: Piece[kvstore_pb2.PutRequest]) -> Record | None:
        """The record that this piece completes, if it does.

        Raises:  InvalidRequest: pieces out of order, or too many bytes.  BlockCorrupt: a piece's checksum is wrong.
        """
        message, data = piece.message, piece.data
        if message.HasField("header"):
            self._begin(message.header)
        if self._header is None:
            raise InvalidRequest("a put must begin with a record's header")
        if data.nbytes > PIECE_BYTES or message.offset != self._filled:
            raise InvalidRequest(f"expected a piece of at most {PIECE_BYTES} bytes at offset {self._filled}")
        if self._filled + data.nbytes > len(self._payload):
            raise InvalidRequest(f"more bytes than the {len(self._payload)} announced")
        if piece_checksum(data) != message.checksum:
            raise BlockCorrupt("a piece was damaged on its way to the store")
        self._payload[self._filled : self._filled + data.nbytes] = data
        self._filled += data.nbytes
        return self._finish() if self._filled == len(self._payload) else None

    def end(self) -> None:
        """Raises:  InvalidRequest: the stream ended inside a record."""
        if self._header is not None:
            raise InvalidRequest(f"the put ended after {self._filled} of {len(self._payload)} bytes")

    def _begin(self, header: kvstore_pb2.RecordHeader) -> None:
        self.end()
        if not 0 < header.payload_bytes <= self._record_bytes_max:
            raise InvalidRequest(f"a payload must have 1 to {self._record_bytes_max} bytes, has {header.payload_bytes}")
        self._header, self._payload, self._filled = header, bytearray(header.payload_bytes), 0

    def _finish(self) -> Record:
        header, payload = self._header, self._payload
        assert header is not None
        self._header, self._payload, self._filled = None, bytearray(), 0
        return Record(
            kind=kind_of(header.kind),
            hash=header.hash,
            parent=header.parent,
            fingerprint=header.fingerprint,
            position=header.position,
            payload=payload,
            tenant=header.tenant,
            ttl_s=header.ttl_s if header.HasField("ttl_s") else None,
            cost_s=header.cost_s,
        )


def kind_of(number: int) -> RecordKind:
    """Raises:  InvalidRequest: no such kind."""
    try:
        return RecordKind(number)
    except ValueError as err:
        raise InvalidRequest(f"{number} is not a record kind") from err
