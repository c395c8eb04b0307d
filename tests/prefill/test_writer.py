"""The writer of a request's records, when what it writes to breaks in ways that nobody foresaw."""

import asyncio

import pytest

from antefix.record import Record, RecordKind
from antefix_prefill.record_writer import PENDING_BYTES_MAX, RecordWriter
from antefix_prefill.worker.store_counters import StoreCounters


class Buggy:
    async def put(self, records):
        await asyncio.sleep(0.01)
        raise ZeroDivisionError("a bug of ours")


async def test_a_bug_while_writing_holds_up_no_producer_and_comes_out_at_the_end():
    writer = RecordWriter(Buggy(), StoreCounters())
    payload = memoryview(bytes(PENDING_BYTES_MAX // 4))
    shared = {"kind": RecordKind.BLOCK, "parent": b"p" * 32, "fingerprint": b"f" * 32, "payload": payload}

    async def produce():
        for number in range(1, 9):
            await writer.put(Record(hash=bytes([number]) * 32, position=number, **shared))

    await asyncio.wait_for(produce(), 10)
    with pytest.raises(ZeroDivisionError):
        await writer.flush()
    assert writer.num_blocks_written == 0
