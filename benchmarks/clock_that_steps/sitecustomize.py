"""A Python process whose wall clock is set while it runs, as a host's is. Its directory goes into PYTHONPATH.

ANTEFIX_CLOCK_FILE: 8 bytes, by how many microseconds the clock differs (signed, little-endian). Monotonic clocks run
on, and so does C code's time. (Under libfaketime, which moves that too, gRPC's waits do not end in time.)
"""

import datetime
import mmap
import os
import struct
import time
from pathlib import Path

_real_ns, _datetime = time.time_ns, datetime.datetime
with Path(os.environ["ANTEFIX_CLOCK_FILE"]).open("rb") as _file:
    _shown = mmap.mmap(_file.fileno(), 8, prot=mmap.PROT_READ)


def _time_ns() -> int:
    return _real_ns() + 1000 * int(struct.unpack_from("<q", _shown)[0])


class _Datetime(_datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Datetime":
        return cls.fromtimestamp(time.time(), tz)


time.time_ns = _time_ns
time.time = lambda: _time_ns() / 1e9
datetime.datetime = _Datetime  # type: ignore[misc]
