"""Progress of running requests outlives the process, never names another request, and uses only the space needed."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.errors import Unavailable
from antefix.miss_reason import MissReason
from antefix.usage import Usage
from antefix_billing.progress_slots import PROGRESS_FILE, SLOT_BYTES, ProgressJournal

counts = st.integers(0, 2**32 - 1)
work = st.builds(
    Usage,
    prompt_tokens=counts,
    cache_hit_tokens=st.integers(1, 2**32 - 1),
    cache_write_tokens=counts,
    cache_write_1h_tokens=counts,
    output_tokens=counts,
    reasoning_tokens=counts,
    hit_memory_tokens=counts,
    replayed_tokens=counts,
    restore_plan=st.sampled_from(["cold", "checkpoint", "replay", "bounded-12"]),
    last_hit_hash=st.binary(min_size=32, max_size=32).map(bytes.hex),
    miss_reason=st.sampled_from(MissReason),
    ttft_us=st.integers(0, 2**63),
)


@pytest.fixture
def journal(tmp_path):
    journal = ProgressJournal(tmp_path)
    yield journal
    journal.close()


@settings(max_examples=30)
@given(marks=st.lists(st.tuples(st.sampled_from("abcd"), work), max_size=8))
def test_the_last_mark_of_each_request_is_found_by_the_next_process(tmp_path_factory, marks):
    directory = tmp_path_factory.mktemp("progress")
    ProgressJournal(directory).close()
    journal = ProgressJournal(directory)
    for name, done in marks:
        journal.mark(name, done)
    journal.close()
    after = ProgressJournal(directory)
    assert {name: after.found(name) for name in "abcd"} == dict.fromkeys("abcd") | dict(marks)
    after.clear()
    after.close()
    again = ProgressJournal(directory)
    assert all(again.found(name) is None for name in "abcd")
    again.close()


def test_a_slot_of_before_there_were_lifetimes_says_nothing_of_them(journal, tmp_path):
    journal.mark("r", Usage(prompt_tokens=9, cache_write_tokens=5, cache_write_1h_tokens=3))
    path = tmp_path / PROGRESS_FILE
    data = bytearray(path.read_bytes())
    for stray in (bytes(8), b"\x05" + bytes(7)):
        data[144:152] = stray
        path.write_bytes(data)
        again = ProgressJournal(tmp_path)
        assert again.found("r") == Usage(prompt_tokens=9, cache_write_tokens=5)
        again.close()


def test_a_slot_is_used_again_by_the_next_request(journal, tmp_path):
    for number in range(500):
        journal.mark(f"r{number}", Usage(output_tokens=number))
        journal.drop(f"r{number}")
    assert (tmp_path / PROGRESS_FILE).stat().st_size == 64 * SLOT_BYTES
    for number in range(100):
        journal.mark(f"s{number}", Usage(output_tokens=number))
    assert (tmp_path / PROGRESS_FILE).stat().st_size == 128 * SLOT_BYTES
    after = ProgressJournal(tmp_path)
    assert [after.found(f"s{number}").output_tokens for number in range(100)] == list(range(100))
    after.close()


def test_a_torn_slot_is_no_mark(journal, tmp_path):
    journal.mark("r", Usage(output_tokens=3))
    path = tmp_path / PROGRESS_FILE
    data = path.read_bytes()
    at = data.find(b"AFPG")
    for place in (0, 5, 20, 60, 143):
        torn = bytearray(data)
        torn[at + place] ^= 1
        path.write_bytes(bytes(torn))
        after = ProgressJournal(tmp_path)
        assert after.found("r") is None
        after.close()
    path.write_bytes(data[:-100])
    ProgressJournal(tmp_path).close()


MARKING = """
import sys
from pathlib import Path
from antefix_billing.progress_slots import ProgressJournal
from antefix.usage import Usage
journal, number = ProgressJournal(Path(sys.argv[1])), 0
while True:
    number += 1
    journal.mark("r", Usage(prompt_tokens=7, output_tokens=number))
    print(number, flush=True)
"""


@pytest.mark.services
def test_what_was_marked_before_it_was_told_survives_kill_9(tmp_path):
    with subprocess.Popen([sys.executable, "-c", MARKING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(500):
            process.stdout.readline()
        process.kill()
        told = [500, *(int(line) for line in process.stdout if line.endswith("\n"))]
    after = ProgressJournal(tmp_path)
    assert told[-1] <= after.found("r").output_tokens <= told[-1] + 1
    after.close()


def test_a_mark_that_cannot_be_written_is_an_error(journal, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Unavailable, match="progress"):
        journal.mark("r", Usage())
