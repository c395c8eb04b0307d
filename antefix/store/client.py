"""Clients of a store. LocalStore reads the files of the same host and calls the service only to write; RemoteStore
calls it for everything. Both implement antefix.store.api.Store, connect when first used, and find a restarted service
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
import lmdb

from antefix import rpc
from antefix.errors import AntefixError, BlockCorrupt, InvalidRequest, Unavailable
from antefix.events.block_events import BlockEvent
from antefix.events.event_wire import watch_store
from antefix.events.numbered_log import Batch, Cursor
from antefix.layout import PayloadLayout
from antefix.record import (
    MEMORY_KINDS,
    BlockFate,
    Held,
    LookupResult,
    PutResult,
    Record,
    RecordKind,
    RecordName,
    Refusal,
    RefusalReason,
)
from antefix.request_limits import answered
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.breaker import Breaker
from antefix.store.fate_wire import fate_from_wire
from antefix.store.file_reads import FileReads
from antefix.store.held_wire import held_from_wire
from antefix.store.payload_channel import SERVICE, PayloadChannel
from antefix.store.payload_wire import Piece, pack_put_request
from antefix.store.pieces import HASHES_MAX, join_hashes, request_pieces
from antefix.store.plan_wire import plans_to_wire
from antefix.store.record_source import records_of
from antefix.store.store_stats import KindTotals, StoreTotals
from antefix.store.stream_progress import Progress
from antefix.store_files import codec
from antefix.store_files.encryption import KeyRing
from antefix.store_files.gone_blocks import fate_of
from antefix.store_files.read_log import ReadEvidence
from antefix.store_files.record_format import RECORD_VERSION
from antefix.store_files.seal import SealBroken, Seals
from antefix.store_files.segment_reader import ReadOutcome, StoreReader, wall_ms
from antefix.telemetry.context import outgoing
from antefix.v1 import kvstore_pb2, kvstore_pb2_grpc

log = logging.getLogger("antefix.store")

T = TypeVar("T")
CALL_DEADLINE_S: Final = 10.0
# What an answer waits for: a search in the store's index takes milliseconds.
SEARCH_DEADLINE_S: Final = 2.0
# It reads the whole index.
PURGE_DEADLINE_S: Final = 300.0
# The most for a stream of payloads: 3.5 GB, a 1M-token prefix, at 100 MB/s. Mostly `Breaker.limit_s` is less.
STREAM_DEADLINE_S: Final = 60.0
# How large one payload is taken to be before it comes: a checkpoint or handoff of V4 takes some MB.
_PAYLOAD_BYTES_GUESSED: Final = 16 << 20
# A stream that breaks goes on where it stopped, this often.
NUM_RESUMES_MAX: Final = 3
# How long uses wait to be told in one call, and how many may wait.
TELL_S: Final = 0.2
NUM_TOLD_MAX: Final = 4096


class RemoteStore:
    """A store over gRPC. Calls run on the event loop, but payloads are received in threads (`_receive`)."""

    def __init__(
        self,
        address: str,
        *,
        deadline_s: float = STREAM_DEADLINE_S,
        seals: Seals | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """seals: where given, only sealed records are taken.  credentials: what we show; without them what this process
        shows."""
        self.address = address
        self._credentials = credentials
        self._seals = seals
        self._deadline_s = deadline_s
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._payloads: PayloadChannel | None = None
        self.breaker = Breaker()

    @property
    def stub(self) -> Any:
        if self._channel is None:
            self._channel = rpc.channel(self.address, of=Role.KVSTORE, credentials=self._credentials)
            stub_type: Callable[[grpc.aio.Channel], Any] = kvstore_pb2_grpc.KvStoreServiceStub
            self._stub = stub_type(self._channel)
            # Past protobuf's copies.
            self._stub.Put = self._channel.stream_unary(
                f"/{SERVICE}/Put",
                request_serializer=pack_put_request,
                response_deserializer=kvstore_pb2.PutResponse.FromString,
            )
        return self._stub

    @property
    def num_broken_seals(self) -> int:
        """Records that were read and not sealed by this deployment."""
        return self._seals.num_broken if self._seals is not None else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.breaker.close()
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        if self._payloads is not None:
            self._payloads.close()
            self._payloads = None

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        request = kvstore_pb2.LookupRequest(chain=join_hashes(chain), fingerprint=fingerprint, owner=tenant)
        with self._asked():
            response = answered(await self.stub.Lookup(request, timeout=SEARCH_DEADLINE_S, metadata=outgoing()))
        if max(response.num_blocks, *response.checkpoints, 0) > len(chain):
            raise Unavailable(
                f"the store's answer cannot be right: it names more than the {len(chain)} blocks asked for"
            )
        return LookupResult(
            num_blocks=response.num_blocks,
            checkpoints=tuple(response.checkpoints),
            block_bytes=response.block_bytes,
        )

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        request = kvstore_pb2.LookupRequest(
            chain=join_hashes(chain), fingerprint=fingerprint, owner=tenant, all_spans=True
        )
        with self._asked():
            response = answered(await self.stub.Lookup(request, timeout=SEARCH_DEADLINE_S, metadata=outgoing()))
        return held_from_wire(response)

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        with self._asked():
            request = kvstore_pb2.FateRequest(hash=hash, fingerprint=fingerprint)
            response = answered(await self.stub.Fate(request, timeout=SEARCH_DEADLINE_S, metadata=outgoing()))
        return fate_from_wire(response)

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        if len(hashes) != len(into):
            raise InvalidRequest(f"{len(hashes)} hashes but {len(into)} buffers")
        num_good = 0
        for first in range(0, len(hashes), HASHES_MAX):
            part = hashes[first : first + HASHES_MAX]
            buffers = _Buffers([buffer.cast("B") for buffer in into[first : first + HASHES_MAX]])
            got = await self._receive(RecordKind.BLOCK, part, fingerprint, tenant, buffers.get, buffers.nbytes)
            num_good += got
            if got < len(part):
                break
        return num_good

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        payloads: list[bytearray] = []

        def allocate(_: int, nbytes: int) -> memoryview:
            if not payloads:
                payloads.append(bytearray(nbytes))
            return memoryview(payloads[0])

        num_good = await self._receive(kind, [hash], fingerprint, tenant, allocate, _PAYLOAD_BYTES_GUESSED)
        return bytes(payloads[0]) if num_good else None

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these, whole, to be stored elsewhere."""
        payloads: list[bytearray] = []
        sealed: list[bytes] = []

        def allocate(index: int, nbytes: int) -> memoryview:
            if index == len(payloads):
                payloads.append(bytearray(nbytes))
            return memoryview(payloads[index])

        nbytes = _PAYLOAD_BYTES_GUESSED * len(hashes)
        num_good = await self._receive(kind, hashes[:HASHES_MAX], fingerprint, tenant, allocate, nbytes, sealed)
        return records_of(sealed[:num_good], payloads[:num_good])

    async def put(self, records: Sequence[Record]) -> PutResult:
        nbytes = sum(memoryview(record.payload).nbytes for record in records)
        limit_s = self.breaker.limit_s(nbytes, self._deadline_s)
        with self._asked(nbytes):
            response = answered(await self.stub.Put(_in_turn(records), timeout=limit_s, metadata=outgoing()))
        return PutResult(
            num_stored=response.num_stored,
            num_existing=response.num_existing,
            refused={refusal.hash: Refusal(_reason_of(refusal.code), refusal.reason) for refusal in response.refused},
        )

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        """Tell the store the byte layout behind a fingerprint; without it, blocks are stored uncompressed."""
        plans = {
            RecordKind.BLOCK: codec.plan_of_block(layout),
            RecordKind.CHECKPOINT: codec.plan_of_checkpoint(layout),
        }
        await self.register_plans(fingerprint, layout.block_size, plans, statement=statement)

    async def register_plans(
        self,
        fingerprint: bytes,
        block_tokens: int,
        plans: Mapping[RecordKind, codec.PlanePlan],
        *,
        statement: bytes = b"",
    ) -> None:
        """As `register`, with plans as another store has them."""
        request = kvstore_pb2.RegisterRequest(
            fingerprint=fingerprint,
            block_size=block_tokens,
            statement=statement,
            **plans_to_wire(plans),
        )
        with self._asked():
            await self.stub.Register(request, timeout=CALL_DEADLINE_S)

    async def purge(self, owner: bytes) -> int:
        """Drop all of an owner's records, pinned or not, in memory too; without a user: of all of a tenant's users.

        Returns how many went.
        """
        with self._asked():
            request = kvstore_pb2.PurgeRequest(owner=owner)
            return int(
                answered(await self.stub.Purge(request, timeout=PURGE_DEADLINE_S, metadata=outgoing())).num_purged
            )

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        request = kvstore_pb2.PinRequest(records=map(_name, names), duration_s=duration_s, owner=owner)
        with self._asked():
            return int(answered(await self.stub.Pin(request, timeout=CALL_DEADLINE_S)).num_pinned)

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        request = kvstore_pb2.EvictRequest(records=map(_name, names), owner=owner)
        with self._asked():
            return int(answered(await self.stub.Evict(request, timeout=CALL_DEADLINE_S)).num_evicted)

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        return watch_store(self.stub, cursor)

    async def stats(self) -> StoreTotals:
        with rpc.rpc_errors():
            answer = answered(await self.stub.Stats(kvstore_pb2.StatsRequest(), timeout=CALL_DEADLINE_S))
        kinds = dict.fromkeys(RecordKind, KindTotals())
        for kind in answer.kinds:
            kinds[RecordKind(kind.kind)] = KindTotals(
                num_records=kind.records, stored_bytes=kind.stored_bytes, payload_bytes=kind.payload_bytes
            )
        return StoreTotals(
            kinds=kinds,
            budget_bytes=answer.budget_bytes,
            used_bytes=answer.used_bytes,
            hits=answer.hits,
            misses=answer.misses,
            bytes_read=answer.bytes_read,
            bytes_written=answer.bytes_written,
            evictions=answer.evictions,
            corrupt=answer.corrupt,
            limit_bytes=answer.limit_bytes,
            free_bytes=answer.free_bytes,
            free_bytes_min=answer.free_bytes_min,
            stopped=answer.stopped,
            impossible_writes=answer.impossible_writes,
            impossible_write=answer.impossible_write,
        )

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        for unusable in hashes:
            log.warning("a %s in the store holds what is no number: %s", kind.name.lower(), unusable.hex())
        if hashes and kind not in MEMORY_KINDS:
            await self._tell(kvstore_pb2.TouchRequest(unusable=[_name((kind, name)) for name in hashes]))

    async def tell_forged(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Have the store quarantine records that have no right seal: it cannot tell by itself, and would keep them.

        At once: what is put in their place next must not be taken for what is there already.
        """
        for forged in hashes:
            log.warning("a %s in the store was not sealed by this deployment: %s", kind.name.lower(), forged.hex())
        if hashes and kind not in MEMORY_KINDS:
            await self._tell(kvstore_pb2.TouchRequest(forged=[_name((kind, forged)) for forged in hashes]))

    async def _tell(self, request: kvstore_pb2.TouchRequest) -> None:
        try:
            with self._asked():
                await self.stub.Touch(request, timeout=CALL_DEADLINE_S)
        except AntefixError as err:
            log.warning("the store could not be told: %s", err)

    @contextlib.contextmanager
    def _asked(self, nbytes: int = 0) -> Iterator[None]:
        """Around a call that somebody waits for.  Raises: as `Breaker.asked`, and what the service answered."""
        if self.stub is not None and self._channel is not None:
            self.breaker.follow(self.address, self._channel)
        with self.breaker.asked(nbytes), rpc.rpc_errors():
            yield

    async def _receive(
        self,
        kind: RecordKind,
        hashes: Sequence[bytes],
        fingerprint: bytes,
        tenant: bytes,
        buffer: Callable[[int, int], memoryview],
        nbytes: int,
        sealed: list[bytes] | None = None,
    ) -> int:
        """Fill buffers from a stream, resuming where it broke. Returns the number of leading payloads received."""
        if self._payloads is None:
            self._payloads = PayloadChannel(self.address, self._credentials)
        done = Progress(kind, hashes, fingerprint, tenant=tenant, seals=self._seals, sealed=sealed)
        record_format = RECORD_VERSION
        for attempt in range(NUM_RESUMES_MAX + 1):
            request = kvstore_pb2.GetRequest(
                kind=kind.value,  # type: ignore[arg-type]
                hashes=join_hashes(hashes),
                fingerprint=fingerprint,
                first=done.index,
                offset=done.offset,
                record_format=record_format,
                wants_seals=self._seals is not None or sealed is not None,
            )
            limit_s = self.breaker.limit_s(nbytes, self._deadline_s)
            try:
                with self._asked(nbytes):
                    await self._payloads.receive(request, done, buffer, deadline_s=limit_s)
                return done.index
            except SealBroken:
                # Whole, so the store would send it again.
                await self.tell_forged(kind, [hashes[done.index]])
                return done.index
            except (Unavailable, BlockCorrupt) as err:
                if attempt == NUM_RESUMES_MAX:
                    raise
                if isinstance(err, BlockCorrupt):
                    # On its way or in the store: have the store look itself. What it finds bad it counts, quarantines
                    # and does not send.
                    record_format = 0
        raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class _Buffers:
    """The caller's buffers of one stream."""

    buffers: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def get(self, index: int, _: int) -> memoryview:
        return self.buffers[index]


async def _in_turn(records: Sequence[Record]) -> AsyncIterator[Piece[kvstore_pb2.PutRequest]]:
    for piece in request_pieces(records):
        yield piece


@dataclass(slots=True)
class _Uses:
    """What this process read since the service was last told."""

    used: dict[bytes, set[RecordName]] = field(default_factory=dict)
    suspects: set[RecordName] = field(default_factory=set)
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    def requests(self) -> list[kvstore_pb2.TouchRequest]:
        first = kvstore_pb2.TouchRequest(
            suspect=[_name(name) for name in self.suspects],
            hits=self.hits,
            misses=self.misses,
            bytes_read=self.bytes_read,
        )
        return [
            first,
            *(
                kvstore_pb2.TouchRequest(fingerprint=fingerprint, used=[_name(name) for name in names])
                for fingerprint, names in self.used.items()
            ),
        ]


class LocalStore:
    """A store on the same host: reads go straight to its files, in threads; writes and handoffs go to the service."""

    def __init__(
        self,
        directory: Path | str,
        address: str,
        *,
        deadline_s: float = STREAM_DEADLINE_S,
        keys: KeyRing | None = None,
        seals: Seals | None = None,
    ) -> None:
        """keys: for stores that are encrypted; without them, encrypted records are read through the service.

        seals: where given, only sealed records are taken.
        """
        self.directory = Path(directory)
        self._decrypt = keys.decrypt if keys else None
        self._seals = seals
        self.remote = RemoteStore(address, deadline_s=deadline_s, seals=seals)
        self._reader: StoreReader | None = None
        self.reads = FileReads(f"the store in {self.directory}", self.remote.breaker)
        self._uses = _Uses()
        self._evidence: ReadEvidence | None = None
        self._telling: asyncio.Task[None] | None = None

    @property
    def breaker(self) -> Breaker:
        """Of the calls that go to the service."""
        return self.remote.breaker

    @property
    def num_broken_seals(self) -> int:
        """Records that were read and not sealed by this deployment."""
        return self._seals.num_broken if self._seals is not None else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._telling is not None:
            await self._telling
        await self.remote.close()
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
                # The service is told later, and neither it nor this process may live until then.
                self._evidence = self._evidence or ReadEvidence(self.directory)
                self._evidence.used(hashes[outcome.num_good - 1])
            return outcome

        outcome = await self._in_thread(read, sum(buffer.nbytes for buffer in into))
        last = hashes[outcome.num_good - 1] if outcome.num_good else None
        if outcome.locked and not outcome.suspects and not outcome.forged:
            done = outcome.num_good
            rest = self.remote.get_blocks(hashes[done:], into[done:], fingerprint=fingerprint, tenant=tenant)
            return done + await rest
        self._note(RecordKind.BLOCK, last, len(hashes) - outcome.num_good, outcome, fingerprint)
        await self.remote.tell_forged(RecordKind.BLOCK, outcome.forged)
        return outcome.num_good

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        if kind in MEMORY_KINDS:
            return await self.remote.get(kind, hash, fingerprint=fingerprint, tenant=tenant)
        payload, outcome = await self._in_thread(
            lambda reader: reader.read(kind, hash, fingerprint=fingerprint, tenant=tenant), _PAYLOAD_BYTES_GUESSED
        )
        if outcome.locked:
            return await self.remote.get(kind, hash, fingerprint=fingerprint, tenant=tenant)
        self._note(kind, hash if payload is not None else None, int(payload is None), outcome, fingerprint)
        await self.remote.tell_forged(kind, outcome.forged)
        return None if payload is None else bytes(payload)

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these, whole, to be stored elsewhere."""
        return await self.remote.get_records(kind, hashes, fingerprint=fingerprint, tenant=tenant)

    async def put(self, records: Sequence[Record]) -> PutResult:
        return await self.remote.put(records)

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        await self.remote.reject(kind, hashes)

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        await self.remote.register(fingerprint, layout, statement=statement)

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        return await self.remote.pin(names, duration_s=duration_s, owner=owner)

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        return await self.remote.evict(names, owner=owner)

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        return self.remote.watch(cursor)

    async def stats(self) -> StoreTotals:
        return await self.remote.stats()

    async def _in_thread(self, call: Callable[[StoreReader], T], nbytes: int = 0) -> T:
        """nbytes: that may be read.

        Raises:  Unavailable: the files cannot be read, however that shows: to a worker that is a miss.  ReadHangs.
        """
        try:
            return await self.reads.run(lambda: call(self._open_reader()), nbytes)
        except (lmdb.Error, OSError) as err:
            raise Unavailable(f"the store in {self.directory} cannot be read, see `antefix fsck`: {err}") from err

    def _open_reader(self) -> StoreReader:
        """The reader, opened when the store first exists, and again after the service rebuilt the index."""
        reader = self._reader
        if reader is None or reader.index.replaced:
            # The old one is left to the collector: another thread may still be reading through it.
            reader = self._reader = StoreReader(self.directory, decrypt=self._decrypt, seals=self._seals)
        return reader

    def _note(
        self, kind: RecordKind, last: bytes | None, num_missed: int, outcome: ReadOutcome, fingerprint: bytes
    ) -> None:
        """Tell the service soon, without waiting: eviction must know what is used, no answer depends on it."""
        uses = self._uses
        uses.hits += outcome.num_good
        uses.misses += num_missed
        uses.bytes_read += outcome.bytes_read
        names = uses.used.setdefault(fingerprint, set())
        if last is not None and len(names) < NUM_TOLD_MAX:
            names.add((kind, last))
        if len(uses.suspects) < NUM_TOLD_MAX:
            uses.suspects.update((kind, suspect) for suspect in outcome.suspects)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell(), context=Context())

    async def _tell(self) -> None:
        await asyncio.sleep(TELL_S)
        uses, self._uses = self._uses, _Uses()
        for request in uses.requests():
            try:
                with self.remote._asked():
                    await self.remote.stub.Touch(request, timeout=CALL_DEADLINE_S)
            except AntefixError:
                # Recency that the service does not hear of costs it a worse choice, nothing else.
                return


def _name(name: RecordName) -> kvstore_pb2.RecordName:
    return kvstore_pb2.RecordName(kind=name[0].value, hash=name[1])  # type: ignore[arg-type]


def _reason_of(code: str) -> RefusalReason:
    return RefusalReason(code) if code in set(RefusalReason) else RefusalReason.OTHER
