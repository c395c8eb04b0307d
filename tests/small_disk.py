"""A file system of a few MiB that a test may fill."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[Path]:
    """Mount a tmpfs of that size at `path`; skip the test if mounting is not permitted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path, *, but: int = 0) -> None:
    """Fill the file system with the file `path`, leaving this many bytes free."""
    with path.open("ab", buffering=0) as file:
        if (nbytes := (free_bytes(path.parent) - but) // 4096 * 4096) > 0:
            os.posix_fallocate(file.fileno(), 0, nbytes)


def free_bytes(path: Path) -> int:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize
