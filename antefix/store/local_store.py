"""A store on the same host: reads go straight to its files, in threads; writes and handoffs go to its service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from contextvars import Context
from pathlib import Path
from typing import Final, TypeVar

import lmdb

from antefix.end_tasks import end_tasks
from antefix.errors import Unavailable
from antefix.record import MEMORY_KINDS, BlockFate, Held, LookupResult, RecordKind
from antefix.store.file_reads import FileReads
from antefix.store.payload_reads import PAYLOAD_BYTES_GUESSED, STREAM_DEADLINE_S
from antefix.store.remote_store import RemoteStore
from antefix.store.uses_told import UsesTold
from antefix.store_files.encryption import KeyRing
from antefix.store_files.gone_blocks import fate_of
from antefix.store_files.read_log import ReadEvidence
from antefix.store_files.seal import Seals
from antefix.store_files.segment_files import SWEEP_S
from antefix.store_files.segment_reader import ReadOutcome, StoreReader, wall_ms

T = TypeVar("T")


class LocalStore(RemoteStore):
    """A client of a store service whose files are on this host: it reads the files itself.

    Connects when first used. The client reconnects after the service restarts, and reopens the index after the index
    was rebuilt.
    """

    def __init__(
        self,
        directory: Path | str,
        address: str,
        *,
        deadline_s: float = STREAM_DEADLINE_S,
        keys: KeyRing | None = None,
        seals: Seals | None = None,
    ) -> None:
        """keys: decrypt the records of encrypted stores; without keys, encrypted records are read through the service.

        seals: if given, only records with a valid seal are accepted.
        """
        super().__init__(address, deadline_s=deadline_s, seals=seals)
        self.directory = Path(directory)
        self._decrypt = keys.decrypt if keys else None
        self._reader: StoreReader | None = None
        self.reads = FileReads(f"the store in {self.directory}", self.breaker)
        self.uses: Final = UsesTold(self.touch)
        self._evidence: ReadEvidence | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._is_closed = False

    async def close(self) -> None:
        self._is_closed = True
        if self._sweeping is not None:
            await end_tasks([self._sweeping])
        await self.uses.close()
        await super().close()
        hangs = self.reads.hangs
        self.reads.close()
        if not hangs:
            self._close_files()

    def _close_files(self) -> None:
        if self._evidence is not None:
            self._evidence.close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        return await self._in_thread(lambda reader: reader.lookup(chain, fingerprint=fingerprint))

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        return await self._in_thread(lambda reader: reader.held(chain, fingerprint=fingerprint))

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        return await self._in_thread(
            lambda reader: fate_of(reader.directory, reader.index, hash, fingerprint=fingerprint, now_ms=wall_ms())
        )

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        if not hashes:
            return 0

        def read(reader: StoreReader) -> ReadOutcome:
            outcome = reader.read_blocks(hashes, into, fingerprint=fingerprint, tenant=tenant)
            if outcome.num_good:
                # The service hears of the read later, and the service or this process may die before that.
                self._evidence = self._evidence or ReadEvidence(self.directory)
                self._evidence.used(hashes[outcome.num_good - 1])
            return outcome

        outcome = await self._in_thread(read, sum(buffer.nbytes for buffer in into))
        last = hashes[outcome.num_good - 1] if outcome.num_good else None
        if outcome.locked and not outcome.suspects and not outcome.forged:
            done = outcome.num_good
            rest = super().get_blocks(hashes[done:], into[done:], fingerprint=fingerprint, tenant=tenant)
            return done + await rest
        self.uses.note(RecordKind.BLOCK, last, len(hashes) - outcome.num_good, outcome, fingerprint)
        await self.tell_forged(RecordKind.BLOCK, outcome.forged)
        return outcome.num_good

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        if kind in MEMORY_KINDS:
            return await super().get(kind, hash, fingerprint=fingerprint, tenant=tenant)
        payload, outcome = await self._in_thread(
            lambda reader: reader.read(kind, hash, fingerprint=fingerprint, tenant=tenant), PAYLOAD_BYTES_GUESSED
        )
        if outcome.locked:
            return await super().get(kind, hash, fingerprint=fingerprint, tenant=tenant)
        self.uses.note(kind, hash if payload is not None else None, int(payload is None), outcome, fingerprint)
        await self.tell_forged(kind, outcome.forged)
        return None if payload is None else bytes(payload)

    async def _in_thread(self, call: Callable[[StoreReader], T], nbytes: int = 0) -> T:
        """Run `call` in a thread.  nbytes: how many bytes it may read.

        Raises:  Unavailable: the files cannot be read, for any reason; a worker treats it as a miss.  ReadHangs.
        """
        try:
            return await self.reads.run(lambda: call(self._open_reader()), nbytes)
        except (lmdb.Error, OSError) as err:
            raise Unavailable(f"the store in {self.directory} cannot be read, see `antefix fsck`: {err}") from err
        finally:
            if not self._is_closed and (self._sweeping is None or self._sweeping.done()):
                self._sweeping = asyncio.get_running_loop().create_task(self._sweep(), context=Context())

    async def _sweep(self) -> None:
        """Close deleted segments even if nothing is read any more: an open file keeps its space on the disk."""
        while (reader := self._reader) is not None and reader.runs.files.num_open:
            files = reader.runs.files
            del reader
            await asyncio.sleep(SWEEP_S)
            if self.reads.hangs:
                continue  # it would count as a read that was not started
            with contextlib.suppress(Unavailable, OSError):
                await self.reads.run(files.sweep)

    def _open_reader(self) -> StoreReader:
        """The reader, opened when the store first exists, and again after the service rebuilt the index."""
        reader = self._reader
        if reader is None or reader.index.replaced:
            # The garbage collector closes the old reader: another thread may still be reading through it.
            reader = self._reader = StoreReader(self.directory, decrypt=self._decrypt, seals=self._seals)
        return reader
