from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InternalError, InvalidRequest
from antefix.miss_reason import MissReason
from antefix_billing.usage_record import OpenEntry, Status, UsageRecord
from tests.billing.usage_records import opened, record


def test_no_more_is_hit_than_the_prompt_has():
    with pytest.raises(InternalError, match="cache_miss_tokens is impossible: -1"):
        record(hit=128, miss=72, prompt_tokens=127)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"hit_memory_tokens": 129}, "hit_store_tokens is impossible: -1"),
        ({"cache_write_tokens": 73}, "part of the miss"),
        ({"reasoning_tokens": 11}, "part of the output"),
        ({"last_hit_hash": ""}, "last block"),
        ({"finished_us": 0}, "before it starts"),
        ({"output_tokens": -1}, "output_tokens"),
        ({"price": Decimal("-0.1")}, "negative"),
        ({"status": Status.FAILED, "output_tokens": 0, "reasoning_tokens": 0}, "only if output was given"),
        ({"paid_before": Decimal(1)}, "first attempt"),
        ({"attempt": 0}, "attempt"),
        ({"request_id": ""}, "request id"),
    ],
)
def test_counts_that_contradict_each_other_are_refused(changes, rule):
    with pytest.raises(InternalError, match=rule):
        record(**changes)


def test_a_hit_hash_without_a_hit_is_refused():
    with pytest.raises(InternalError, match="last block"):
        record(hit=0, miss=10, last_hit_hash="ab" * 32)


@given(
    hit=st.integers(0, 1 << 40),
    miss=st.integers(0, 1 << 40),
    price=st.decimals(0, 10**9, places=12),
    request_id=st.text(min_size=1, max_size=50).filter(lambda text: text.isprintable()),
)
def test_payload_gives_the_same_record_back(hit, miss, price, request_id):
    before = record(request_id, hit=hit, miss=miss, price=price)
    after = UsageRecord.from_payload(before.to_payload())
    assert after == before
    assert after.to_payload() == before.to_payload()


@pytest.mark.parametrize(
    ("changes", "rule"), [({"prompt_tokens": 201}, r"hit \+ miss"), ({"hit_store_tokens": 127}, "tiers")]
)
def test_a_stored_record_that_contradicts_itself_is_refused_as_input(changes, rule):
    values = record(hit=128, miss=72).to_dict()
    with pytest.raises(InvalidRequest, match=f"not a usage record: .*{rule}"):
        UsageRecord.from_dict({**values, **changes})


def test_open_entry_survives_its_payload():
    assert OpenEntry.from_payload(opened().to_payload()) == opened()


def test_payload_of_another_version_is_refused():
    with pytest.raises(InvalidRequest, match="version"):
        UsageRecord.from_payload(record().to_payload().replace(b'"v":1', b'"v":2'))


def test_a_reason_that_only_a_newer_worker_knows_is_kept_as_unknown():
    assert MissReason("moved_to_another_planet") is MissReason.UNKNOWN
