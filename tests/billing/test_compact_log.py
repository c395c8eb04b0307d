"""Compacting a store's log makes the log small, and every billed hit stays as supported as before."""

import os
import random
import time

import pytest

from antefix.store_files import hit_log
from antefix.store_files.hit_log import StoreLog, log_files, read_store_log
from antefix_billing.compact_log import compact
from antefix_billing.ledger import Ledger
from antefix_billing.reconcile import verify
from tests.billing.usage_records import NOW_US, record

SECOND_US = 1_000_000
BEFORE_US = NOW_US + 10**12


def block(number):
    return f"{number:064x}"


def write_log(directory, name, lines):
    """Write a log file that ended long ago.  lines: (seconds, kind, blocks) each."""
    directory.mkdir(exist_ok=True)
    path = directory / f"store-{name:017d}.log"
    text = "".join(f"{NOW_US + int(s * SECOND_US)} {kind} {','.join(map(block, names))}\n" for s, kind, names in lines)
    path.write_text(text)
    old = NOW_US / 1e6
    os.utime(path, (old, old))
    return path


def write_ledger(directory, hits):
    """Write a ledger.  hits: (seconds, block, whether the hit is from the store) each."""
    ledger = Ledger(directory)
    for index, (at, number, is_stored) in enumerate(hits):
        start = NOW_US + int(at * SECOND_US)
        ledger.append([
            record(f"r{index}", last_hit_hash=block(number), started_us=start, finished_us=start + SECOND_US,
                   hit_memory_tokens=0 if is_stored else 128)
        ])  # fmt: skip
    ledger.close()
    return directory


def test_what_no_hit_needs_goes_and_the_rest_stays(tmp_path):
    path = write_log(
        tmp_path / "log",
        1,
        [(0, "stored", [1, 2]), (5, "read", [1]), (50, "read", [1]), (60, "read", [2]), (70, "stored", [1])],
    )
    ledger = write_ledger(tmp_path / "ledger", [(50, 1, True), (80, 2, False)])
    found = compact([tmp_path / "log"], [ledger], before_us=BEFORE_US)
    assert [line.split(" ", 1)[1] for line in path.read_text().splitlines()] == [
        f"stored {block(1)},{block(2)}", f"read {block(1)}"
    ]  # fmt: skip
    assert (found.num_files, found.bytes_after) == (1, path.stat().st_size) and found.bytes_before > found.bytes_after
    assert verify(ledger, store_log=tmp_path / "log").ok
    assert compact([tmp_path / "log"], [ledger], before_us=BEFORE_US).num_files == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_verdict_is_the_same_as_before(tmp_path, seed):
    """For any log and any ledger, for supported and unsupported hits, and with clocks that are set back."""
    chance = random.Random(seed)
    for name in range(1, 4):
        now, lines = 0.0, []
        for _ in range(60):
            now += chance.uniform(0, 3)
            if chance.random() < 0.03:
                now -= chance.uniform(0, 4000)
            kind = chance.choice(("stored", "read", "read"))
            lines.append((now, kind, chance.sample(range(8), chance.randint(1, 3) if kind == "stored" else 1)))
        write_log(tmp_path / "log", name, lines)
    hits = [(chance.uniform(-2000, 200), chance.randrange(9), chance.random() < 0.7) for _ in range(60)]
    ledger = write_ledger(tmp_path / "ledger", hits)
    before = verify(ledger, store_log=tmp_path / "log")
    assert compact([tmp_path / "log"], [ledger], before_us=BEFORE_US).num_files
    after = verify(ledger, store_log=tmp_path / "log")
    assert after == before and 0 < before.unsupported_hits < len(hits)


def test_files_that_may_be_appended_to_are_left_alone(tmp_path):
    log = StoreLog(tmp_path / "log")
    log.read([bytes(32)])
    ledger = write_ledger(tmp_path / "ledger", [(0, 1, True)])
    assert compact([tmp_path / "log"], [ledger], before_us=int(time.time() * 1e6) + BEFORE_US).num_files == 0
    log.read([bytes(32)])
    assert len(list(read_store_log(tmp_path / "log"))) == 2


def test_a_writer_that_was_quiet_begins_a_new_file(tmp_path, monkeypatch):
    log = StoreLog(tmp_path)
    log.read([bytes(32)])
    now = time.monotonic()
    monkeypatch.setattr(hit_log.time, "monotonic", lambda: now + hit_log.QUIET_S / 2 + 1)
    log.read([bytes(32)])
    assert len(log_files(tmp_path)) == 2
