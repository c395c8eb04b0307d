"""Writes and reads messages with payloads without protobuf, because protobuf's bytes fields cost a copy and an
allocation in each direction.

A message whose payload field comes last consists of the protobuf encoding of its other fields, the payload's tag and
length, and the payload. The encoding that this module writes and reads is exactly protobuf's. So any gRPC client can
talk to the store, and our client does not parse megabytes with protobuf.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.request_limits import check_request
from antefix.v1 import kvstore_pb2

_LENGTH_DELIMITED: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}
_CHECKSUM: Final = struct.Struct("<Q")
GET_RESPONSE_DATA: Final = kvstore_pb2.GetResponse.DATA_FIELD_NUMBER
GET_RESPONSE_SEALS: Final = kvstore_pb2.GetResponse.SEALS_FIELD_NUMBER
PUT_REQUEST_DATA: Final = kvstore_pb2.PutRequest.DATA_FIELD_NUMBER
# Fields 6 to 9 of a GetResponse, each after its tag, then the tag of the records field. The records' length follows.
_RECORDS_HEAD: Final = struct.Struct("<BIBQBIBQB")
_RECORDS_TAGS: Final = (6 << 3 | 5, 7 << 3 | 1, 8 << 3 | 5, 9 << 3 | 1, 10 << 3 | _LENGTH_DELIMITED)
_RECORDS_BEGIN: Final = bytes(_RECORDS_TAGS[:1])

M = TypeVar("M")

# Makes a bytes object that is filled afterwards. The C API allows that as long as no other code has a reference, so
# no other code has hashed, compared or shared the object.
_new_bytes: Final = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
_address_of: Final = ctypes.pythonapi.PyBytes_AsString
_address_of.restype = ctypes.c_void_p
_address_of.argtypes = (ctypes.py_object,)
_view_of: Final = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.restype = ctypes.py_object
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_PYBUF_WRITE: Final = 0x200


@dataclass(frozen=True, slots=True)
class Piece(Generic[M]):
    """A message without its `data` field, and the content of that field."""

    message: M
    data: memoryview


class BlankMessage:
    """A GetResponse whose payload is still to be read, straight into the bytes that gRPC will send.

    gRPC sends bytes objects only, and joining one from parts would copy every payload once more. Until `finish`, only
    this object's owner holds the bytes.
    """

    __slots__ = ("_raw", "_seals_at", "_view", "payload")

    def __init__(self, head: bytes, payload_bytes: int, *, seals_at: int = 0) -> None:
        """head: the message up to the payload, with the payload's tag and length.  seals_at: see `head_of_piece`."""
        nbytes = len(head) + payload_bytes
        self._seals_at = seals_at
        self._raw: bytes = _new_bytes(None, nbytes)
        # Valid as long as the bytes object lives, which is as long as this object lives.
        self._view: memoryview = _view_of(_address_of(self._raw), nbytes, _PYBUF_WRITE)
        self._view[: len(head)] = head
        self.payload = self._view[len(head) :]

    def finish(self) -> bytes:
        """The message. After this call, the payload of the message must not be written to."""
        return self._raw

    def finish_piece(self, checksum: int, seals: bytes = b"") -> bytes:
        """The finished message of a piece, with its seals, if any, and its checksum, which is the last field before the
        payload's tag.
        """
        self._view[self._seals_at : self._seals_at + len(seals)] = seals
        head_bytes = self._view.nbytes - self.payload.nbytes
        tag_bytes = len(_tag_and_length(GET_RESPONSE_DATA, self.payload.nbytes))
        _CHECKSUM.pack_into(self._view, head_bytes - tag_bytes - _CHECKSUM.size, checksum)
        return self._raw


@dataclass(frozen=True, slots=True)
class Stretch:
    """Unverified records as they lie in a segment, from `offset` on. The first of these records belongs to the hash
    with number `first`.
    """

    first: int
    seed: int
    segment: int
    offset: int
    records: memoryview


def records_head(*, first: int, seed: int, segment: int, offset: int, records_bytes: int) -> bytes:
    """The bytes of a GetResponse that precede its records."""
    tags = _RECORDS_TAGS
    head = _RECORDS_HEAD.pack(tags[0], first, tags[1], seed, tags[2], segment, tags[3], offset, tags[4])
    return head + _varint_of(records_bytes)


def head_of(message: Any, field: int, payload_bytes: int) -> bytes:
    """The bytes of a message that precede its payload. The payload must be the message's last field; its field number
    is `field`.
    """
    head: bytes = message.SerializeToString() + _tag_and_length(field, payload_bytes)
    return head


def head_of_piece(message: Any, payload_bytes: int, seals_bytes: int) -> tuple[bytes, int]:
    """The `head_of` a piece, preceded by room for seals that are not known yet, and the offset of that room."""
    head = head_of(message, GET_RESPONSE_DATA, payload_bytes)
    if not seals_bytes:
        return head, 0
    # Protobuf accepts fields in any order. At the front of the message the seals have a known offset.
    tag = _tag_and_length(GET_RESPONSE_SEALS, seals_bytes)
    return b"".join((tag, bytes(seals_bytes), head)), len(tag)


def _tag_and_length(field: int, nbytes: int) -> bytes:
    return bytes([field << 3 | _LENGTH_DELIMITED]) + _varint_of(nbytes)


def _varint_of(value: int) -> bytes:
    varint = bytearray()
    while value > 0x7F:
        varint.append(value & 0x7F | 0x80)
        value >>= 7
    varint.append(value)
    return bytes(varint)


def unpack_get_response(raw: bytes) -> Piece[kvstore_pb2.GetResponse] | Stretch:
    """Raises:  BlockCorrupt: the message is cut off, or has another layout than this module writes."""
    try:
        if raw[:1] == _RECORDS_BEGIN:
            return _stretch_of(raw)
        head, data = _split(raw, GET_RESPONSE_DATA)
        return Piece(kvstore_pb2.GetResponse.FromString(head), data)
    except (InvalidRequest, DecodeError, struct.error) as err:
        raise BlockCorrupt(f"the store sent a malformed message: {err}") from err


def _stretch_of(raw: bytes) -> Stretch:
    _, first, *tags_and_values, records_tag = _RECORDS_HEAD.unpack_from(raw)
    seed_tag, seed, segment_tag, segment, offset_tag, offset = tags_and_values
    length, at = _varint(raw, _RECORDS_HEAD.size)
    if (seed_tag, segment_tag, offset_tag, records_tag) != _RECORDS_TAGS[1:] or at + length != len(raw):
        raise BlockCorrupt(
            "the store sent a message of records that is incomplete, or has its fields in the wrong order"
        )
    return Stretch(first, seed, segment, offset, memoryview(raw)[at:])


def pack_put_request(piece: Piece[kvstore_pb2.PutRequest]) -> bytes:
    return b"".join((head_of(piece.message, PUT_REQUEST_DATA, piece.data.nbytes), piece.data))


def unpack_put_request(raw: bytes) -> Piece[kvstore_pb2.PutRequest]:
    """Raises:  InvalidRequest, DecodeError: the message is cut off or malformed, or a field breaks its limit."""
    head, data = _split(raw, PUT_REQUEST_DATA)
    message = kvstore_pb2.PutRequest.FromString(head)
    check_request(message)
    return Piece(message, data)


def _split(raw: bytes, field: int) -> tuple[bytes, memoryview]:
    """The bytes before the payload field, and the payload.

    Raises:  InvalidRequest: the message is cut off, or has fields after the payload. Protobuf's own encoders write the
             payload last.
    """
    at = 0
    while at < len(raw):
        start = at
        tag, at = _varint(raw, at)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            length, at = _varint(raw, at)
            if tag >> 3 == field:
                if at + length != len(raw):
                    raise InvalidRequest("a message that carries a payload must end with the payload")
                return raw[:start], memoryview(raw)[at:]
            at += length
        elif wire_type == 0:
            _, at = _varint(raw, at)
        else:
            at += _FIXED_BYTES.get(wire_type, len(raw))
    return raw, memoryview(b"")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(raw) and shift < 64:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise InvalidRequest("a message is cut off")
