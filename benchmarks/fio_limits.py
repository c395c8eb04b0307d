"""Measures with fio the disk that the store is measured on: the best durable writer, and the best reader of any kind.

A job's bytes per second include the time until the data are safe: a writer ends with fsync. Readers begin with an
empty page cache (fio drops the file's pages first).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

# fio's flags by name: writers with direct I/O at several queue depths, and writers through the page cache.
WRITERS: Final = {
    "fio_write_direct_1x4mib": ("--direct=1", "--ioengine=io_uring", "--iodepth=1", "--bs=4m"),
    "fio_write_direct_8x1mib": ("--direct=1", "--ioengine=io_uring", "--iodepth=8", "--bs=1m"),
    "fio_write_direct_8x4mib": ("--direct=1", "--ioengine=io_uring", "--iodepth=8", "--bs=4m"),
    "fio_write_buffered_4mib": ("--direct=0", "--ioengine=psync", "--bs=4m"),
}
READERS: Final = {
    "fio_read_direct_8x1mib": ("--direct=1", "--ioengine=io_uring", "--iodepth=8", "--bs=1m"),
    "fio_read_direct_16x1mib": ("--direct=1", "--ioengine=io_uring", "--iodepth=16", "--bs=1m"),
    "fio_read_direct_16x4mib": ("--direct=1", "--ioengine=io_uring", "--iodepth=16", "--bs=4m"),
    "fio_read_buffered_4mib": ("--direct=0", "--ioengine=psync", "--bs=4m"),
}


def has_fio() -> bool:
    return shutil.which("fio") is not None


def fio_rate(directory: Path, name: str, nbytes: int) -> float:
    """Bytes per second of one job of WRITERS or READERS over a file of `nbytes`. The file is kept, because the readers'
    jobs read it.

    Raises:  RuntimeError: fio failed; the message is fio's own.
    """
    writes = name in WRITERS
    command = [
        *("fio", f"--name={name}", f"--filename={directory / 'fio.bin'}", f"--size={nbytes}", "--output-format=json"),
        # The blocks cannot be compressed or deduplicated, and the file has its full size before the clock starts.
        *("--refill_buffers", "--fallocate=none", "--invalidate=1", "--thread"),
        *(("--rw=write", "--end_fsync=1", "--overwrite=0") if writes else ("--rw=read",)),
        *(WRITERS if writes else READERS)[name],
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip() or done.stdout.strip()}")
    return rate_of(done.stdout, "write" if writes else "read")


def rate_of(output: str, direction: str) -> float:
    """Bytes per second from fio's JSON. fio's run time includes the last fsync."""
    # fio may print notes before the JSON.
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    rate: Any = job[direction]["bw_bytes"]
    return float(rate)
