"""What fio gets out of the disk that the store is measured on: its best durable writer, its best reader of any kind.

Each job's bytes per second hold everything until the data are safe: a writer ends with fsync. Readers begin without
the page cache (fio drops the file's pages first).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

# By name: flags. Direct writers at the depths of a queue that a disk has, and what the page cache makes of it.
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
    """Bytes per second of one job of WRITERS or READERS over a file of so many bytes, which stays for the readers.

    Raises:  RuntimeError: fio failed; the message is its own.
    """
    writes = name in WRITERS
    command = [
        *("fio", f"--name={name}", f"--filename={directory / 'fio.bin'}", f"--size={nbytes}", "--output-format=json"),
        # Blocks that nothing can compress or share; a file of its full size before the clock starts.
        *("--refill_buffers", "--fallocate=none", "--invalidate=1", "--thread"),
        *(("--rw=write", "--end_fsync=1", "--overwrite=0") if writes else ("--rw=read",)),
        *(WRITERS if writes else READERS)[name],
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip() or done.stdout.strip()}")
    return rate_of(done.stdout, "write" if writes else "read")


def rate_of(output: str, direction: str) -> float:
    """Bytes per second in fio's JSON, whose run time has the last fsync in it."""
    # Notes of fio's may stand before the JSON.
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    rate: Any = job[direction]["bw_bytes"]
    return float(rate)
