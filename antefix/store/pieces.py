"""Cuts payloads into pieces of at most 1 MiB for the store's streams, checks the pieces, and joins them again."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import xxhash

from antefix.block import HashKind, Labels
from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.record import Buffer, Record, RecordKind
from antefix.store.payload_wire import BlankMessage, Piece, head_of_piece
from antefix.store_files.record_format import HASH_BYTES
from antefix.store_files.record_header import SEALED_BYTES
from antefix.v1 import kvstore_pb2

PIECE_BYTES: Final = 1 << 20
HASHES_MAX: Final = 16_384
# A placeholder for a checksum that is not known yet. Protobuf would leave a 0 out of the message.
_ANY_CHECKSUM: Final = 1


def piece_checksum(data: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(data)


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    return b"".join(hashes)


def split_hashes(joined: bytes) -> list[bytes]:
    """Raises:  InvalidRequest: the bytes are not a whole number of hashes."""
    if len(joined) % HASH_BYTES:
        raise InvalidRequest(
            f"the hashes have {len(joined)} bytes, which is not a whole number of {HASH_BYTES}-byte hashes"
        )
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]


def messages_of(payload: Buffer, number: int, *, offset: int = 0, sealed: bytes = b"") -> list[bytes]:
    """The messages of a Get for one payload in memory, which belongs to the requested hash with number `number`.

    sealed: the sealed part of the record's header, if the caller asked for it.
    """
    view = memoryview(payload).cast("B")
    pieces = OutgoingPieces([view.nbytes], first=number, offset=offset, has_seals=bool(sealed))
    pieces.note_sealed(0, sealed)
    at = 0
    for part in pieces.parts_of(0):
        part[:] = view[at : at + part.nbytes]
        at += part.nbytes
    return pieces.messages(1, last=True)


@dataclass(slots=True)
class _Cut:
    """One piece of a stream: where it starts, and which bytes of which payloads it carries."""

    index: int
    offset: int
    sizes: list[int] = field(default_factory=list)
    nbytes: int = 0
    blank: BlankMessage | None = None

    @property
    def beginning(self) -> range:
        """The numbers of the stream's payloads that begin in this piece."""
        return range(self.index + (self.offset > 0), self.index + len(self.sizes))

    def draw_blank(self, *, has_seals: bool) -> BlankMessage:
        """The piece's message, with its payload, checksum and seals still to be filled in."""
        message = kvstore_pb2.GetResponse(
            index=self.index, offset=self.offset, payload_bytes=self.sizes, checksum=_ANY_CHECKSUM
        )
        head, seals_at = head_of_piece(message, self.nbytes, len(self.beginning) * SEALED_BYTES if has_seals else 0)
        self.blank = BlankMessage(head, self.nbytes, seals_at=seals_at)
        return self.blank


class OutgoingPieces:
    """The messages of a Get that carry the payloads from number `first` on, starting at byte `offset` of that payload.

    The messages are allocated before the payloads are read, so that payloads are read straight into the messages:
    `parts_of` gives the buffers. When payloads have been verified, `messages` returns the messages that they complete.
    """

    def __init__(self, sizes: Sequence[int], *, first: int, offset: int = 0, has_seals: bool = False) -> None:
        """sizes: the size of each payload in bytes.  has_seals: whether each payload's sealed header part is sent.

        Raises:  InvalidRequest: `offset` lies after the end of the first payload.
        """
        if sizes and not 0 <= offset <= sizes[0]:
            raise InvalidRequest(f"offset {offset} lies outside a payload of {sizes[0]} bytes")
        self._sizes = sizes
        self._offset = offset
        self._first = first
        self._has_seals = has_seals
        self._sealed: dict[int, bytes] = {}
        # Where each payload ends, counted from the first byte that is sent.
        self._ends = [end - offset for end in accumulate(sizes, initial=0)]
        cuts = _cut(sizes, first, offset)
        self._unsent = deque(cuts)
        self._unplaced = deque(cuts)
        self._room = memoryview(b"")
        self._num_placed = 0
        self._sent_bytes = 0

    def parts_of(self, number: int) -> list[memoryview]:
        """The buffers for payload `number`, counted from this object's first one. The payloads must be asked for once
        each, in order.
        """
        assert number == self._num_placed
        self._num_placed += 1
        parts: list[memoryview] = []
        nbytes = self._sizes[number]
        if number == 0 and self._offset:
            # The bytes before the offset were sent earlier. They are read again only to verify the whole payload.
            parts.append(memoryview(bytearray(self._offset)))
            nbytes -= self._offset
        while nbytes:
            if not self._room:
                self._room = self._unplaced.popleft().draw_blank(has_seals=self._has_seals).payload
            parts.append(self._room[:nbytes])
            nbytes -= parts[-1].nbytes
            self._room = self._room[parts[-1].nbytes :]
        return parts

    def note_sealed(self, number: int, sealed: bytes) -> None:
        """Set the sealed header part of payload `number`, counted from this object's first one,
        once it has been read.
        """
        if self._has_seals:
            self._sealed[self._first + number] = sealed

    def messages(self, num_good: int, *, last: bool) -> list[bytes]:
        """The messages that the leading `num_good` payloads complete, without those returned before.

        last: no further payload is good, so the end of the last good payload is sent too, in a shorter piece.
        """
        end = self._ends[num_good]
        out = []
        while self._unsent and self._sent_bytes + self._unsent[0].nbytes <= end:
            cut = self._unsent.popleft()
            out.append(self._finish(cut))
            self._sent_bytes += cut.nbytes
        if last and self._sent_bytes < end:
            out.append(self._finish(self._shortened(self._unsent.popleft(), end - self._sent_bytes)))
        return out

    def _finish(self, cut: _Cut) -> bytes:
        assert cut.blank is not None, "payloads are read before they are sent"
        seals = b"".join([self._sealed.pop(number) for number in cut.beginning]) if self._has_seals else b""
        return cut.blank.finish_piece(piece_checksum(cut.blank.payload), seals)

    def _shortened(self, cut: _Cut, nbytes: int) -> _Cut:
        """The first `nbytes` bytes of a piece whose last payload failed a check."""
        assert cut.blank is not None
        short = _Cut(cut.index, cut.offset, nbytes=nbytes)
        end = -cut.offset
        for size in cut.sizes:
            if end >= nbytes:
                break
            short.sizes.append(size)
            end += size
        short.draw_blank(has_seals=self._has_seals).payload[:] = cut.blank.payload[:nbytes]
        return short


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


def request_pieces(records: Iterable[Record]) -> Iterator[Piece[kvstore_pb2.PutRequest]]:
    """The pieces that carry these records in a put."""
    for record in records:
        view = memoryview(record.payload).cast("B")
        header = kvstore_pb2.RecordHeader(
            kind=record.kind.value,  # type: ignore[arg-type]
            hash=record.hash,
            parent=record.parent,
            fingerprint=record.fingerprint,
            position=record.position,
            payload_bytes=view.nbytes,
            ttl_s=record.ttl_s,
            cost_s=record.cost_s,
            parent_elsewhere=record.parent_elsewhere,
            **(_v1_fields(record) if record.version == 1 else _v2_fields(record)),
        )
        for start in range(0, max(view.nbytes, 1), PIECE_BYTES):
            data = view[start : start + PIECE_BYTES]
            message = kvstore_pb2.PutRequest(
                header=None if start else header, offset=start, checksum=piece_checksum(data)
            )
            yield Piece(message, data)


def _v1_fields(record: Record) -> dict[str, Any]:
    return {"tenant": record.tenant.decode()}


def _v2_fields(record: Record) -> dict[str, Any]:
    return {
        "owner": record.tenant,
        "key_generation": record.generation,
        "num_cards": record.labels.num_cards,
        "hash_kind": int(record.labels.hash_kind),
        "family": record.labels.family,
        "salt": record.salt,
        "mac": record.mac,
    }


class RecordAssembler:
    """Joins the pieces of a put into records. The joiner holds one record at a time.

    A record that arrives in one piece, as blocks do, is not copied: its payload is a view of the message.
    """

    def __init__(self, record_bytes_max: int) -> None:
        self._record_bytes_max = record_bytes_max
        self._header: kvstore_pb2.RecordHeader | None = None
        self._payload: bytearray | memoryview = bytearray()
        self._payload_bytes = 0
        self._filled = 0

    def add(self, piece: Piece[kvstore_pb2.PutRequest]) -> Record | None:
        """The record that this piece completes; None if the piece completes none.

        Raises:  InvalidRequest: pieces out of order, or too many bytes.  BlockCorrupt: a piece's checksum is wrong.
        """
        message, data = piece.message, piece.data
        if message.HasField("header"):
            self._begin(message.header)
        if self._header is None:
            raise InvalidRequest("a put must begin with the header of a record")
        if data.nbytes > PIECE_BYTES or message.offset != self._filled:
            raise InvalidRequest(
                f"expected a piece of the payload of at most {PIECE_BYTES} bytes at offset {self._filled}"
            )
        if self._filled + data.nbytes > self._payload_bytes:
            raise InvalidRequest(
                f"the put sent more than the {self._payload_bytes} bytes of payload that its header announced"
            )
        if piece_checksum(data) != message.checksum:
            raise BlockCorrupt("a piece of a payload was damaged on its way to the store")
        if data.nbytes == self._payload_bytes and _is_most_of_its_message(data):
            self._payload = data
        else:
            self._payload = self._payload or bytearray(self._payload_bytes)
            self._payload[self._filled : self._filled + data.nbytes] = data
        self._filled += data.nbytes
        return self._finish() if self._filled == self._payload_bytes else None

    def end(self) -> None:
        """Raises:  InvalidRequest: the stream ended inside a record."""
        if self._header is not None:
            raise InvalidRequest(f"the put ended after {self._filled} of the payload's {self._payload_bytes} bytes")

    def _begin(self, header: kvstore_pb2.RecordHeader) -> None:
        self.end()
        if not 0 < header.payload_bytes <= self._record_bytes_max:
            raise InvalidRequest(f"a payload must have 1 to {self._record_bytes_max} bytes, has {header.payload_bytes}")
        self._header, self._payload_bytes, self._filled = header, header.payload_bytes, 0

    def _finish(self) -> Record:
        header, payload = self._header, self._payload
        assert header is not None
        self._header, self._payload, self._filled = None, bytearray(), 0
        record = Record(
            kind=kind_of(header.kind),
            hash=header.hash,
            parent=header.parent,
            fingerprint=header.fingerprint,
            position=header.position,
            payload=payload,
            ttl_s=header.ttl_s if header.HasField("ttl_s") else None,
            cost_s=header.cost_s,
            parent_elsewhere=header.parent_elsewhere,
        )
        if not header.owner:
            return dataclasses.replace(record, version=1, tenant=header.tenant.encode())
        labels = Labels(
            family=header.family, hash_kind=_hash_kind_of(header.hash_kind), num_cards=max(1, header.num_cards)
        )
        return dataclasses.replace(
            record,
            tenant=header.owner,
            labels=labels,
            generation=header.key_generation,
            salt=header.salt,
            mac=header.mac,
        )


def _is_most_of_its_message(data: memoryview) -> bool:
    """Whether a view of `data` keeps hardly more bytes in memory than the view itself has. The limit on waiting writes
    counts payload bytes only, so it would not count the rest of the message.
    """
    message: Any = data.obj
    return 8 * (len(message) - data.nbytes) <= data.nbytes


def kind_of(number: int) -> RecordKind:
    """Raises:  InvalidRequest: no record kind has this number."""
    try:
        return RecordKind(number)
    except ValueError as err:
        raise InvalidRequest(f"the number {number} stands for no kind of record") from err


def _hash_kind_of(number: int) -> HashKind:
    """Raises:  InvalidRequest: no kind of block hashes has this number."""
    try:
        return HashKind(number)
    except ValueError as err:
        raise InvalidRequest(f"the number {number} stands for no kind of block hash") from err
