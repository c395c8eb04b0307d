"""A request's usage has one form, which is complete on the wire and in the bill."""

from __future__ import annotations

from dataclasses import replace

import pytest

from antefix.errors import InternalError
from antefix.miss_reason import MissReason
from antefix.restore_report import RestoreReport
from antefix.usage import Evidence, Usage
from antefix.v1 import usage_pb2
from antefix.wire import usage_from_wire, usage_to_wire
from antefix_billing.usage_record import Status, UsageRecord

USED = Usage(
    prompt_tokens=200,
    cache_hit_tokens=128,
    hit_memory_tokens=64,
    cache_write_tokens=64,
    output_tokens=10,
    reasoning_tokens=4,
    output_write_tokens=8,
    replayed_tokens=30,
    restore_plan="replay",
    last_hit_hash="ab" * 32,
    miss_reason=MissReason.FIRST_SEEN,
    ttft_us=1_234_567,
    worker="10.0.0.1:8000",
    expected_hit_tokens=192,
)


def test_the_wire_keeps_every_field() -> None:
    message = usage_pb2.Usage.FromString(usage_to_wire(USED, request_id="r", total_s=2.5).SerializeToString())
    assert usage_from_wire(message) == USED
    assert (message.cache_miss_tokens, message.written_tokens, message.request_id, message.total_s) == (
        72,
        72,
        "r",
        2.5,
    )


def test_a_record_keeps_every_field() -> None:
    record = UsageRecord.of(
        USED, request_id="r", source="s", model="m", status=Status.STOP, started_us=1, finished_us=2
    )
    for name in Usage.__slots__:
        assert getattr(record, name) == getattr(USED, name), name
    assert (record.cache_miss_tokens, record.hit_store_tokens) == (72, 64)
    assert UsageRecord.from_payload(record.to_payload()) == record


def test_a_restores_report_says_no_more_written_than_missed() -> None:
    report = RestoreReport(hit_tokens=128, miss_tokens=72, written_tokens=192, last_hit_hash=b"\xab" * 32)
    assert (report.usage(200).cache_write_tokens, report.usage(200).last_hit_hash) == (72, "ab" * 32)


@pytest.mark.parametrize("evidence", [Evidence.REPORTED, Evidence.EXPECTED])
def test_a_reported_hit_has_no_hash_and_is_kept(evidence: Evidence) -> None:
    used = replace(USED, last_hit_hash="", evidence=evidence, hit_memory_tokens=128)
    of_the_end = {
        "request_id": "r",
        "source": "s",
        "model": "m",
        "status": Status.STOP,
        "started_us": 1,
        "finished_us": 2,
    }
    record = UsageRecord.of(used, **of_the_end)
    assert UsageRecord.from_payload(record.to_payload()) == record
    assert usage_from_wire(usage_to_wire(used)) == used
    assert not record.is_proved_hit
    with pytest.raises(InternalError, match="proved hit"):
        UsageRecord.of(replace(used, last_hit_hash="ab" * 32), **of_the_end)
    with pytest.raises(InternalError, match="proved hit"):
        UsageRecord.of(replace(used, evidence=Evidence.PROVED), **of_the_end)


def test_what_is_proved_has_the_bytes_that_it_always_had() -> None:
    of_the_end = {
        "request_id": "r",
        "source": "s",
        "model": "m",
        "status": Status.STOP,
        "started_us": 1,
        "finished_us": 2,
    }
    payload = UsageRecord.of(replace(USED, worker="", expected_hit_tokens=0), **of_the_end).to_payload()
    assert not any(name in payload for name in (b"evidence", b"worker", b"expected"))
