"""The store's gRPC service. The servicer knows protobuf and the event loop; every disk access happens in other threads.

Memory is bounded: a Get reads two windows of 4 MiB before they are sent, a Put collects at most PUT_BATCH_BYTES before
it waits for the writer, and both count against the number of streams served at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import grpc

from antefix import rpc
from antefix.discovery import ServiceLease
from antefix.errors import InvalidRequest, Overloaded
from antefix.events.block_events import BlockEvent
from antefix.events.event_seal import EventKeys
from antefix.events.event_wire import store_response
from antefix.events.numbered_log import Batch, Cursor, watch_log
from antefix.record import MEMORY_KINDS, STORED_KINDS, PutResult, Record, RecordKind, RecordName, Refusal, RefusalReason
from antefix.redis_access import RedisAccess
from antefix.secret import Keyring
from antefix.security.guard import admitted
from antefix.security.identity import Role
from antefix.security.listening import advertised
from antefix.security.process_security import open_security
from antefix.start_threads import start_threads
from antefix.store.allocator import keep_large_buffers
from antefix.store.fate_wire import fate_to_wire
from antefix.store.held_wire import held_to_wire
from antefix.store.payload_channel import SERVICE
from antefix.store.payload_wire import Piece, unpack_put_request
from antefix.store.pieces import HASHES_MAX, RecordAssembler, kind_of, messages_of, split_hashes
from antefix.store.plan_wire import plans_from_wire
from antefix.store_files.gone_blocks import fate_of
from antefix.store_files.record_format import RECORD_VERSIONS
from antefix.store_files.record_header import owner_row
from antefix.telemetry import Registry
from antefix.telemetry.settings import serve_metrics
from antefix.v1 import kvstore_pb2, kvstore_pb2_grpc
from antefix_kvstore.contents_wire import contents_to_wire
from antefix_kvstore.engine_stats import collect
from antefix_kvstore.free_space import fit_to_disk
from antefix_kvstore.group_commit import GroupCommitter
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.memory_records import TOO_LARGE, MemoryRecords
from antefix_kvstore.metrics import memory_metrics, store_metrics
from antefix_kvstore.object_upload import ObjectUploader
from antefix_kvstore.payload_stream import GetRange, PayloadStream
from antefix_kvstore.scrubber import Scrubber
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.store_contents import StoreContents
from antefix_kvstore.turns import Turns
from antefix_kvstore.upload_metrics import upload_metrics

T = TypeVar("T")
PUT_BATCH_BYTES: Final = 32 << 20
STREAMS_MAX: Final = 64
NAMES_MAX: Final = 65_536
_READ_THREADS: Final = 8
# Calls that a request waits for. Nobody waits for Touch, which readers send five times per second each.
_URGENT: Final = ("Lookup", "Fate")


class KvStoreServicer(kvstore_pb2_grpc.KvStoreServiceServicer):
    """Serves one engine."""

    def __init__(self, engine: StorageEngine) -> None:
        self.engine = engine
        self.writer = GroupCommitter(engine)
        self.pool = MemoryRecords(bytes_max=engine.config.handoff_bytes_max, ttl_s=engine.config.handoff_ttl_s)
        self.scrubber = Scrubber(engine, max(engine.config.scrub_bytes_per_s, 1))
        if engine.config.scrub_bytes_per_s:
            self.scrubber.start()
        self.uploader = ObjectUploader(engine) if engine.config.object_store else None
        if self.uploader is not None:
            self.uploader.start()
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="antefix-serve")
        start_threads(self._threads, _READ_THREADS)
        self.turns = Turns()
        self._num_streams = 0

    @property
    def num_streams(self) -> int:
        """The number of payload streams now being served."""
        return self._num_streams

    async def close(self) -> None:
        """Commit the puts that are queued, and close the store."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.scrubber.stop)
        if self.uploader is not None:
            await loop.run_in_executor(None, self.uploader.stop)
        await loop.run_in_executor(None, self.writer.stop)
        self._threads.shutdown()
        await loop.run_in_executor(None, self.engine.close)

    async def Lookup(
        self, request: kvstore_pb2.LookupRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.LookupResponse:
        chain, owners = split_hashes(request.chain), _granted_rows(request.owner)
        if request.all_spans:
            held = await self._in_thread(
                lambda: self.engine.held(chain, fingerprint=request.fingerprint, owners=owners)
            )
            return held_to_wire(held)
        found = await self._in_thread(lambda: self.engine.lookup(chain, fingerprint=request.fingerprint, owners=owners))
        return kvstore_pb2.LookupResponse(
            num_blocks=found.num_blocks, checkpoints=found.checkpoints, block_bytes=found.block_bytes
        )

    async def Fate(
        self, request: kvstore_pb2.FateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.FateResponse:
        engine, owners = self.engine, _granted_rows()
        found = await self._in_thread(
            lambda: fate_of(
                engine.reader.directory,
                engine.index,
                request.hash,
                fingerprint=request.fingerprint,
                now_ms=engine.clock_ms(),
                owners=owners,
            )
        )
        return fate_to_wire(found)

    def Get(
        self, request: kvstore_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[bytes, None]:
        kind, hashes = kind_of(request.kind), split_hashes(request.hashes)
        if len(hashes) > HASHES_MAX or request.first > len(hashes):
            raise InvalidRequest(f"at most {HASHES_MAX} hashes are allowed per stream, including those in `first`")
        if kind in MEMORY_KINDS:
            return self._from_memory(kind, request, hashes)
        rows = _granted_rows()
        known = request.record_format in RECORD_VERSIONS
        wanted = GetRange(
            kind=kind,
            hashes=hashes,
            fingerprint=request.fingerprint,
            first=request.first,
            offset=request.offset,
            record_format=request.record_format if known else 0,
            wants_seals=request.wants_seals,
            owners=rows,
        )
        # Each further generator around this one would add its cost to every message.
        return PayloadStream(self.engine, self._threads, self.turns, wanted).messages(_Counted(self))

    async def _from_memory(
        self, kind: RecordKind, request: kvstore_pb2.GetRequest, hashes: Sequence[bytes]
    ) -> AsyncGenerator[bytes, None]:
        grant = admitted().needed_grant()
        with _Counted(self):
            for number in range(request.first, len(hashes)):
                owners = None if grant is None else grant.owners
                kept = self.pool.get(kind, hashes[number], request.fingerprint, owners=owners)
                if kept is None:
                    return
                payload, sealed = kept
                offset = request.offset if number == request.first else 0
                sealed = sealed if request.wants_seals else b""
                for message in messages_of(payload, number, offset=offset, sealed=sealed):
                    yield message

    async def Put(
        self,
        request_iterator: AsyncIterator[Piece[kvstore_pb2.PutRequest]],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> kvstore_pb2.PutResponse:
        with _Counted(self):
            return _put_response(await self._receive(request_iterator))

    async def _receive(self, requests: AsyncIterator[Piece[kvstore_pb2.PutRequest]]) -> list[PutResult]:
        """Hand records to the writer in batches; one batch is committed while the next arrives."""
        grant = admitted().needed_grant()
        assembler = RecordAssembler(max(self.engine.config.record_bytes_max, self.pool.bytes_max))
        results: list[PutResult] = []
        batch: list[Record] = []
        batch_bytes = 0
        committing: Future[PutResult] | None = None
        async for piece in requests:
            try:
                record = assembler.add(piece)
            except InvalidRequest as err:
                self.engine.note_impossible(str(err))
                raise
            if record is None:
                continue
            if grant is not None:
                grant.check_owner(record.tenant)
            if record.kind in MEMORY_KINDS:
                results.append(self._keep_in_memory(record))
                continue
            batch.append(record)
            batch_bytes += len(record.payload)
            if batch_bytes >= PUT_BATCH_BYTES:
                if committing is not None:
                    results.append(await asyncio.wrap_future(committing))
                committing = self.writer.submit(batch)
                batch, batch_bytes = [], 0
        assembler.end()
        if committing is not None:
            results.append(await asyncio.wrap_future(committing))
        if batch:
            results.append(await asyncio.wrap_future(self.writer.submit(batch)))
        return results

    def _keep_in_memory(self, record: Record) -> PutResult:
        if not admitted().is_open and self.pool.is_others(record.kind, record.hash, record.tenant):
            refusal = Refusal(RefusalReason.OTHER, "another tenant has a record of this name")
            return PutResult(num_stored=0, num_existing=0, refused={record.hash: refusal})
        if self.pool.put(record):
            return PutResult(num_stored=1, num_existing=0)
        return PutResult(num_stored=0, num_existing=0, refused={record.hash: TOO_LARGE})

    async def Touch(
        self, request: kvstore_pb2.TouchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.TouchResponse:
        used, suspects, forged = _names(request.used), _names(request.suspect), _stored_names(request.forged)
        unusable = _stored_names(request.unusable)
        rows = _granted_rows() if forged or unusable else None

        def owned(names: list[RecordName]) -> list[RecordName]:
            return names if rows is None else self.engine.owned(names, rows)

        await self._in_thread(
            lambda: self.engine.note_use(
                used,
                suspects,
                forged=owned(forged),
                unusable=owned(unusable),
                hits=request.hits,
                misses=request.misses,
                bytes_read=request.bytes_read,
            )
        )
        return kvstore_pb2.TouchResponse()

    async def Pin(
        self, request: kvstore_pb2.PinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.PinResponse:
        names, owner = _stored_names(request.records), _owner_of(request)
        num_pinned = await self._in_thread(lambda: self.engine.pin(names, request.duration_s, owner=owner))
        return kvstore_pb2.PinResponse(num_pinned=num_pinned)

    async def Evict(
        self, request: kvstore_pb2.EvictRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.EvictResponse:
        names, owner = _stored_names(request.records), _owner_of(request)
        num_evicted = await self._in_thread(lambda: self.engine.evict(names, owner=owner))
        return kvstore_pb2.EvictResponse(num_evicted=num_evicted)

    async def Purge(
        self, request: kvstore_pb2.PurgeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.PurgeResponse:
        _granted_rows(request.owner)
        num_purged = await self._in_thread(lambda: self.engine.purge(owner_row(2, request.owner)))
        return kvstore_pb2.PurgeResponse(num_purged=num_purged + self.pool.purge(request.owner))

    async def Register(
        self, request: kvstore_pb2.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.RegisterResponse:
        plans = plans_from_wire(request)
        # The layout holds for all tenants. So where callers may not trust each other, the first registration stays.
        known = 0 if admitted().is_open else await self._in_thread(lambda: self._block_tokens(request.fingerprint))
        if known:
            plans = {}
        await self._in_thread(
            lambda: self.engine.register(request.fingerprint, request.block_size, plans, statement=request.statement)
        )
        return kvstore_pb2.RegisterResponse()

    async def Contents(
        self, request: kvstore_pb2.ContentsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[kvstore_pb2.ContentsResponse, None]:
        messages = contents_to_wire(StoreContents.of_reader(self.engine.reader))
        while (message := await self._in_thread(lambda: next(messages, None))) is not None:
            yield message

    def _block_tokens(self, fingerprint: bytes) -> int:
        with self.engine.index.txn() as txn:
            return self.engine.index.block_tokens(txn, fingerprint)

    async def Watch(
        self, request: kvstore_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kvstore_pb2.WatchResponse]:
        """Events from a cursor on; if the cursor is unknown or too old, a snapshot comes first."""
        cursor = Cursor(epoch=request.epoch, number=request.after)
        async with contextlib.aclosing(watch_log(self.engine.events, cursor, self._snapshot)) as batches:
            async for batch in batches:
                yield store_response(batch)

    async def _snapshot(self) -> AsyncGenerator[Batch[BlockEvent], None]:
        pieces = await self._in_thread(self.engine.snapshot)
        while (piece := await self._in_thread(functools.partial(next, pieces, None))) is not None:
            yield piece

    async def Stats(
        self, request: kvstore_pb2.StatsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kvstore_pb2.StatsResponse:
        stats = await self._in_thread(lambda: collect(self.engine))
        response = kvstore_pb2.StatsResponse(
            kinds=[
                kvstore_pb2.KindStats(
                    kind=kind.value,  # type: ignore[arg-type]
                    records=counted.records,
                    stored_bytes=counted.stored_bytes,
                    payload_bytes=counted.payload_bytes,
                )
                for kind, counted in stats.kinds.items()
            ],
            handoff_bytes_max=self.pool.bytes_max,
            scrubbed_bytes=self.scrubber.counters.bytes,
        )
        for kind in MEMORY_KINDS:
            records, nbytes = self.pool.count(kind)
            response.kinds.add(kind=kind.value, records=records, stored_bytes=nbytes, payload_bytes=nbytes)
        for name, value in (*stats.numbers.items(), *stats.texts.items()):
            setattr(response, name, value)
        return response

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class _Counted:
    """Counts a payload stream as long as it lasts; a stream above the limit is refused."""

    def __init__(self, servicer: KvStoreServicer) -> None:
        self._servicer = servicer

    def __enter__(self) -> None:
        if self._servicer._num_streams >= STREAMS_MAX:
            raise Overloaded(
                f"the store serves {STREAMS_MAX} payload streams already, which is the limit", retry_after_s=0.5
            )
        self._servicer._num_streams += 1

    def __exit__(self, *_: object) -> None:
        self._servicer._num_streams -= 1


def _names(records: Sequence[kvstore_pb2.RecordName]) -> list[RecordName]:
    if len(records) > NAMES_MAX:
        raise InvalidRequest(f"at most {NAMES_MAX} records may be named per call")
    return [(kind_of(record.kind), record.hash) for record in records]


def _stored_names(records: Sequence[kvstore_pb2.RecordName]) -> list[RecordName]:
    """Raises:  InvalidRequest: a kind that is not kept on disk."""
    names = _names(records)
    if any(kind not in STORED_KINDS for kind, _ in names):
        raise InvalidRequest("only blocks and checkpoints can be kept on disk")
    return names


def _owner_of(request: kvstore_pb2.PinRequest | kvstore_pb2.EvictRequest) -> bytes:
    """The owner whose records are meant; callers of version 1 give a name instead of a digest.

    Raises:  PermissionDenied: the call's grant is for another owner.
    """
    grant = admitted().needed_grant()
    if grant is not None:
        grant.check_owner(request.owner)
    return owner_row(2, request.owner) if request.owner else owner_row(1, request.tenant.encode())


def _granted_rows(asked: bytes = b"") -> tuple[bytes, ...] | None:
    """The owners whose records the call's grant covers, in the index's form; None: all owners, if the service
    authenticates nobody.

    asked: the owner that the caller names; empty: the caller names none.
    """
    grant = admitted().needed_grant()
    if grant is None:
        return None
    if asked:
        grant.check_owner(asked)
    return tuple(owner_row(2, owner) for owner in grant.owners)


def _put_response(results: Sequence[PutResult]) -> kvstore_pb2.PutResponse:
    return kvstore_pb2.PutResponse(
        num_stored=sum(result.num_stored for result in results),
        num_existing=sum(result.num_existing for result in results),
        refused=[
            kvstore_pb2.Refusal(hash=block_hash, reason=refusal.text, code=refusal.reason.value)
            for result in results
            for block_hash, refusal in result.refused.items()
        ],
    )


def register(servicer: KvStoreServicer, server: grpc.aio.Server, turns: Turns | None = None) -> None:
    """Add the service to a server. Methods that carry payloads bypass protobuf, which would copy them.

    turns: the turns of the servicer's streams, which then give way to lookups.
    """
    generated = _Handlers()
    add: Callable[..., None] = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
    add(servicer, generated)
    handlers = {
        **generated.handlers,
        "Get": grpc.unary_stream_rpc_method_handler(
            servicer.Get,
            request_deserializer=kvstore_pb2.GetRequest.FromString,
            # The reading thread packs the message, so that the event loop does not have to.
            response_serializer=None,
        ),
        "Put": grpc.stream_unary_rpc_method_handler(
            servicer.Put,
            request_deserializer=unpack_put_request,
            response_serializer=kvstore_pb2.PutResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((_Accepting(handlers, turns or Turns()),))


class _Accepting(grpc.GenericRpcHandler):
    """Finds a call's handler, which happens as soon as a call arrives. Makes payload streams give way to an urgent
    call.
    """

    def __init__(self, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]], turns: Turns) -> None:
        self._handlers = {f"/{SERVICE}/{name}": handler for name, handler in handlers.items()}
        self._urgent = frozenset(f"/{SERVICE}/{name}" for name in _URGENT)
        self._turns = turns

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method in self._urgent:
            self._turns.give_way()
        return self._handlers.get(handler_call_details.method)


class _Handlers:
    """Stands in for a server to record the handlers that generated code registers; some of them are then replaced."""

    def __init__(self) -> None:
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, _: object) -> None:
        """Add the same handlers, wrapped."""

    def add_registered_method_handlers(self, _: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self.handlers.update(handlers)


async def run(config: KvStoreConfig, *, watch_stdin: bool = False) -> None:
    """Serve the store in `config.dir` until a signal ends the process.

    Raises:  ConfigError: the directory is not a store or is in use, or the address cannot be listened on.
    """
    keep_large_buffers()
    # Imported objects live for ever, so the garbage collector need not scan them repeatedly while payloads stream.
    gc.freeze()
    loop = asyncio.get_running_loop()
    keyring = Keyring.from_file(config.secret_file) if config.secret_file else None
    security = open_security(Role.KVSTORE, config.credentials, keyring=keyring)
    security.use()
    config = fit_to_disk(config)
    engine = await loop.run_in_executor(None, StorageEngine, config)
    servicer = KvStoreServicer(engine)
    try:
        server = await rpc.start_server(
            config.address,
            lambda target: register(servicer, target, servicer.turns),
            [kvstore_pb2.DESCRIPTOR],
            security=security,
        )
    except BaseException:
        await servicer.close()
        raise
    # Only a store that announces itself needs an address that others can call.
    is_told = bool(config.lease_redis or config.advertise)
    address = advertised(server.address, config.advertise) if is_told else server.address
    async with _telling(config, engine, address), _leased(config, address):
        await rpc.run_until_signal(
            server,
            role="kvstore",
            stop=servicer.close,
            watch_stdin=watch_stdin,
            metrics_address=serve_metrics(config, registry_of(servicer), security),
            grace_s=config.grace_s,
        )


def registry_of(servicer: KvStoreServicer) -> Registry:
    """The metrics of this service. Needs a running event loop."""
    registry = Registry("kvstore")
    registry.add(functools.partial(store_metrics, servicer.engine, servicer.scrubber, servicer.writer))
    registry.add_in_loop(lambda: memory_metrics(servicer.pool, servicer.num_streams))
    if servicer.uploader is not None:
        registry.add(functools.partial(upload_metrics, servicer.uploader))
    return registry


def _telling(
    config: KvStoreConfig, engine: StorageEngine, address: str
) -> contextlib.AbstractAsyncContextManager[object]:
    """Inside this context, the store's events are published to Redis, if that is configured."""
    if not config.events_redis:
        return contextlib.nullcontext()
    # Imported here, because loading the Redis client takes a good part of a small store's start.
    from antefix.events.redis_stream import StreamPublisher, store_stream

    name = config.events_name or address
    where = RedisAccess.of(config.events_redis, config)
    return StreamPublisher(where, engine.events, store_stream(name), name, keys=_event_keys(config))


def _leased(config: KvStoreConfig, address: str) -> contextlib.AbstractAsyncContextManager[object]:
    """Inside this context, a lease in Redis says where the store is, if that is configured."""
    if not config.lease_redis:
        return contextlib.nullcontext()
    where = RedisAccess.of(config.lease_redis, config)
    return ServiceLease(where, role=Role.KVSTORE, name=config.name, address=address, keys=_event_keys(config))


def _event_keys(config: KvStoreConfig) -> EventKeys:
    if config.events_key_file:
        return EventKeys.from_file(config.events_key_file)
    return EventKeys.of(Keyring.from_file(config.secret_file))
