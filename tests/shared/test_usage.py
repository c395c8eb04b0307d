"""One form of what a request used, whole on the wire and in the bill."""

from __future__ import annotations

from antefix.miss_reason import MissReason
from antefix.restore_report import RestoreReport
from antefix.usage import Usage
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
