"""Where the bytes of one range come from: an answer that is still arriving, or memory. Read from start to end, once."""

from __future__ import annotations

from typing import Protocol

from antefix.errors import BlockCorrupt
from antefix.record import Buffer


class RangeSource(Protocol):
    """Used by one thread. `abort` may be called from any thread."""

    def take(self, nbytes: int) -> memoryview:
        """The next bytes, in memory of the source or of their own.

        Raises:  BlockCorrupt: the object ends before.  Unavailable: the answer broke off.
        """

    def fill(self, into: memoryview) -> None:
        """Write the next bytes into this buffer of bytes.  Raises:  as `take`."""

    def skip(self, nbytes: int) -> None: ...

    def finish(self) -> None:
        """All records were read. May wait for what was skipped last."""

    def abort(self) -> None:
        """Make a thread that waits for bytes fail at once."""

    def close(self) -> None:
        """This is called once, when no more bytes of the object are read. The call does not wait."""


class MemoryRange:
    """A range that was read as a whole."""

    def __init__(self, data: Buffer) -> None:
        self._view = memoryview(data).cast("B")
        self._at = 0

    def take(self, nbytes: int) -> memoryview:
        part = self._view[self._at : self._at + nbytes]
        if part.nbytes != nbytes:
            raise BlockCorrupt("the object ends before this record does")
        self._at += nbytes
        return part

    def fill(self, into: memoryview) -> None:
        into[:] = self.take(into.nbytes)

    def skip(self, nbytes: int) -> None:
        self._at += nbytes

    def finish(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...
