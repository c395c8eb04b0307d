"""An embedded store for programs with their own threads: reads run in the calling thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from antefix.blocking import BlockingStore
from antefix.errors import InvalidRequest
from antefix.record import LookupResult, RecordKind
from antefix_kvstore.embedded_store import EmbeddedStore


class ReadingHere(BlockingStore):
    """A `BlockingStore` of an embedded store whose reads do not use another thread.

    A read through the event loop switches threads four times. If another thread computes in Python, each switch waits
    for the interpreter's lock, up to 5 ms, which is more than reading a small prompt takes.
    """

    def __init__(self, store: EmbeddedStore) -> None:
        super().__init__(store)
        self._here: Final = store
        self._condition: Final = threading.Condition()
        self._num_reading = 0
        self._is_ending = False

    def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        with self._reading():
            return self._here.lookup_here(chain, fingerprint=fingerprint)

    def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        with self._reading():
            return self._here.get_blocks_here(hashes, into, fingerprint=fingerprint, tenant=tenant)

    def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        with self._reading():
            return self._here.get_here(kind, hash, fingerprint=fingerprint, tenant=tenant)

    def close(self) -> None:
        """Wait for running reads, then close, because nobody may read from closed files."""
        with self._condition:
            self._is_ending = True
            self._condition.wait_for(lambda: not self._num_reading)
            self._here.close_here()
        super().close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._condition:
            if self._is_ending:
                raise InvalidRequest("this store is closed; open it again")
            self._num_reading += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_reading -= 1
                self._condition.notify_all()
