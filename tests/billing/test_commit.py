import asyncio

import pytest

from antefix.errors import InvalidRequest, Unavailable
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled
from antefix_billing.usage_commit import LedgerWriter
from tests.billing.usage_records import opened, record


async def test_requests_that_end_together_share_a_sync(tmp_path):
    writer = LedgerWriter(Ledger(tmp_path))
    await asyncio.gather(*(writer.settle(record(f"r{number}")) for number in range(200)))
    assert writer.counters.entries == 200
    assert writer.counters.batches < 50
    await writer.close()
    assert len(list(read_settled(tmp_path))) == 200


async def test_a_cancelled_caller_is_billed_all_the_same(tmp_path):
    writer = LedgerWriter(Ledger(tmp_path))
    task = asyncio.create_task(writer.settle(record("a")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await writer.close()
    assert [item.record.request_id for item in read_settled(tmp_path)] == ["a"]


async def test_one_bad_entry_does_not_fail_its_neighbours(tmp_path):
    writer = LedgerWriter(Ledger(tmp_path))
    bad = record("bad", detail="x" * 70_000)
    results = await asyncio.gather(writer.settle(record("a")), writer.settle(bad), return_exceptions=True)
    assert results[0].record.request_id == "a"
    assert isinstance(results[1], InvalidRequest)
    await writer.close()


async def test_a_ledger_that_cannot_write_fails_every_waiter(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    writer = LedgerWriter(ledger)

    def refuse(items):
        raise Unavailable("disk")

    monkeypatch.setattr(ledger, "append", refuse)
    results = await asyncio.gather(writer.open(opened("a")), writer.settle(record("b")), return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    await writer.close()
