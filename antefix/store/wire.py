"""Payload messages on the wire without protobuf's copies: its bytes fields cost a copy and an allocation each way.

A message whose payload field comes last is the protobuf encoding of its other fields, the payload's tag and length, and
the payload. Written and read here as such, it is the same bytes that protobuf would make, so any gRPC client can talk
to the store, and ours need not parse megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from antefix.errors import InvalidRequest
from antefix.v1 import kvstore_pb2

_LENGTH_DELIMITED: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}
GET_RESPONSE_DATA: Final = kvstore_pb2.GetResponse.DATA_FIELD_NUMBER
PUT_REQUEST_DATA: Final = kvstore_pb2.PutRequest.DATA_FIELD_NUMBER

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Piece(Generic[M]):
    """A message and, beside it, the content of its `data` field; a piece to be sent may be in several parts."""

    message: M
    data: memoryview
    more: tuple[memoryview, ...] = ()


def pack_get_response(piece: Piece[kvstore_pb2.GetResponse]) -> bytes:
    return _pack(piece, GET_RESPONSE_DATA)


def unpack_get_response(raw: bytes) -> Piece[kvstore_pb2.GetResponse]:
    head, data = _split(raw, GET_RESPONSE_DATA)
    return Piece(kvstore_pb2.GetResponse.FromString(head), data)


def pack_put_request(piece: Piece[kvstore_pb2.PutRequest]) -> bytes:
    return _pack(piece, PUT_REQUEST_DATA)


def unpack_put_request(raw: bytes) -> Piece[kvstore_pb2.PutRequest]:
    head, data = _split(raw, PUT_REQUEST_DATA)
    return Piece(kvstore_pb2.PutRequest.FromString(head), data)


def _pack(piece: Piece[Any], field: int) -> bytes:
    length = piece.data.nbytes + sum(part.nbytes for part in piece.more)
    varint = bytearray([field << 3 | _LENGTH_DELIMITED])
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    varint.append(length)
    return b"".join((piece.message.SerializeToString(), varint, piece.data, *piece.more))


def _split(raw: bytes, field: int) -> tuple[bytes, memoryview]:
    """All before the payload field, and the payload.

    Raises:  InvalidRequest: cut off, or with fields behind the payload, which protobuf's own encoders put last.
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
                    raise InvalidRequest("a payload message must end with its payload")
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
