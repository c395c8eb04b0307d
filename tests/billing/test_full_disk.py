"""Others fill the disk. The ledger has reserved space, which it keeps over restarts and from segment to segment."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from antefix.errors import Unavailable
from antefix.usage import Usage
from antefix_billing import ledger_reserve as reserve
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled, segments_of
from antefix_billing.reconcile import verify
from tests.billing.usage_records import opened, record
from tests.small_disk import fill, free_bytes, small_disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "small", 16 << 20) as path:
        yield path


def settle(ledger, numbers):
    for number in numbers:
        ledger.append([opened(f"r{number}")])
        ledger.progress.mark(f"r{number}", Usage(output_tokens=number))
        ledger.append([record(f"r{number}")])
        ledger.progress.drop(f"r{number}")


def test_a_full_disk_does_not_stop_the_ledger(disk):
    ledger = Ledger(disk / "ledger")
    settle(ledger, range(5))
    fill(disk / "ballast")
    assert free_bytes(disk) < 4096 and ledger.reserve_bytes >= 1 << 20
    settle(ledger, range(5, 300))
    # This batch is larger than any before.
    for number in range(300, 400):
        ledger.progress.mark(f"r{number}", Usage(output_tokens=number))
    ledger.close()
    # A restart finds the ledger unchanged, and continues it.
    ledger = Ledger(disk / "ledger")
    assert ledger.reserve_bytes > 500_000
    settle(ledger, range(400, 500))
    ledger.close()
    assert len(list(read_settled(disk / "ledger"))) == 400 and verify(disk / "ledger").ok


def test_a_segment_grows_on_until_there_is_space_for_the_next(disk):
    ledger = Ledger(disk / "ledger", segment_bytes=20_000)
    settle(ledger, range(3))
    fill(disk / "ballast")
    settle(ledger, range(3, 60))
    assert len(segments_of(disk / "ledger")) == 1 and ledger.sequence == 120
    (disk / "ballast").unlink()
    settle(ledger, range(60, 80))
    assert len(segments_of(disk / "ledger")) > 1
    ledger.close()
    assert len(list(read_settled(disk / "ledger"))) == 80 and verify(disk / "ledger").ok


def test_a_used_up_reserve_is_an_error_and_comes_back(disk):
    ledger = Ledger(disk / "ledger")
    fill(disk / "ballast")
    with pytest.raises(Unavailable, match="the ledger cannot be written"):
        settle(ledger, range(10_000))
    num_settled = len(list(read_settled(disk / "ledger")))
    assert num_settled > 500
    (disk / "ballast").unlink()
    settle(ledger, range(20_000, 20_010))
    assert ledger.reserve_bytes >= 1 << 20
    ledger.close()
    assert verify(disk / "ledger").ok


def test_the_reserve_is_outside_of_what_readers_see(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    settle(ledger, range(3))
    (path,) = segments_of(tmp_path / "ledger")
    assert path.stat().st_size < 10_000 and path.stat().st_blocks * 512 >= ledger.reserve_bytes >= reserve.RESERVE_BYTES
    ledger.close()


def test_a_file_system_that_cannot_reserve_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(reserve, "allocate", refuse)
    ledger = Ledger(tmp_path / "ledger")
    settle(ledger, range(3))
    assert ledger.reserve_bytes == 0 and "cannot hold space" in caplog.text
    ledger.close()
    assert len(list(read_settled(Path(tmp_path / "ledger")))) == 3
