"""Damaged ledger files: the index is rebuilt, and no acknowledged entry is lost without an error."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from antefix.errors import Unavailable
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_entries, segment_path, segments_of
from antefix_billing.ledger_format import LedgerCorrupt
from antefix_billing.ledger_mark import MARK_FILE
from antefix_billing.progress_slots import PROGRESS_FILE, ProgressJournal
from antefix_billing.reconcile import verify
from tests.billing.usage_records import opened, record

SEGMENT = 4096
COUNT = 30


@pytest.fixture
def directory(tmp_path):
    """A closed ledger of several segments with 30 settled requests and one that is open."""
    ledger = Ledger(tmp_path / "ledger", segment_bytes=SEGMENT)
    ledger.append([opened("open")])
    for number in range(COUNT):
        ledger.append([opened(f"r{number}")])
        ledger.append([record(f"r{number}")])
    ledger.close()
    assert len(segments_of(tmp_path / "ledger")) > 4
    return tmp_path / "ledger"


def index_file(directory):
    return directory / "index" / "data.mdb"


def crash(directory):
    """Make the ledger look as after a crash: the mark that the index was closed cleanly is missing."""
    (directory / "index" / "CLEAN").unlink(missing_ok=True)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


HARMS = {
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(path.stat().st_size)),
    "zeroed": zero,
    "emptied": lambda path: path.write_bytes(b""),
    "cut to a page": lambda path: os.truncate(path, 4096),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096),
    "deleted": lambda path: path.unlink(),
    "one bit": flip,
}


def holds_all(ledger):
    assert [entry.request_id for entry in ledger.unsettled()] == ["open"]
    for number in range(COUNT):
        assert ledger.find(f"acme:r{number}").record.request_id == f"r{number}"
        # Settled requests are not charged again.
        assert ledger.append([record(f"r{number}", output_tokens=99)])[0].record.output_tokens != 99


@pytest.mark.parametrize("after", ["clean", "crash"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_index_is_made_again_at_the_start(directory, harm, after):
    if after == "crash":
        crash(directory)
    HARMS[harm](index_file(directory))
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    holds_all(ledger)
    ledger.close()
    assert verify(directory).ok


@pytest.mark.parametrize("harm", HARMS)
def test_an_index_that_is_harmed_while_in_use_is_made_again(directory, harm):
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    assert ledger.find("acme:r0")
    HARMS[harm](index_file(directory))
    holds_all(ledger)
    for number in range(COUNT):
        ledger.append([record(f"more{number}")])
    holds_all(ledger)
    ledger.close()
    again = Ledger(directory, segment_bytes=SEGMENT)
    holds_all(again)
    again.close()
    assert verify(directory).ok


def test_every_bit_of_the_index_may_flip(directory):
    """After a crash a flipped bit is found, because rows carry checksums and LMDB's structure is examined."""
    crash(directory)
    original, rng = index_file(directory).read_bytes(), random.Random(5)
    for at in rng.sample(range(len(original)), 40):
        data = bytearray(original)
        data[at] ^= 1 << rng.randrange(8)
        index_file(directory).write_bytes(data)
        crash(directory)
        ledger = Ledger(directory, segment_bytes=SEGMENT)
        assert ledger.find(f"acme:r{rng.randrange(COUNT)}") and len(ledger.unsettled()) == 1
        ledger.close()


def test_another_ledgers_index_is_not_believed(directory, tmp_path):
    other = Ledger(tmp_path / "other", segment_bytes=SEGMENT)
    for number in range(COUNT):
        other.append([record(f"x{number}")])
    other.close()
    shutil.rmtree(directory / "index")
    shutil.copytree(tmp_path / "other" / "index", directory / "index")
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    holds_all(ledger)
    assert ledger.find("acme:x0") is None
    ledger.close()


def without_index(directory):
    shutil.rmtree(directory / "index")


@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("gone", ["all", "first", "middle", "last"])
def test_missing_segments_are_told(directory, gone, index):
    paths = segments_of(directory)
    chosen = {"all": paths, "first": paths[:1], "middle": [paths[2]], "last": paths[-1:]}[gone]
    for path in chosen:
        path.unlink()
    if index == "lost":
        without_index(directory)
    with pytest.raises(LedgerCorrupt, match=r"missing|does not continue|acknowledged"):
        Ledger(directory, segment_bytes=SEGMENT)
    assert not verify(directory).ok
    # No new segment replaces the missing ones.
    assert segments_of(directory) == [path for path in paths if path not in chosen]


@pytest.mark.parametrize("which", ["first", "middle"])
def test_a_sealed_segment_that_was_cut_is_told(directory, which):
    path = segments_of(directory)[0 if which == "first" else 2]
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(LedgerCorrupt, match="was sealed with"):
        Ledger(directory, segment_bytes=SEGMENT)


@pytest.mark.parametrize("which", ["another ledger's", "copied to another name"])
def test_a_segment_in_the_place_of_another_is_told(directory, tmp_path, which):
    paths = segments_of(directory)
    if which == "another ledger's":
        other = Ledger(tmp_path / "other", segment_bytes=SEGMENT)
        for number in range(COUNT):
            other.append([record(f"s{number}")])
        other.close()
        data = segments_of(tmp_path / "other")[0].read_bytes()
        paths[0].write_bytes(data + bytes(paths[0].stat().st_size))
    else:
        shutil.copy(paths[1], segment_path(directory, 2))
    with pytest.raises(LedgerCorrupt, match=r"another ledger|holds the entries from"):
        Ledger(directory, segment_bytes=SEGMENT)


@pytest.mark.parametrize(
    "name", ["usage-old.ledger", "usage-00000000000\u00b2.ledger", "usage--00000000001.ledger", "usage-1.ledger"]
)
def test_a_file_with_a_name_that_no_segment_has_changes_nothing(directory, name):
    shutil.copy(segments_of(directory)[1], directory / name)
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    holds_all(ledger)
    ledger.close()
    assert verify(directory).ok


@pytest.mark.slow
def test_one_bit_of_the_last_acknowledged_entry_is_rot_and_not_a_torn_end(directory):
    path = segments_of(directory)[-1]
    last = list(read_entries(directory))[-1][1]
    original = path.read_bytes()
    for at in range(last.offset, last.end, 7):
        data = bytearray(original)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(LedgerCorrupt, match="were acknowledged"):
            Ledger(directory, segment_bytes=SEGMENT)
        assert path.read_bytes() == bytes(data)
        assert not verify(directory).ok
    path.write_bytes(original)
    Ledger(directory, segment_bytes=SEGMENT).close()


def test_an_end_that_was_cut_off_is_told_wherever_it_was_cut(directory):
    path = segments_of(directory)[-1]
    original = path.read_bytes()
    for size in range(path.stat().st_size - 1, 100, -97):
        path.write_bytes(original[:size])
        with pytest.raises(LedgerCorrupt, match="acknowledged"):
            Ledger(directory, segment_bytes=SEGMENT)
    path.write_bytes(original)


def test_what_was_written_and_not_acknowledged_is_still_cut_off(directory):
    path = segments_of(directory)[-1]
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[-300:-17])
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    ledger.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("mark", [b"", b"x" * 64, bytes(64), None])
def test_a_mark_that_is_damaged_or_was_never_there_stops_nobody(directory, mark):
    (directory / MARK_FILE).unlink()
    if mark is not None:
        (directory / MARK_FILE).write_bytes(mark)
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    holds_all(ledger)
    ledger.close()
    assert verify(directory).ok


def test_a_slot_of_progress_with_a_text_that_nobody_wrote_is_passed_over(directory):
    import struct
    import zlib

    body = struct.pack("<16s8IQ24s24s32s", b"n" * 16, *[1] * 8, 5, b"\xff\xfe", b"no such reason", bytes(32))
    (directory / PROGRESS_FILE).write_bytes((struct.pack("<4sI", b"AFPG", zlib.crc32(body)) + body).ljust(256, b"\0"))
    journal = ProgressJournal(directory)
    assert all(journal.found(name) is None for name in ("n" * 16, "", "no such reason"))
    journal.close()


CUT_BEFORE_START = """
import os, sys
from antefix.errors import Unavailable
from antefix_billing.ledger import Ledger
directory = sys.argv[1]
os.truncate(directory + "/index/data.mdb", int(sys.argv[2]))
ledger = Ledger(directory, segment_bytes=4096)
print(ledger.find("acme:r0").record.request_id)
os.truncate(directory + "/index/data.mdb", int(sys.argv[2]))
print(ledger.find("acme:r1").record.request_id)
"""


@pytest.mark.services
@pytest.mark.parametrize("size", [0, 4096])
def test_a_process_outlives_its_ledgers_index(directory, size):
    done = subprocess.run([sys.executable, "-c", CUT_BEFORE_START, str(directory), str(size)], capture_output=True)
    assert done.returncode == 0 and done.stdout.split() == [b"r0", b"r1"], done.stderr


@pytest.mark.parametrize("harm", ["deleted", "replaced", "cut", "emptied", "made longer", "directory gone"])
def test_nothing_is_acknowledged_into_a_file_that_nobody_will_find(directory, harm):
    ledger = Ledger(directory, segment_bytes=1 << 20)
    ledger.append([opened("before")])
    path = segments_of(directory)[-1]
    if harm == "deleted":
        path.unlink()
    elif harm == "replaced":
        shutil.copy(path, copy := path.with_suffix(".copy"))
        copy.replace(path)
    elif harm == "directory gone":
        shutil.rmtree(directory)
    else:
        os.truncate(path, {"cut": path.stat().st_size - 8, "emptied": 0, "made longer": 1 << 20}[harm])
    for _ in range(2):
        with pytest.raises(Unavailable, match="takes no more entries"):
            ledger.append([opened("after")])
    ledger.close()


MISPLACED = {
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "circle": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "of no end": lambda path: (path.touch(), os.truncate(path, 1 << 42)),
}


def put(path, kind):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    MISPLACED[kind](path)


@pytest.mark.parametrize("kind", MISPLACED)
def test_what_is_no_file_of_the_ledgers_is_put_aside(directory, kind):
    for name in (MARK_FILE, PROGRESS_FILE, "lock"):
        put(directory / name, kind)
    for name in ("index",) if kind != "of no end" else ("index/data.mdb", "index/CLEAN"):
        put(directory / name, kind)
    ledger = Ledger(directory, segment_bytes=SEGMENT)
    assert ledger.find("acme:r0") is not None and ledger.find(f"acme:r{COUNT - 1}") is not None
    ledger.append([opened("new")])
    ledger.append([record("new")])
    ledger.close()
    assert verify(directory).chain_ok


@pytest.mark.parametrize("kind", MISPLACED)
@pytest.mark.parametrize("which", [0, 2, -1])
def test_a_file_that_is_no_segment_is_reported(directory, kind, which):
    (directory / MARK_FILE).unlink()
    put(path := segments_of(directory)[which], kind)
    crash(directory)
    assert not verify(directory).chain_ok
    with pytest.raises(LedgerCorrupt, match=path.name):
        Ledger(directory, segment_bytes=SEGMENT).close()
