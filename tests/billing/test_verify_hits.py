"""Each billed hit must name a block that the store says it stored before, and read then."""

import json
import time

import pytest

from antefix.store_files.hit_log import StoreLog, read_store_log
from antefix_billing.ledger import Ledger
from antefix_billing.reconcile import verify
from tests.billing.usage_records import record

HASH = bytes.fromhex("ab" * 32)
MINUTE_US = 60_000_000


@pytest.fixture
def settle(tmp_path):
    def settle(*records):
        ledger = Ledger(tmp_path / "ledger")
        ledger.append(records)
        ledger.close()
        return verify(tmp_path / "ledger", store_log=tmp_path / "log")

    return settle


@pytest.fixture
def log(tmp_path):
    log = StoreLog(tmp_path / "log")
    yield log
    log.close()


def now_us():
    return time.time_ns() // 1000


def test_a_hit_that_was_stored_and_read_is_supported(settle, log):
    log.stored([HASH])
    log.read([HASH])
    assert settle(record(started_us=now_us() - 1000, finished_us=now_us())).ok


def test_a_hit_that_was_never_stored_is_not(settle, log):
    log.read([HASH])
    verdict = settle(record(started_us=now_us(), finished_us=now_us()))
    assert verdict.unsupported_hits == 1 and verdict.unsupported_examples == ("acme:r1",) and not verdict.ok


def test_a_hit_that_was_not_read_then_is_not(settle, log):
    log.stored([HASH])
    log.read([HASH])
    later = now_us() + MINUTE_US
    assert settle(record(started_us=later, finished_us=later)).unsupported_hits == 1


def test_a_hit_before_it_was_stored_is_not(settle, log):
    log.stored([HASH])
    log.read([HASH])
    earlier = now_us() - MINUTE_US
    assert settle(record(started_us=earlier, finished_us=earlier)).unsupported_hits == 1


def test_a_hit_in_a_workers_memory_needs_no_read(settle, log):
    log.stored([HASH])
    later = now_us() + MINUTE_US
    in_memory = record(started_us=later, finished_us=later, hit_memory_tokens=128)
    assert settle(in_memory).unsupported_hits == 0


def test_misses_need_no_support(settle, log):
    log.stored([])
    assert settle(record(hit=0, miss=9)).unsupported_hits == 0


def test_the_store_log_rotates_and_skips_a_torn_line(tmp_path):
    log = StoreLog(tmp_path, file_bytes=200)
    for _ in range(10):
        log.stored([HASH])
    log.close()
    files = sorted(tmp_path.glob("store-*.log"))
    assert len(files) > 1
    with files[-1].open("a") as file:
        file.write("1790000000 stored abab")
    assert len(list(read_store_log(tmp_path))) == 10


def test_the_verdict_is_json(settle):
    verdict = json.loads(settle(record(hit=0, miss=9)).to_json())
    assert {"records", "chain_ok", "unsupported_hits", "duplicates"} <= set(verdict)
