"""The processor time that a process has taken so far (Linux)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int, *, proc: Path = PROC) -> float:
    """Seconds in user and system mode, of all threads together.  Raises:  OSError: there is no such process."""
    # The name, in brackets, may hold anything.
    fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return TICK_S * (int(fields[11]) + int(fields[12]))
