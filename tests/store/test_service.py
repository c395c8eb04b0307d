"""The real store service on 127.0.0.1:0, used through both clients."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from antefix import rpc
from antefix.errors import InvalidRequest, Unavailable
from antefix.events.block_events import EventKind
from antefix.events.numbered_log import Cursor
from antefix.record import STORED_KINDS, Record, RecordKind, RecordName
from antefix.store.api import Store
from antefix.store.local_store import LocalStore
from antefix.store.remote_store import RemoteStore
from antefix.v1 import kvstore_pb2
from antefix_console.commands import doctor
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.kvstore.test_embedded_store import LAYOUT
from tests.waiting import AT_MOST_S, until

PROMPT = Prompt(list(range(BLOCK * 6)), payload_bytes=2_500_001)
MIB = 1 << 20


class Service:
    """A store service that a test can stop and restart."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.config = KvStoreConfig(dir=str(directory), budget_bytes=512 * MIB, **settings)  # type: ignore[arg-type]
        self.address = "127.0.0.1:0"

    async def start(self) -> None:
        self.servicer = KvStoreServicer(StorageEngine(self.config))
        self.server = await rpc.start_server(
            self.address,
            lambda target: register(self.servicer, target),
            [kvstore_pb2.DESCRIPTOR],
        )
        self.address = self.server.address

    async def stop(self) -> None:
        await self.server.drain(0.2)
        await self.servicer.close()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    served = Service(tmp_path / "store", handoff_bytes_max=1 * MIB)
    await served.start()
    yield served
    await served.stop()


@pytest.fixture(params=["local", "remote"])
async def store(request: pytest.FixtureRequest, service: Service) -> AsyncIterator[Store]:
    client: Store = (
        LocalStore(service.config.dir, service.address) if request.param == "local" else RemoteStore(service.address)
    )
    yield client
    await client.close()


async def test_put_lookup_get(store: Store) -> None:
    result = await store.put([*PROMPT.blocks(), PROMPT.checkpoint(2), PROMPT.checkpoint(5)])
    assert (result.num_stored, result.num_existing, result.refused) == (8, 0, {})
    found = await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    assert (found.num_blocks, found.checkpoints, found.block_bytes) == (6, (3, 6), 6 * PROMPT.payload_bytes)
    into = PROMPT.buffers()
    assert await store.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT) == 6
    assert [bytes(b) for b in into] == [PROMPT.payload(i) for i in range(6)]
    checkpoint = await store.get(RecordKind.CHECKPOINT, PROMPT.hashes[2], fingerprint=FINGERPRINT)
    assert checkpoint == PROMPT.payload(2, RecordKind.CHECKPOINT)


async def test_a_get_is_short_where_a_block_is_missing(store: Store) -> None:
    await store.put(PROMPT.blocks(4))
    into = PROMPT.buffers()
    assert await store.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT) == 4
    assert await store.get_blocks(PROMPT.hashes, into, fingerprint=b"G" * 32) == 0
    assert await store.get(RecordKind.CHECKPOINT, PROMPT.hashes[0], fingerprint=FINGERPRINT) is None


async def test_handoffs_live_in_memory_within_their_bound(store: Store, service: Service) -> None:
    def handoff(number: int, nbytes: int) -> Record:
        return PROMPT.block(0, kind=RecordKind.HANDOFF, hash=bytes([number]) * 32, payload=bytes([number]) * nbytes)

    assert (await store.put([handoff(1, 600_000)])).num_stored == 1
    assert await store.get(RecordKind.HANDOFF, b"\1" * 32, fingerprint=FINGERPRINT) == b"\1" * 600_000
    await store.put([handoff(2, 600_000)])
    assert await store.get(RecordKind.HANDOFF, b"\1" * 32, fingerprint=FINGERPRINT) is None
    assert (await store.put([handoff(3, 2 * MIB)])).refused
    await store.put([PROMPT.block(0, kind=RecordKind.HANDOFF, hash=b"\4" * 32, payload=b"x", ttl_s=0.05)])
    await asyncio.sleep(0.1)
    assert await store.get(RecordKind.HANDOFF, b"\4" * 32, fingerprint=FINGERPRINT) is None


async def test_malformed_puts_are_errors(store: Store) -> None:
    with pytest.raises(InvalidRequest):
        await store.put([PROMPT.block(0, hash=b"short")])
    with pytest.raises(InvalidRequest):
        await store.put([PROMPT.block(0, payload=b"")])
    assert (await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 0


async def test_a_restarted_service_is_found_again(store: Store, service: Service) -> None:
    await store.put(PROMPT.blocks(2))
    await service.stop()
    with pytest.raises(Unavailable):
        await store.put(PROMPT.blocks(3))
    await service.start()
    await until(lambda: store.put(PROMPT.blocks(3)), "the service is found again", despite=Unavailable)
    assert (await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 3


async def test_a_local_store_before_its_service_is_unavailable(tmp_path: Path) -> None:
    client = LocalStore(tmp_path / "nothing", "127.0.0.1:1")
    with pytest.raises(Unavailable):
        await client.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    await client.close()


async def test_both_clients_pin_evict_and_count_a_tenants_records(store: Store) -> None:
    def block(index: int) -> RecordName:
        return RecordKind.BLOCK, PROMPT.hashes[index]

    mine = owner("")
    await store.put([*PROMPT.blocks(3), PROMPT.checkpoint(2)])
    assert (
        await store.pin([block(2), (RecordKind.CHECKPOINT, PROMPT.hashes[2]), block(4)], duration_s=60, owner=mine) == 2
    )
    assert await store.pin([block(2)], duration_s=0, owner=mine) == 1
    assert await store.pin([block(2)], duration_s=60, owner=owner("other")) == 0
    assert await store.evict([block(1)], owner=owner("other")) == 0
    before = await store.stats()
    assert [before.kinds[kind].num_records for kind in STORED_KINDS] == [3, 1]
    assert before.kinds[RecordKind.BLOCK].payload_bytes == 3 * PROMPT.payload_bytes
    # All records that depend on it are evicted with it.
    assert await store.evict([block(1)], owner=mine) == 3
    after = await store.stats()
    assert [after.kinds[kind].num_records for kind in STORED_KINDS] == [1, 0]
    assert 0 < after.used_bytes < after.budget_bytes


async def test_both_clients_watch(store: Store) -> None:
    await store.put(PROMPT.blocks(2))
    async with asyncio.timeout(AT_MOST_S), contextlib.aclosing(store.watch()) as batches:
        whole = await anext(batches)
        assert whole.snapshot_begins and whole.snapshot_ends
        await store.evict([(RecordKind.BLOCK, PROMPT.hashes[1])], owner=owner(""))
        evicted = await anext(batches)
        assert [(event.kind, event.names()) for event in evicted.events] == [(EventKind.EVICTED, [PROMPT.hashes[1]])]
    # A watcher that missed nothing is told so at once.
    async with asyncio.timeout(AT_MOST_S), contextlib.aclosing(store.watch(evicted.cursor)) as batches:
        told = await anext(batches)
        assert (told.cursor, told.events, told.snapshot) == (evicted.cursor, (), False)


async def test_local_reads_count_and_keep_what_they_use(service: Service) -> None:
    client = LocalStore(service.config.dir, service.address)
    await client.put(PROMPT.blocks())
    into = PROMPT.buffers()
    await client.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT)
    await client.close()
    stats = await RemoteStore(service.address).stats()
    assert (stats.hits, stats.bytes_read) == (6, 6 * PROMPT.payload_bytes)


async def test_a_corrupt_block_seen_by_a_local_reader_is_quarantined(service: Service) -> None:
    client = LocalStore(service.config.dir, service.address)
    await client.put(PROMPT.blocks())
    path = sorted((Path(service.config.dir) / "segments").iterdir())[0]
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert await client.get_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT) == 0
    await until(lambda: service.servicer.engine.counters.corrupt)
    assert (await client.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 0
    await client.put(PROMPT.blocks())
    assert await client.get_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT) == 6
    await client.close()


async def test_a_broken_stream_goes_on_where_it_stopped(service: Service) -> None:
    """Request the middle of a payload, as a client does after a break."""
    remote = RemoteStore(service.address)
    await remote.put(PROMPT.blocks(3))
    request = kvstore_pb2.GetRequest(
        kind=kvstore_pb2.RECORD_KIND_BLOCK,
        hashes=b"".join(PROMPT.hashes[:3]),
        fingerprint=FINGERPRINT,
        first=1,
        offset=MIB,
    )
    pieces = [piece async for piece in remote.stub.Get(request, timeout=AT_MOST_S)]
    assert (pieces[0].index, pieces[0].offset) == (1, MIB)
    assert {piece.index for piece in pieces} == {1, 2}
    received = b"".join(bytes(piece.data) for piece in pieces)
    assert received == PROMPT.payload(1)[MIB:] + PROMPT.payload(2)
    await remote.close()


async def test_a_piece_that_was_damaged_on_its_way_is_refused(service: Service) -> None:
    from antefix.store.payload_wire import Piece
    from antefix.store.pieces import request_pieces

    pieces = list(request_pieces(PROMPT.blocks(1)))
    damaged = bytes([pieces[1].data[0] ^ 1]) + bytes(pieces[1].data[1:])
    pieces[1] = Piece(pieces[1].message, memoryview(damaged))
    remote = RemoteStore(service.address)
    with pytest.raises(Exception, match="damaged on its way"):
        await remote.stub.Put(iter(pieces), timeout=AT_MOST_S)
    assert (await remote.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 0
    await remote.close()


async def test_watching_gives_a_snapshot_then_changes_then_resumes(service: Service) -> None:
    remote = RemoteStore(service.address)
    await remote.put(PROMPT.blocks(2))
    stream = remote.watch()
    cursor = None
    seen: list[bytes] = []
    async with asyncio.timeout(AT_MOST_S):
        async for batch in stream:
            assert not batch.snapshot_begins or not seen
            seen += [h for event in batch.events for h in event.names()]
            if batch.snapshot_ends:
                await remote.put(PROMPT.blocks(4))
            if len(seen) == 4:
                cursor = batch.cursor
                break
    assert seen == [*sorted(PROMPT.hashes[:2]), *PROMPT.hashes[2:4]]
    await stream.aclose()
    await remote.put([PROMPT.checkpoint(3)])
    async with asyncio.timeout(AT_MOST_S):
        async for batch in remote.watch(cursor):
            assert not batch.snapshot_begins
            assert [(event.kind, event.names()) for event in batch.events] == [
                (EventKind.CHECKPOINTED, [PROMPT.hashes[3]])
            ]
            break
    async with asyncio.timeout(AT_MOST_S):
        async for batch in remote.watch(Cursor(epoch=b"x" * 16, number=5)):
            assert batch.snapshot_begins
            break
    await remote.close()


async def test_a_plain_protobuf_client_is_understood(service: Service) -> None:
    """Our own framing is valid protobuf, so a stub generated from the proto file can put and get."""
    from antefix.v1 import kvstore_pb2_grpc

    channel = rpc.channel(service.address)
    stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
    header = kvstore_pb2.RecordHeader(
        kind=kvstore_pb2.RECORD_KIND_BLOCK,
        hash=PROMPT.hashes[0],
        parent=PROMPT.chain.root,
        fingerprint=FINGERPRINT,
        position=BLOCK,
        payload_bytes=5,
    )
    from antefix.store.pieces import piece_checksum

    put = kvstore_pb2.PutRequest(header=header, checksum=piece_checksum(b"hello"), data=b"hello")
    assert (await stub.Put(iter([put]), timeout=AT_MOST_S)).num_stored == 1
    get = kvstore_pb2.GetRequest(kind=kvstore_pb2.RECORD_KIND_BLOCK, hashes=PROMPT.hashes[0], fingerprint=FINGERPRINT)
    assert [piece.data async for piece in stub.Get(get, timeout=AT_MOST_S)] == [b"hello"]
    await channel.close()


async def test_a_local_reader_finds_a_rebuilt_index(service: Service) -> None:
    """The service lost its index and made a new one. Readers that have the old file open must notice."""
    client = LocalStore(service.config.dir, service.address)
    await client.put(PROMPT.blocks(3))
    assert (await client.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 3
    await service.stop()
    shutil.rmtree(Path(service.config.dir) / "index")
    await service.start()
    await until(lambda: client.put(PROMPT.blocks(5)), "the service is found again", despite=Unavailable)
    assert (await client.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 5
    into = PROMPT.buffers(5)
    assert await client.get_blocks(PROMPT.hashes[:5], into, fingerprint=FINGERPRINT) == 5
    assert [bytes(b) for b in into] == [PROMPT.payload(i) for i in range(5)]
    await client.close()


@pytest.mark.services
async def test_readers_in_other_processes_follow_the_writer(service: Service) -> None:
    """A reader process looks up and reads while this one writes, evicts and compacts."""
    client = RemoteStore(service.address)
    await client.put(PROMPT.blocks(2))
    script = (
        "import sys, time\n"
        "from antefix.store_files.segment_reader import StoreReader\n"
        "from tests.kvstore.small_store import *\n"
        "prompt = Prompt(list(range(BLOCK * 6)), payload_bytes=2_500_001)\n"
        "reader = StoreReader(sys.argv[1])\n"
        "into, best, wrong = prompt.buffers(), 0, 0\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 300\n"
        "while best < 6 and time.monotonic() < end:\n"
        "    count = reader.lookup(prompt.hashes, fingerprint=FINGERPRINT).num_blocks\n"
        "    good = reader.read_blocks(prompt.hashes[:count], into[:count], fingerprint=FINGERPRINT).num_good\n"
        "    wrong += any(bytes(into[i]) != prompt.payload(i) for i in range(good))\n"
        "    best = max(best, good)\n"
        "print(best, wrong, flush=True)\n"
    )
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, service.config.dir, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert reader.stdout is not None
    assert (await reader.stdout.readline()).strip() == b"ready"
    engine = service.servicer.engine
    for count in (3, 2, 4, 2, 6):
        await client.put(PROMPT.blocks(count))
        if count == 2:
            engine.evict([(RecordKind.BLOCK, PROMPT.hashes[2])])
            engine.space.compactor.compact_one(0.0)
        await asyncio.sleep(0.05)
    assert (await reader.stdout.readline()).split() == [b"6", b"0"]
    assert await reader.wait() == 0
    await client.close()


async def test_a_payload_of_another_size_than_registered_is_refused(store: Store) -> None:
    await store.register(FINGERPRINT, LAYOUT)
    with pytest.raises(InvalidRequest, match=f"has {LAYOUT.block_bytes} bytes by its registered layout, .* has 7$"):
        await store.put([PROMPT.block(0, payload=b"7 bytes")])
    assert (await store.put([PROMPT.block(0, payload=bytes(LAYOUT.block_bytes))])).num_stored == 1


async def test_a_write_that_can_never_be_stored_is_counted_and_named(tmp_path: Path) -> None:
    # Records are so small that each is a single message, because gRPC hides why a longer stream was refused in its
    # middle.
    service = Service(tmp_path / "store", segment_bytes=128 << 10)
    await service.start()
    store = RemoteStore(service.address)
    assert (await store.stats()).impossible_writes == 0
    too_large = Prompt([1] * BLOCK, payload_bytes=service.config.record_bytes_max + 1)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="payload"):
            await store.put(too_large.blocks())
    stats = await store.stats()
    assert stats.impossible_writes == 2 and "payload" in stats.impossible_write
    assert stats.free_bytes > stats.free_bytes_min > 0 == len(stats.stopped) and stats.limit_bytes > 0
    writes, space = await asyncio.to_thread(doctor._store, service.address)
    assert (writes.status, space.status) == ("fail", "ok") and "payload" in writes.detail
    # Nothing is stored, and the reason names the file system's free space.
    service.servicer.engine.space.free.margin_bytes = 1 << 60
    assert (await store.put(Prompt([2] * BLOCK).blocks())).num_stored == 0
    await store.close()
    _, space = await asyncio.to_thread(doctor._store, service.address)
    assert space.status == "warn" and "nothing is stored now" in space.detail
    await service.stop()
