"""Records that arrive as they lie in a segment: each is verified before it counts, and no wrong byte is kept."""

from __future__ import annotations

import random
import struct

import pytest

from antefix.errors import AntefixError, BlockCorrupt, InvalidRequest
from antefix.record import RecordKind
from antefix.store.payload_wire import BlankMessage, records_head
from antefix.store.stream_progress import Progress
from antefix.store_files.record_format import (
    RECORD_HEADER_BYTES,
    Codec,
    RecordFlag,
    extent_bytes,
    payload_checksum,
)
from antefix.store_files.record_header import RecordHeader, pack_record_header
from antefix.v1 import kvstore_pb2

SEED, SEGMENT, START = 0x1122334455667788, 7, 4096
HASHES = [bytes([number]) * 32 for number in (1, 2, 3)]
FINGERPRINT = b"F" * 32
PAYLOADS = [random.Random(number).randbytes(nbytes) for number, nbytes in enumerate((100, 61, 77))]


def record(number: int, at: int, **changes: object) -> bytes:
    """Header and payload as they would lie at that offset."""
    payload = PAYLOADS[number]
    fields: dict[str, object] = {
        "payload_checksum": payload_checksum(payload),
        "hash": HASHES[number],
        "parent": b"P" * 32,
        "fingerprint": FINGERPRINT,
        "segment": SEGMENT,
        "offset": at,
        "stored_bytes": len(payload),
        "payload_bytes": len(payload),
        "position": 128,
        "created_ms": 1,
        "expires_ms": 0,
        "cost_us": 0,
        "kind": RecordKind.BLOCK,
        "codec": Codec.RAW,
        "flags": RecordFlag.NONE,
        "tenant": bytes(24),
    }
    return pack_record_header(RecordHeader(**{**fields, **changes}), SEED) + payload  # type: ignore[arg-type]


def stretch(*records: bytes) -> bytes:
    """Neighbouring records of a segment, padded to 8 bytes except after the last one."""
    padded = [raw.ljust(extent_bytes(len(raw) - RECORD_HEADER_BYTES), b"\0") for raw in records[:-1]]
    return b"".join((*padded, records[-1]))


def three() -> bytes:
    at, records = START, []
    for number, payload in enumerate(PAYLOADS):
        records.append(record(number, at))
        at += extent_bytes(len(payload))
    return stretch(*records)


def message(records: bytes, *, first: int = 0, segment: int = SEGMENT, offset: int = START) -> bytes:
    head = records_head(first=first, seed=SEED, segment=segment, offset=offset, records_bytes=len(records))
    blank = BlankMessage(head, len(records))
    blank.payload[:] = records
    return blank.finish()


def buffers() -> list[bytearray]:
    return [bytearray(len(payload)) for payload in PAYLOADS]


def receive(raw: bytes, into: list[bytearray], *, hashes: list[bytes] = HASHES) -> Progress:
    done = Progress(RecordKind.BLOCK, hashes, FINGERPRINT)
    done.accept(raw, lambda number, _: memoryview(into[number]))
    return done


def test_records_arrive_as_payloads() -> None:
    into = buffers()
    done = receive(message(three()), into)
    assert (done.index, done.offset) == (3, 0)
    assert into == PAYLOADS


def test_a_message_of_records_is_the_bytes_that_protobuf_would_make() -> None:
    raw = message(three(), first=0)
    parsed = kvstore_pb2.GetResponse.FromString(raw)
    assert parsed.SerializeToString() == raw
    assert (parsed.first_record, parsed.seed, parsed.segment, parsed.segment_offset) == (0, SEED, SEGMENT, START)
    assert parsed.records == three()


def test_every_flipped_bit_of_a_message_is_refused_or_harmless() -> None:
    """Whatever bit flips, received records are right, and a buffer has either its payload or nothing."""
    whole = message(three())
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        into = buffers()
        done = Progress(RecordKind.BLOCK, HASHES, FINGERPRINT)
        try:
            done.accept(bytes(raw), lambda number, _, into=into: memoryview(into[number]))
        except AntefixError:
            assert done.index < 3
        else:
            # Padding between records has no effect.
            assert done.index == 3
            assert len(whole) - len(three()) < at
        assert into[: done.index] == PAYLOADS[: done.index]
        assert not any(any(buffer) for buffer in into[done.index :])


def test_a_message_that_is_cut_off_anywhere_is_refused() -> None:
    whole = message(three())
    for nbytes in range(len(whole)):
        into = buffers()
        with pytest.raises(AntefixError):
            receive(whole[:nbytes], into)
    for nbytes in range(1, len(three())):
        # The sender cut the record, so the length before it is right.
        into = buffers()
        done = Progress(RecordKind.BLOCK, HASHES, FINGERPRINT)
        cut = message(three()[:nbytes])
        try:
            done.accept(cut, lambda number, _, into=into: memoryview(into[number]))
        except BlockCorrupt:
            pass
        else:
            # The cut is after a whole record, perhaps within its padding.
            assert done.index > 0
        assert into[: done.index] == PAYLOADS[: done.index]
        assert not any(any(buffer) for buffer in into[done.index :])


@pytest.mark.parametrize(
    "changes",
    [
        {"hash": HASHES[1]},
        {"fingerprint": b"G" * 32},
        {"kind": RecordKind.CHECKPOINT},
        {"segment": SEGMENT + 1},
        {"offset": START + 8},
        {"codec": Codec.PLANES_ZSTD},
        {"flags": RecordFlag.ENCRYPTED},
        {"payload_bytes": 99},
        {"stored_bytes": 99, "payload_bytes": 99},
        {"payload_checksum": b"?" * 16},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_sound_record_that_is_not_the_one_asked_for_is_refused(changes: dict[str, object]) -> None:
    """Each header's checksum is right, but it is the wrong record, in the wrong place or of the wrong kind."""
    into = buffers()
    with pytest.raises(BlockCorrupt):
        receive(message(record(0, START, **changes)), into)
    assert not any(into[0])


def test_records_of_another_store_are_refused() -> None:
    with pytest.raises(BlockCorrupt):
        raw = bytearray(message(three()))
        struct.pack_into("<Q", raw, 6, SEED ^ 1)
        receive(bytes(raw), buffers())


def test_records_in_another_order_or_too_many_are_refused() -> None:
    with pytest.raises(BlockCorrupt, match="out of order"):
        receive(message(three(), first=1), buffers())
    with pytest.raises(BlockCorrupt, match="header"):
        receive(message(three()), buffers(), hashes=[HASHES[1], HASHES[0], HASHES[2]])
    with pytest.raises(BlockCorrupt, match="more than"):
        receive(message(three()), buffers(), hashes=HASHES[:2])


def test_a_buffer_of_another_size_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidRequest, match="has 99 bytes, the payload 100"):
        receive(message(three()), [bytearray(99)])


def test_records_that_begin_inside_a_payload_are_refused() -> None:
    done = Progress(RecordKind.BLOCK, HASHES, FINGERPRINT, 0, 50)
    with pytest.raises(BlockCorrupt, match="out of order"):
        done.accept(message(three()), lambda *_: memoryview(bytearray(100)))
