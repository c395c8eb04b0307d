"""The store's benchmark reads fio's results correctly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fio_limits import READERS, WRITERS, fio_rate, has_fio, rate_of


def test_the_rate_is_that_of_the_direction_behind_fios_notes() -> None:
    job = {"read": {"bw_bytes": 5}, "write": {"bw_bytes": 1_500_000_000}}
    assert rate_of("fio: a note\n" + json.dumps({"jobs": [job]}), "write") == 1.5e9


@pytest.mark.services
@pytest.mark.skipif(not has_fio(), reason="fio is not installed")
def test_fio_writes_the_file_that_it_reads(tmp_path: Path) -> None:
    nbytes = 8 << 20
    rates = [fio_rate(tmp_path, name, nbytes) for name in ("fio_write_buffered_4mib", "fio_read_buffered_4mib")]
    assert min(rates) > 0
    assert (tmp_path / "fio.bin").stat().st_size == nbytes
    with pytest.raises(RuntimeError, match="fio_read_direct"):
        fio_rate(tmp_path / "fio.bin", "fio_read_direct_8x1mib", nbytes)
    assert not set(WRITERS) & set(READERS)
