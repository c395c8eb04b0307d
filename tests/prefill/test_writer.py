"""The writer of a request's records when the store fails in unexpected ways."""

import asyncio

import pytest

from antefix.errors import InvalidRequest
from antefix.record import PutResult, Record, RecordKind, Refusal, RefusalReason
from antefix_prefill.record_writer import PENDING_BYTES_MAX, RecordWriter
from antefix_prefill.worker.store_counters import StoreCounters
from tests.waiting import AT_MOST_S


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

    await asyncio.wait_for(produce(), AT_MOST_S)
    with pytest.raises(ZeroDivisionError):
        await writer.flush()
    assert writer.num_blocks_written == 0


class Refusing:
    """A store that stores nothing: it refuses records, or fails."""

    def __init__(self, outcome):
        self.outcome = outcome

    async def put(self, records):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return PutResult(num_stored=0, num_existing=0, refused={record.hash: self.outcome for record in records})


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (InvalidRequest("a name is too long"), "InvalidRequest: a name is too long"),
        (Refusal(RefusalReason.FULL, "the store is full: no room"), "the store is full: no room"),
    ],
)
async def test_why_something_was_not_stored_is_kept_for_the_record(outcome, error):
    counters = StoreCounters()
    writer = RecordWriter(Refusing(outcome), counters)
    shared = {"kind": RecordKind.BLOCK, "parent": b"p" * 32, "fingerprint": b"f" * 32, "payload": memoryview(b"x")}
    for number in (1, 2):
        await writer.put(Record(hash=bytes([number]) * 32, position=number, **shared))
    await writer.flush()
    assert (writer.error, writer.num_blocks_written) == (error, 0)
