"""Payloads in pieces of at most 1 MiB, as the store's streams carry them: cutting, checking, putting together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import xxhash

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.store.api import Buffer, Record, RecordKind
from antefix.store.format import HASH_BYTES
from antefix.store.wire import GET_RESPONSE_DATA, BlankMessage, Piece, head_of
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


def messages_of(payload: Buffer, number: int, *, offset: int = 0) -> list[bytes]:
    """The messages of a Get for one payload that is in memory: the one of hash `number`."""
    view = memoryview(payload).cast("B")
    pieces = OutgoingPieces([view.nbytes], first=number, offset=offset)
    at = 0
    for part in pieces.parts_of(0, view.nbytes):
        part[:] = view[at : at + part.nbytes]
        at += part.nbytes
    return pieces.messages(1)


@dataclass(slots=True)
class _Cut:
    """One piece of a stream: where it begins, and which payload bytes it has, by payload size and number."""

    index: int
    offset: int
    sizes: list[int] = field(default_factory=list)
    nbytes: int = 0
    blank: BlankMessage | None = None

    def message(self, checksum: int) -> kvstore_pb2.GetResponse:
        return kvstore_pb2.GetResponse(
            index=self.index, offset=self.offset, payload_bytes=self.sizes, checksum=checksum
        )

    def head(self, checksum: int) -> bytes:
        return head_of(self.message(checksum), GET_RESPONSE_DATA, self.nbytes)


class OutgoingPieces:
    """The messages of a Get that carry payloads number `first` and on, from byte `offset` of the first one.

    Laid out before the payloads are there, so that these are read straight to where gRPC takes them from: `parts_of`
    says where. When they are verified, `messages` completes them.
    """

    def __init__(self, sizes: Sequence[int], *, first: int, offset: int = 0) -> None:
        """sizes: payload bytes of each.  Raises:  InvalidRequest: `offset` lies behind the first payload."""
        if sizes and not 0 <= offset <= sizes[0]:
            raise InvalidRequest(f"offset {offset} lies outside a payload of {sizes[0]} bytes")
        self._sizes = sizes
        self._offset = offset
        self._cuts = _cut(sizes, first, offset)
        for cut in self._cuts:
            # A fixed64 takes as much room whatever it holds, but proto3 leaves a zero out.
            cut.blank = BlankMessage(len(cut.head(1)), cut.nbytes)
        self._parts = self._place()

    def parts_of(self, number: int, _: int) -> Sequence[memoryview]:
        """Where payload number `number`, counted from the first one here, goes; see reader.Parts."""
        return self._parts[number]

    def messages(self, num_good: int) -> list[bytes]:
        """The messages of the leading `num_good` payloads; what comes after them is not sent."""
        left = max(0, sum(self._sizes[:num_good]) - self._offset)
        out = []
        for cut in self._cuts:
            if left <= 0:
                break
            assert cut.blank is not None
            if cut.nbytes <= left:
                out.append(_finish(cut, cut.blank))
            else:
                out.append(_finish(*_shortened(cut, left)))
            left -= cut.nbytes
        return out

    def _place(self) -> list[list[memoryview]]:
        rooms = deque(cut.blank.payload for cut in self._cuts if cut.blank is not None)
        parts = []
        for number, nbytes in enumerate(self._sizes):
            mine: list[memoryview] = []
            if number == 0 and self._offset:
                # Read to be verified with the rest, not to be sent again.
                mine.append(memoryview(bytearray(self._offset)))
                nbytes -= self._offset
            while nbytes:
                room = rooms.popleft()
                mine.append(room[:nbytes])
                if room.nbytes > nbytes:
                    rooms.appendleft(room[nbytes:])
                nbytes -= mine[-1].nbytes
            parts.append(mine)
        return parts


def _cut(sizes: Sequence[int], first: int, offset: int) -> list[_Cut]:
    cuts: list[_Cut] = []
    room = 0
    for number, nbytes in enumerate(sizes):
        at = offset if number == 0 else 0
        while at < nbytes:
            if room == 0:
                cuts.append(_Cut(first + number, at))
                room = PIECE_BYTES
            taken = min(room, nbytes - at)
            cuts[-1].sizes.append(nbytes)
            cuts[-1].nbytes += taken
            at += taken
            room -= taken
    return cuts


def _finish(cut: _Cut, blank: BlankMessage) -> bytes:
    checksum = piece_checksum(blank.payload)
    head = cut.head(checksum)
    if checksum == 0:
        # One in 2^64: without the field the head is shorter than the room left for it.
        return head + bytes(blank.payload)
    return blank.finish(head)


def _shortened(cut: _Cut, nbytes: int) -> tuple[_Cut, BlankMessage]:
    """The leading bytes of a piece, whose last payload turned out bad."""
    assert cut.blank is not None
    short = _Cut(cut.index, cut.offset, nbytes=nbytes)
    end = -cut.offset
    for size in cut.sizes:
        if end >= nbytes:
            break
        short.sizes.append(size)
        end += size
    blank = BlankMessage(len(short.head(1)), nbytes)
    blank.payload[:] = cut.blank.payload[:nbytes]
    return short, blank


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
