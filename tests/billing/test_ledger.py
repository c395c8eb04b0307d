"""The ledger file: acknowledged entries stay and stand once, a torn end is removed, and edits are detected."""

import pytest

from antefix.errors import ConfigError, Unavailable
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_entries, read_settled, segments_of
from antefix_billing.ledger_format import LedgerCorrupt
from antefix_billing.ledger_mark import MARK_FILE
from antefix_billing.reconcile import verify
from antefix_billing.usage_record import OpenEntry, Status
from tests.billing.usage_records import opened, record


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "ledger"


def ids(directory):
    return [item.record.request_id for item in read_settled(directory)]


def fill(directory, count, *, segment_bytes=1 << 20, prefix="r"):
    ledger = Ledger(directory, segment_bytes=segment_bytes)
    for number in range(count):
        ledger.append([opened(f"{prefix}{number}")])
        ledger.append([record(f"{prefix}{number}")])
    ledger.close()


def test_records_come_back_in_order_after_a_reopen(directory):
    fill(directory, 20)
    fill(directory, 5, prefix="s")
    assert ids(directory) == [f"r{n}" for n in range(20)] + [f"s{n}" for n in range(5)]
    assert verify(directory).ok


def test_a_request_id_is_charged_once(directory):
    ledger = Ledger(directory)
    first = ledger.append([record("a", output_tokens=5)])[0]
    again = ledger.append([record("a", output_tokens=9, attempt=2)])[0]
    assert again.record.output_tokens == 5 and again.hash == first.hash
    assert ids(directory) == ["a"]


def test_a_request_id_is_charged_once_within_one_batch(directory):
    ledger = Ledger(directory)
    ledger.append([opened("a"), record("a"), record("a"), opened("b"), opened("b")])
    assert ids(directory) == ["a"]
    assert [entry.request_id for entry in ledger.unsettled()] == ["b"]


def test_a_request_id_is_charged_once_across_rotation_and_reopen(directory):
    fill(directory, 50, segment_bytes=4096)
    assert len(segments_of(directory)) > 5
    ledger = Ledger(directory, segment_bytes=4096)
    for number in range(50):
        assert ledger.find(f"acme:r{number}").record.request_id == f"r{number}"
        ledger.append([record(f"r{number}", output_tokens=99)])
    ledger.close()
    assert len(ids(directory)) == 50
    assert verify(directory).duplicates == 0


def test_an_uncharged_attempt_leaves_room_for_one_charged_one(directory):
    ledger = Ledger(directory)
    ledger.append([record("a", status=Status.CRASHED, price=0)])
    ledger.append([record("a", status=Status.CRASHED, price=0)])
    ledger.append([record("a", attempt=2)])
    ledger.append([record("a", attempt=3)])
    assert [(i.record.attempt, i.record.status) for i in read_settled(directory)] == [(1, "crashed"), (2, "stop")]
    assert verify(directory).duplicates == 0


def test_a_lost_index_is_rebuilt(directory):
    fill(directory, 50, segment_bytes=4096)
    for path in (directory / "index").iterdir():
        path.unlink()
    ledger = Ledger(directory, segment_bytes=4096)
    assert all(ledger.find(f"acme:r{number}") for number in range(50))


def test_open_entries_survive_rotation_and_reopen_until_settled(directory):
    ledger = Ledger(directory, segment_bytes=4096)
    ledger.append([opened("long")])
    ledger.close()
    fill(directory, 50, segment_bytes=4096)
    ledger = Ledger(directory, segment_bytes=4096)
    assert ledger.unsettled() == [opened("long")]
    ledger.append([record("long")])
    ledger.close()
    fill(directory, 50, segment_bytes=4096, prefix="s")
    assert Ledger(directory, segment_bytes=4096).unsettled() == []


def never_acknowledged(directory):
    """Make the ledger look as if the process had ended before it noted how far it had acknowledged."""
    (directory / MARK_FILE).unlink()


def test_every_torn_tail_is_truncated_and_nothing_acknowledged_is_lost(directory):
    fill(directory, 3)
    path = segments_of(directory)[-1]
    whole = path.read_bytes()
    ends = [entry.end for _, entry in read_entries(directory)]
    for size in range(ends[-2], len(whole), 11):
        path.write_bytes(whole[:size])
        never_acknowledged(directory)
        ledger = Ledger(directory)
        assert ledger.sequence == 5
        ledger.close()
        assert path.stat().st_size == ends[-2]
    ledger = Ledger(directory)
    ledger.append([record("r2")])
    assert ids(directory) == ["r0", "r1", "r2"]


def test_a_torn_batch_is_truncated_though_its_later_part_reached_the_disk(directory):
    ledger = Ledger(directory)
    ledger.append([record("a")])
    ledger.append([record(f"b{number}") for number in range(3)])
    ledger.close()
    path = segments_of(directory)[-1]
    data = bytearray(path.read_bytes())
    start = [entry for _, entry in read_entries(directory)][1].offset
    data[start + 60] ^= 1
    path.write_bytes(data)
    never_acknowledged(directory)
    ledger = Ledger(directory)
    assert ledger.sequence == 1
    ledger.close()
    assert ids(directory) == ["a"]


def test_damage_before_a_durable_batch_is_never_truncated(directory):
    fill(directory, 3)
    path = segments_of(directory)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LedgerCorrupt):
        Ledger(directory)
    assert path.read_bytes() == bytes(data)


def test_every_flipped_byte_of_a_sealed_segment_shows(directory):
    fill(directory, 8, segment_bytes=2048)
    path = segments_of(directory)[0]
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 0x40
        path.write_bytes(data)
        assert not verify(directory).chain_ok, position
    path.write_bytes(whole)
    assert verify(directory).chain_ok


def test_a_removed_segment_shows(directory):
    fill(directory, 8, segment_bytes=2048)
    segments_of(directory)[1].unlink()
    assert not verify(directory).chain_ok


def test_a_cut_end_shows_against_an_anchor(directory):
    fill(directory, 3)
    head = verify(directory)
    path = segments_of(directory)[-1]
    path.write_bytes(path.read_bytes()[: [entry for _, entry in read_entries(directory)][3].end])
    assert "entries 5 to 6 were acknowledged" in verify(directory).chain_error
    never_acknowledged(directory)
    assert verify(directory).ok
    cut = verify(directory, anchor=(head.head_sequence, head.head_hash))
    assert not cut.ok and not cut.head_ok


def test_two_writers_are_refused(directory):
    ledger = Ledger(directory)
    with pytest.raises(ConfigError, match="another process"):
        Ledger(directory)
    ledger.close()
    Ledger(directory).close()


def test_a_crash_while_starting_a_segment_is_recovered(directory):
    fill(directory, 8, segment_bytes=2048)
    before = ids(directory)
    for rest in (b"", b"\0" * 76, b"AFX"):
        (directory / "usage-000000000099.ledger").write_bytes(rest)
        ledger = Ledger(directory, segment_bytes=2048)
        ledger.append([record(f"new{len(rest)}")])
        ledger.close()
        before.append(f"new{len(rest)}")
        assert ids(directory) == before
    assert verify(directory).ok


def test_a_failed_write_fails_its_requests_and_the_ledger_goes_on(directory, monkeypatch):
    ledger = Ledger(directory)
    ledger.append([record("a")])
    import os

    def full(fd, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(Unavailable, match="the ledger cannot be written"):
            ledger.append([record("b")])
    ledger.append([record("c")])
    ledger.close()
    assert ids(directory) == ["a", "c"]
    assert verify(directory).ok


def test_a_failed_sync_that_cannot_be_undone_stops_the_ledger(directory, monkeypatch):
    ledger = Ledger(directory)
    import os

    def broken(fd):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        patch.setattr(os, "fsync", broken)
        with pytest.raises(Unavailable):
            ledger.append([record("a")])
    with pytest.raises(Unavailable, match="no more entries"):
        ledger.append([record("b")])


def test_export_resumes_from_a_cursor(directory):
    fill(directory, 30, segment_bytes=2048)
    everything = list(read_settled(directory))
    for item in everything[::7]:
        assert list(read_settled(directory, after=item.sequence)) == [
            other for other in everything if other.sequence > item.sequence
        ]


def test_entries_are_typed(directory):
    ledger = Ledger(directory)
    answers = ledger.append([opened("x"), record("x")])
    assert isinstance(answers[0], OpenEntry) and answers[1].sequence == 2


def test_two_tenants_may_use_one_id(directory):
    ledger = Ledger(directory)
    ledger.append([record("a"), record("a", tenant="other"), record("a", tenant="")])
    ledger.append([record("a", tenant="other")])
    assert len({item.record.event_id for item in read_settled(directory)}) == 3 == ledger.sequence


def test_a_cancelled_request_may_be_tried_again(directory):
    ledger = Ledger(directory)
    ledger.append([record("a", status=Status.CANCELLED)])
    ledger.append([record("a", attempt=2)])
    assert [item.record.attempt for item in read_settled(directory)] == [1, 2]
    assert verify(directory).ok
