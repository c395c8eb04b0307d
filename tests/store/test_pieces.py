"""Pieces of a stream are laid out before the payloads are read, and the payloads are then read into them."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.record import Record, RecordKind
from antefix.store.payload_wire import Piece, pack_put_request, unpack_put_request
from antefix.store.pieces import PIECE_BYTES, OutgoingPieces, RecordAssembler, messages_of, request_pieces
from antefix.store.stream_progress import Progress
from antefix.v1 import kvstore_pb2

SIZES = st.lists(st.integers(1, PIECE_BYTES * 2), min_size=1, max_size=5)


def progress(index: int = 0, offset: int = 0) -> Progress:
    return Progress(RecordKind.BLOCK, (), b"", index, offset)


def payloads_of(sizes: list[int]) -> list[bytes]:
    return [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]


def sent(payloads: list[bytes], num_good: int, *, first: int = 0, offset: int = 0) -> list[bytes]:
    """The messages of a stream, whose payloads are read in place one after the other, as a reader does."""
    pieces = OutgoingPieces([len(payload) for payload in payloads], first=first, offset=offset)
    messages: list[bytes] = []
    for number, payload in enumerate(payloads):
        at = 0
        for part in pieces.parts_of(number):
            part[:] = payload[at : at + part.nbytes]
            at += part.nbytes
        assert at == len(payload)
        if number >= num_good:
            break
        messages += pieces.messages(number + 1, last=False)
    return messages + pieces.messages(num_good, last=True)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, data=st.data())
def test_what_is_received_is_what_was_sent_up_to_the_first_bad_payload(sizes: list[int], data: st.DataObject) -> None:
    num_good = data.draw(st.integers(0, len(sizes)))
    offset = data.draw(st.integers(0, sizes[0] - 1))
    payloads = payloads_of(sizes)
    into = [bytearray(size) for size in sizes]
    done = progress(3, offset)
    for message in sent(payloads, num_good, first=3, offset=offset):
        done.accept(message, lambda number, _: memoryview(into[number - 3]))
    assert (done.index, done.offset) == ((3 + num_good, 0) if num_good else (3, offset))
    if num_good:
        assert into[0][offset:] == payloads[0][offset:]
        assert [bytes(buffer) for buffer in into[1:num_good]] == payloads[1:num_good]
    assert not any(any(buffer) for buffer in into[num_good:])


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES)
def test_messages_are_the_bytes_that_protobuf_would_make(sizes: list[int]) -> None:
    """Any gRPC client can read them, and they carry at most 1 MiB of payload."""
    for raw in sent(payloads_of(sizes), len(sizes)):
        message = kvstore_pb2.GetResponse.FromString(raw)
        assert message.SerializeToString() == raw
        assert 0 < len(message.data) <= PIECE_BYTES


def test_a_payload_in_memory_is_cut_alike() -> None:
    payload = random.Random(0).randbytes(2_500_001)
    into = bytearray(len(payload))
    done = progress(2, PIECE_BYTES)
    for message in messages_of(payload, 2, offset=PIECE_BYTES):
        done.accept(message, lambda *_: memoryview(into))
    assert into[PIECE_BYTES:] == payload[PIECE_BYTES:]


def test_an_offset_behind_the_payload_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="outside a payload"):
        OutgoingPieces([10], first=0, offset=11)


def test_a_damaged_or_misplaced_piece_is_refused() -> None:
    (message,) = sent([b"payload"], 1)
    into = memoryview(bytearray(7))
    with pytest.raises(BlockCorrupt, match="damaged"):
        progress().accept(message[:-1] + b"?", lambda *_: into)
    with pytest.raises(BlockCorrupt, match="out of order"):
        progress(1).accept(message, lambda *_: into)
    with pytest.raises(InvalidRequest, match="has 6 bytes, the payload 7"):
        progress().accept(message, lambda *_: into[:6])


def test_a_message_that_was_handed_over_is_not_kept() -> None:
    """A stream's memory holds only what it reads ahead, not what it has sent."""
    pieces = OutgoingPieces([PIECE_BYTES] * 4, first=0)
    for number in range(4):
        view = pieces.parts_of(number)[0]
        view[:8] = b"8 bytes!"
        del view
        (message,) = pieces.messages(number + 1, last=False)
        # Only the name here and the argument refer to the message.
        assert sys.getrefcount(message) == 2


def put(payload: bytes) -> list[bytes]:
    """The messages of a put of one record."""
    record = Record(
        kind=RecordKind.BLOCK, hash=b"h" * 32, parent=b"p" * 32, fingerprint=b"f" * 32, position=128, payload=payload
    )
    return [pack_put_request(piece) for piece in request_pieces([record])]


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES)
def test_what_is_put_is_what_arrives(sizes: list[int]) -> None:
    assembler = RecordAssembler(4 * PIECE_BYTES)
    arrived = [assembler.add(unpack_put_request(raw)) for payload in payloads_of(sizes) for raw in put(payload)]
    assembler.end()
    assert [bytes(record.payload) for record in arrived if record is not None] == payloads_of(sizes)


def test_a_record_in_one_piece_is_not_copied() -> None:
    (raw,) = put(random.Random(0).randbytes(100_000))
    record = RecordAssembler(PIECE_BYTES).add(unpack_put_request(raw))
    assert record is not None
    assert isinstance(record.payload, memoryview)
    assert record.payload.obj is raw


def test_a_small_payload_does_not_keep_a_large_message() -> None:
    (raw,) = put(b"payload")
    # An unknown field, which has no limit.
    padding = bytes([15 << 3 | 2, 0xC0, 0x84, 0x3D]) + bytes(1_000_000)
    record = RecordAssembler(PIECE_BYTES).add(unpack_put_request(padding + raw))
    assert record is not None
    assert record.payload == b"payload"
    assert isinstance(record.payload, bytearray)


@pytest.mark.parametrize("size", [100_000, PIECE_BYTES + 5])
def test_pieces_of_a_put_that_do_not_fit_are_refused(size: int) -> None:
    first, *rest = (unpack_put_request(raw) for raw in put(random.Random(0).randbytes(size)))
    damaged = Piece(first.message, memoryview(bytes([first.data[0] ^ 1]) + bytes(first.data[1:])))
    with pytest.raises(BlockCorrupt, match="damaged"):
        RecordAssembler(4 * PIECE_BYTES).add(damaged)
    with pytest.raises(InvalidRequest, match="must have 1 to"):
        RecordAssembler(size - 1).add(first)
    assembler = RecordAssembler(4 * PIECE_BYTES)
    if rest:
        assert assembler.add(first) is None
        with pytest.raises(InvalidRequest, match="ended after"):
            assembler.end()
        with pytest.raises(InvalidRequest, match="ended after"):
            assembler.add(first)
    else:
        assert assembler.add(first) is not None
        later = Piece(kvstore_pb2.PutRequest(offset=size, checksum=1), memoryview(b"x"))
        with pytest.raises(InvalidRequest, match="begin with"):
            assembler.add(later)
