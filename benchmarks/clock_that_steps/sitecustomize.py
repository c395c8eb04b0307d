"""Shifts the wall clock of a Python process while it runs, like a step of a host's clock. Add this to PYTHONPATH.

ANTEFIX_CLOCK_FILE names a file of 8 bytes: the shift in microseconds (signed, little-endian). Only our own code sees
the shifted clock. Libraries must compute deadlines from the same clock as the C code that waits for them.
(libfaketime shifts that clock too, and then gRPC's waits do not end in time.)
"""

import datetime
import mmap
import os
import struct
import sys
import time
from pathlib import Path

_real_ns, _datetime = time.time_ns, datetime.datetime
with Path(os.environ["ANTEFIX_CLOCK_FILE"]).open("rb") as _file:
    _shown = mmap.mmap(_file.fileno(), 8, prot=mmap.PROT_READ)


def _shown_ns() -> int:
    return _real_ns() + 1000 * int(struct.unpack_from("<q", _shown)[0])


def _is_ours() -> bool:
    """Whether the code that reads the clock is our own. `antefix.rpc` does not count as our own code here, because it
    computes gRPC deadlines from the clock.
    """
    name = str(sys._getframe(2).f_globals.get("__name__", ""))
    return name.startswith(("antefix", "benchmarks")) and name != "antefix.rpc"


def _time_ns() -> int:
    return _shown_ns() if _is_ours() else _real_ns()


def _time() -> float:
    return (_shown_ns() if _is_ours() else _real_ns()) / 1e9


class _Datetime(_datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Datetime":
        return cls.fromtimestamp((_shown_ns() if _is_ours() else _real_ns()) / 1e9, tz)


time.time_ns, time.time = _time_ns, _time
datetime.datetime = _Datetime  # type: ignore[misc]
