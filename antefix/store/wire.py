"""Payload messages on the wire without protobuf's copies: its bytes fields cost a copy and an allocation each way.

A message whose payload field comes last is the protobuf encoding of its other fields, the payload's tag and length, and
the payload. Written and read here as such, it is the same bytes that protobuf would make, so any gRPC client can talk
to the store, and ours need not parse megabytes.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from antefix.errors import InvalidRequest
from antefix.v1 import kvstore_pb2

_LENGTH_DELIMITED: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}
_CHECKSUM: Final = struct.Struct("<Q")
GET_RESPONSE_DATA: Final = kvstore_pb2.GetResponse.DATA_FIELD_NUMBER
PUT_REQUEST_DATA: Final = kvstore_pb2.PutRequest.DATA_FIELD_NUMBER

M = TypeVar("M")

# Bytes objects that are filled after they were made, which the C API provides for: until the first reference leaves
# this module nobody has hashed, compared or shared them.
_new_bytes: Final = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
_address_of: Final = ctypes.pythonapi.PyBytes_AsString
_address_of.restype = ctypes.c_void_p
_address_of.argtypes = (ctypes.py_object,)


@dataclass(frozen=True, slots=True)
class Piece(Generic[M]):
    """A message and, beside it, the content of its `data` field."""

    message: M
    data: memoryview


class BlankMessage:
    """A GetResponse whose payload is still to be read, straight into the bytes that gRPC will send.

    gRPC takes nothing but bytes objects, and joining them from parts would copy every payload once more. Until `finish`
    only the owner has it.
    """

    def __init__(self, message: kvstore_pb2.GetResponse, payload_bytes: int) -> None:
        """message: all but payload and checksum; its checksum must not be 0, which proto3 leaves out."""
        head = head_of(message, GET_RESPONSE_DATA, payload_bytes)
        nbytes = len(head) + payload_bytes
        self._raw: bytes = _new_bytes(None, nbytes)
        self._view = memoryview((ctypes.c_char * nbytes).from_address(_address_of(self._raw))).cast("B")
        self._view[: len(head)] = head
        # The last field before the payload's tag and length.
        self._checksum_at = len(head) - len(_tag_and_length(GET_RESPONSE_DATA, payload_bytes)) - _CHECKSUM.size
        self.payload = self._view[len(head) :]

    def finish(self, checksum: int) -> bytes:
        """The message; its payload is not to be written to any more."""
        _CHECKSUM.pack_into(self._view, self._checksum_at, checksum)
        return self._raw


def head_of(message: Any, field: int, payload_bytes: int) -> bytes:
    """What stands before the payload, which is field number `field` of the message and its last."""
    head: bytes = message.SerializeToString() + _tag_and_length(field, payload_bytes)
    return head


def _tag_and_length(field: int, nbytes: int) -> bytes:
    varint = bytearray([field << 3 | _LENGTH_DELIMITED])
    while nbytes > 0x7F:
        varint.append(nbytes & 0x7F | 0x80)
        nbytes >>= 7
    varint.append(nbytes)
    return bytes(varint)


def unpack_get_response(raw: bytes) -> Piece[kvstore_pb2.GetResponse]:
    head, data = _split(raw, GET_RESPONSE_DATA)
    return Piece(kvstore_pb2.GetResponse.FromString(head), data)


def pack_put_request(piece: Piece[kvstore_pb2.PutRequest]) -> bytes:
    return b"".join((head_of(piece.message, PUT_REQUEST_DATA, piece.data.nbytes), piece.data))


def unpack_put_request(raw: bytes) -> Piece[kvstore_pb2.PutRequest]:
    head, data = _split(raw, PUT_REQUEST_DATA)
    return Piece(kvstore_pb2.PutRequest.FromString(head), data)


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
