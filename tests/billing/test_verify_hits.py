"""Each billed hit must name a block that the store's log shows as stored before and as read at that time."""

import json
import os
import shutil
import time
import tracemalloc

import pytest

from antefix.prompt_marks import marks_of
from antefix.store_files import hit_log
from antefix.store_files.hit_log import StoreLog, log_files, read_log_file, read_store_log
from antefix_billing.ledger import Ledger
from antefix_billing.reconcile import verify, verify_all
from tests.billing.usage_records import record

HASH = bytes.fromhex("ab" * 32)
MINUTE_US = 60_000_000
MIB = 1 << 20


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


@pytest.mark.parametrize("harm", ["file deleted", "directory deleted", "directory replaced"])
def test_a_log_that_is_deleted_while_it_is_written_begins_again(tmp_path, caplog, harm):
    log = StoreLog(tmp_path / "log")
    log.stored([HASH])
    if harm == "file deleted":
        next((tmp_path / "log").iterdir()).unlink()
    else:
        shutil.rmtree(tmp_path / "log")
    if harm == "directory replaced":
        (tmp_path / "log").mkdir()
    for _ in range(3):
        log.read([HASH])
    log.close()
    assert [event.kind.value for event in read_store_log(tmp_path / "log")] == ["read"] * 3
    assert caplog.text.count("was deleted") == 1 and log.num_lost == 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_a_log_that_is_no_file_is_named_and_waited_for_by_nobody(tmp_path, make):
    make(tmp_path / "store-00000000000000001.log")
    with pytest.raises(FileNotFoundError, match="no regular file"):
        list(read_store_log(tmp_path))


def test_the_verdict_is_json(settle):
    verdict = json.loads(settle(record(hit=0, miss=9)).to_json())
    assert {"records", "chain_ok", "unsupported_hits", "duplicates"} <= set(verdict)


CHAIN = [bytes([number]) * 32 for number in range(1, 20)]
OTHER = [CHAIN[0], *(bytes([number]) * 32 for number in range(101, 120))]


def asked(name, chain, *, hit=0, blocks=10, output=0, at_us=0, **changes):
    """The record of a request over `blocks` blocks of 64 tokens, of which `hit` were in the worker's memory."""
    fields = {
        "last_hit_hash": chain[hit - 1].hex() if hit else "",
        "prompt_marks": marks_of(chain[:blocks]),
        "output_tokens": output,
        "started_us": now_us() + at_us,
        "finished_us": now_us() + at_us + 1000,
        "hit_memory_tokens": 64 * hit,
    }
    return record(name, hit=64 * hit, miss=64 * (blocks - hit) + 5, **(fields | changes))


@pytest.mark.parametrize("hit", range(1, 11))
def test_a_memory_hit_of_what_no_store_took_is_supported_by_who_computed_it(settle, log, hit):
    """The store was damaged, full or down, so its log does not name blocks that workers computed and kept in memory."""
    log.stored([])
    again = asked("again", CHAIN, hit=hit, at_us=MINUTE_US)
    assert settle(asked("first", CHAIN), again).ok


def test_an_earlier_output_supports_a_hit_as_well(settle, log):
    log.stored([])
    again = asked("again", CHAIN, hit=9, at_us=MINUTE_US)
    assert settle(asked("first", CHAIN, blocks=6, output=64 * 4), again).ok


@pytest.mark.parametrize(
    "first",
    [
        asked("first", OTHER),
        asked("first", CHAIN, blocks=4),
        asked("first", CHAIN, at_us=10 * MINUTE_US),
        asked("first", CHAIN, prompt_marks=""),
    ],
    ids=["another prompt", "a shorter one", "a later one", "one without marks"],
)
def test_a_memory_hit_that_nobody_can_have_computed_is_not_supported(settle, log, first):
    log.stored([])
    assert settle(first, asked("again", CHAIN, hit=8, at_us=MINUTE_US)).unsupported_examples == ("acme:again",)


def test_what_another_routers_request_computed_supports_a_memory_hit(tmp_path, log):
    log.stored([])
    for name, each in (("a", asked("first", CHAIN)), ("b", asked("again", CHAIN, hit=8, at_us=MINUTE_US))):
        ledger = Ledger(tmp_path / name)
        ledger.append([each])
        ledger.close()
    both = [tmp_path / "a", tmp_path / "b"]
    assert verify_all(both, store_log=tmp_path / "log", anchors={}).ok
    assert not verify_all(both[1:], store_log=tmp_path / "log", anchors={}).ok


def test_a_request_does_not_support_itself_and_no_hit_of_the_store(settle, log):
    log.stored([])
    alone = asked("alone", CHAIN, hit=8)
    assert settle(alone).unsupported_hits == 1
    from_store = asked("store", CHAIN, hit=8, at_us=MINUTE_US, hit_memory_tokens=0)
    assert settle(asked("first", CHAIN), from_store).unsupported_examples == ("acme:store",)


HOUR_US = 60 * MINUTE_US


def logged(directory, *lines):
    """Write a store's log.  lines: (time_us, kind) each, about HASH, or about another block if the kind ends in "!"."""
    directory.mkdir()
    other = "cd" * 32
    text = "".join(f"{us} {kind.strip('!')} {other if kind.endswith('!') else HASH.hex()}\n" for us, kind in lines)
    (directory / "store-00000000000000001.log").write_text(text)


def test_a_hit_after_the_clock_was_set_back_is_supported(settle, tmp_path):
    noon = now_us()
    logged(tmp_path / "log", (noon, "stored"), (noon - HOUR_US, "read!"), (noon - HOUR_US + 5_000_000, "read"))
    after = noon - HOUR_US + 4_900_000
    assert settle(record(started_us=after, finished_us=after + 200_000)).unsupported_hits == 0


def test_a_hit_of_a_request_that_ran_while_the_clock_was_set_back_is_supported(settle, tmp_path):
    noon = now_us()
    logged(tmp_path / "log", (noon - MINUTE_US, "stored"), (noon, "read!"), (noon - HOUR_US, "read"))
    assert settle(record(started_us=noon - 100_000, finished_us=noon + 400_000)).unsupported_hits == 0


@pytest.mark.parametrize("at", [-2 * HOUR_US, -HOUR_US // 2, HOUR_US])
def test_a_step_of_the_clock_excuses_nothing_that_is_not_next_to_it(settle, tmp_path, at):
    noon = now_us()
    logged(tmp_path / "log", (noon - MINUTE_US, "stored"), (noon, "read!"), (noon - HOUR_US, "read"))
    assert settle(record(started_us=noon + at, finished_us=noon + at + 1000)).unsupported_hits == 1


def test_a_hit_that_was_stored_only_after_the_clock_was_set_back_is_not(settle, tmp_path):
    noon = now_us()
    logged(tmp_path / "log", (noon, "read!"), (noon - HOUR_US, "read!"), (noon + HOUR_US, "stored"))
    assert settle(record(started_us=noon, finished_us=noon + 1000, hit_memory_tokens=128)).unsupported_hits == 1


def test_a_line_of_the_log_without_an_end_takes_little_memory_and_hides_no_other(log, tmp_path):
    log.stored([HASH])
    [path] = log_files(tmp_path / "log")
    with path.open("r+b") as file:
        line = file.read()
        # Two lines that are damaged by a hole each, the second without an end.
        file.truncate(len(line) + 100 * MIB)
        file.seek(0, os.SEEK_END)
        file.write(line + line)
        file.truncate(file.tell() + 100 * MIB)
    tracemalloc.start()
    try:
        assert [event.hash for event in read_log_file(path)] == [HASH.hex()] * 2
        assert tracemalloc.get_traced_memory()[1] < 50 * MIB
    finally:
        tracemalloc.stop()


def test_many_blocks_of_one_call_are_lines_that_are_read_again(log, tmp_path, monkeypatch):
    monkeypatch.setattr(hit_log, "_HASHES_PER_LINE_MAX", 3)
    monkeypatch.setattr(hit_log, "_LINE_BYTES_MAX", 3 * 65 + 30)
    names = [bytes([number] * 32) for number in range(10)]
    log.stored(names)
    assert [event.hash for event in read_store_log(tmp_path / "log")] == [name.hex() for name in names]
