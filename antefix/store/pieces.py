"""Payloads in pieces of at most 1 MiB, as the store's streams carry them: cutting, checking, putting together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import xxhash

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.store.api import Buffer, Record, RecordKind
from antefix.store.format import HASH_BYTES
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


def response_pieces(index: int, payload: Buffer, *, offset: int = 0) -> Iterator[kvstore_pb2.GetResponse]:
    """The pieces of one payload from `offset` on."""
    view = memoryview(payload).cast("B")
    for start in range(offset, view.nbytes, PIECE_BYTES):
        data = bytes(view[start : start + PIECE_BYTES])
        yield kvstore_pb2.GetResponse(
            index=index, offset=start, payload_bytes=view.nbytes, checksum=piece_checksum(data), data=data
        )


def request_pieces(records: Iterable[Record]) -> Iterator[kvstore_pb2.PutRequest]:
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
            data = bytes(view[start : start + PIECE_BYTES])
            yield kvstore_pb2.PutRequest(
                header=None if start else header, offset=start, checksum=piece_checksum(data), data=data
            )


class RecordAssembler:
    """Puts the pieces of a put together again; holds one record at a time."""

    def __init__(self, record_bytes_max: int) -> None:
        self._record_bytes_max = record_bytes_max
        self._header: kvstore_pb2.RecordHeader | None = None
        self._payload = bytearray()
        self._filled = 0

    def add(self, piece: kvstore_pb2.PutRequest) -> Record | None:
        """The record that this piece completes, if it does.

        Raises:  InvalidRequest: pieces out of order, or too many bytes.  BlockCorrupt: a piece's checksum is wrong.
        """
        if piece.HasField("header"):
            self._begin(piece.header)
        if self._header is None:
            raise InvalidRequest("a put must begin with a record's header")
        if len(piece.data) > PIECE_BYTES or piece.offset != self._filled:
            raise InvalidRequest(f"expected a piece of at most {PIECE_BYTES} bytes at offset {self._filled}")
        if self._filled + len(piece.data) > len(self._payload):
            raise InvalidRequest(f"more bytes than the {len(self._payload)} announced")
        if piece_checksum(piece.data) != piece.checksum:
            raise BlockCorrupt("a piece was damaged on its way to the store")
        self._payload[self._filled : self._filled + len(piece.data)] = piece.data
        self._filled += len(piece.data)
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
