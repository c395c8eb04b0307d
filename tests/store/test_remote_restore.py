"""Remote restores from the real service: the client verifies plain records, and accepts no bad one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from antefix import rpc
from antefix.errors import BlockCorrupt, InvalidRequest
from antefix.record import RecordKind
from antefix.store.payload_channel import PayloadChannel
from antefix.store.remote_store import RemoteStore
from antefix.store.stream_progress import Progress
from antefix.store_files.record_format import RECORD_VERSION
from antefix.store_files.segment_files import preadv_full
from antefix.v1 import kvstore_pb2
from antefix_kvstore.copy_store import CopyLimits, copy_store
from antefix_kvstore.copy_target import open_source, open_target
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.kvstore.test_compression import PLAN, Bells
from tests.slow_cases import slow_but
from tests.waiting import AT_MOST_S, until

MIB = 1 << 20
# Three of these records share a message, so there are four messages.
PROMPT = Prompt(list(range(BLOCK * 10)), payload_bytes=300_001)


@pytest.fixture
async def servicer(tmp_path: Path) -> AsyncIterator[KvStoreServicer]:
    config = KvStoreConfig(
        dir=str(tmp_path / "store"),
        budget_bytes=512 * MIB,
        segment_bytes=16 * MIB,
        compression="zstd",
        scrub_bytes_per_s=0,
    )
    served = KvStoreServicer(StorageEngine(config))
    server = await rpc.start_server(
        "127.0.0.1:0", lambda target: register(served, target, served.turns), [kvstore_pb2.DESCRIPTOR]
    )
    served.address = server.address  # type: ignore[attr-defined]
    yield served
    await server.drain(0.2)
    await served.close()


@pytest.fixture
async def store(servicer: KvStoreServicer) -> AsyncIterator[RemoteStore]:
    client = RemoteStore(servicer.address)  # type: ignore[attr-defined]
    await client.put(PROMPT.blocks())
    yield client
    await client.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Records each Get: its record format and its first payload."""
    seen: list[tuple[int, int]] = []
    receive = PayloadChannel.receive

    async def noted(self: PayloadChannel, request: kvstore_pb2.GetRequest, *args: Any, **more: Any) -> None:
        seen.append((request.record_format, request.first))
        await receive(self, request, *args, **more)

    monkeypatch.setattr(PayloadChannel, "receive", noted)
    return seen


async def restored(store: RemoteStore, prompt: Prompt = PROMPT) -> int:
    """The number of restored blocks. Every byte of them must be right."""
    into = prompt.buffers()
    num_good = await store.get_blocks(prompt.hashes, into, fingerprint=FINGERPRINT)
    assert [bytes(b) for b in into[:num_good]] == [prompt.payload(i) for i in range(num_good)]
    return num_good


def segment_of(servicer: KvStoreServicer) -> Path:
    (path,) = (servicer.engine.reader.directory / "segments").iterdir()
    return path


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    with path.open("r+b") as file:
        file.write(raw)


async def messages(store: RemoteStore, **fields: Any) -> list[kvstore_pb2.GetResponse]:
    request = kvstore_pb2.GetRequest(
        kind=kvstore_pb2.RECORD_KIND_BLOCK, hashes=b"".join(PROMPT.hashes), fingerprint=FINGERPRINT, **fields
    )
    return [message async for message in store.stub.Get(request, timeout=AT_MOST_S)]


async def test_plain_records_come_as_they_lie(store: RemoteStore, asked: list[tuple[int, int]]) -> None:
    got = await messages(store, record_format=RECORD_VERSION)
    assert [message.first_record for message in got] == [0, 3, 6, 9]
    assert all(0 < len(message.records) <= MIB and not message.data for message in got)
    assert await restored(store) == 10
    assert asked == [(RECORD_VERSION, 0)]


@pytest.mark.parametrize("record_format", [0, RECORD_VERSION + 1])
async def test_a_caller_that_does_not_know_the_format_gets_pieces(store: RemoteStore, record_format: int) -> None:
    got = await messages(store, record_format=record_format)
    assert not any(message.records for message in got)
    assert b"".join(message.data for message in got) == b"".join(PROMPT.payload(i) for i in range(10))


async def test_coded_records_are_decoded_by_the_store(store: RemoteStore, servicer: KvStoreServicer) -> None:
    """A part of the prompt is stored plain and the rest coded. Each block comes back right."""
    prompt = Bells([6] * BLOCK * 6)
    await store.put(prompt.blocks(3))
    servicer.engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: PLAN})
    before = servicer.engine.counters.bytes_written
    await store.put(prompt.blocks())
    assert servicer.engine.counters.bytes_written - before < 3 * prompt.payload_bytes * 0.9
    assert await restored(store, prompt) == 6
    request = kvstore_pb2.GetRequest(
        kind=kvstore_pb2.RECORD_KIND_BLOCK,
        hashes=b"".join(prompt.hashes),
        fingerprint=FINGERPRINT,
        record_format=RECORD_VERSION,
    )
    got = [message async for message in store.stub.Get(request, timeout=AT_MOST_S)]
    assert b"".join(message.data for message in got) == b"".join(prompt.payload(i) for i in range(6))


async def test_a_record_larger_than_a_message_comes_in_pieces(store: RemoteStore, asked: list[tuple[int, int]]) -> None:
    prompt = Prompt([5] * BLOCK * 2, payload_bytes=2_500_001)
    await store.put([*prompt.blocks(), prompt.checkpoint(1)])
    assert await restored(store, prompt) == 2
    checkpoint = await store.get(RecordKind.CHECKPOINT, prompt.hashes[1], fingerprint=FINGERPRINT)
    assert checkpoint == prompt.payload(1, RecordKind.CHECKPOINT)
    assert asked == [(RECORD_VERSION, 0)] * 2


async def test_a_plain_checkpoint_comes_as_it_lies(store: RemoteStore) -> None:
    await store.put([PROMPT.checkpoint(9)])
    checkpoint = await store.get(RecordKind.CHECKPOINT, PROMPT.hashes[9], fingerprint=FINGERPRINT)
    assert checkpoint == PROMPT.payload(9, RecordKind.CHECKPOINT)


async def test_a_buffer_of_another_size_is_the_callers_mistake(store: RemoteStore) -> None:
    with pytest.raises(InvalidRequest, match="buffer 1 has 5 bytes"):
        into = [memoryview(bytearray(300_001)), memoryview(bytearray(5))]
        await store.get_blocks(PROMPT.hashes[:2], into, fingerprint=FINGERPRINT)


async def test_a_store_that_does_not_know_record_formats_is_understood(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of another version sends payloads that it verified itself."""
    monkeypatch.setattr("antefix_kvstore.server.RECORD_VERSIONS", (RECORD_VERSION + 1,))
    assert not any(message.records for message in await messages(store, record_format=RECORD_VERSION))
    assert await restored(store) == 10


@pytest.mark.parametrize("cached", [True, False])
async def test_a_stream_goes_on_at_a_byte(store: RemoteStore, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setattr("antefix.store_files.read_runs.preadv_cached", lambda *_: 0)
    got = await messages(store, record_format=RECORD_VERSION, first=4, offset=123_456)
    assert (got[0].index, got[0].offset) == (4, 123_456)
    expected = PROMPT.payload(4)[123_456:] + b"".join(PROMPT.payload(i) for i in range(5, 10))
    assert b"".join(message.data for message in got) == expected
    got = await messages(store, record_format=RECORD_VERSION, first=4)
    assert [message.first_record for message in got] == [4, 7]


async def test_what_is_not_in_the_page_cache_comes_all_the_same(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr("antefix.store_files.read_runs.preadv_cached", lambda *_: 0)
    assert await restored(store) == 10
    assert asked == [(RECORD_VERSION, 0)]


@pytest.mark.parametrize("where", ["header", "payload", "last byte"])
@pytest.mark.parametrize("number", [0, 4, 9])
async def test_a_byte_that_flipped_on_disk_is_a_miss_counted_and_quarantined(
    store: RemoteStore, servicer: KvStoreServicer, asked: list[tuple[int, int]], number: int, where: str
) -> None:
    path = segment_of(servicer)
    begin = path.read_bytes().find(PROMPT.payload(number))
    flip(path, {"header": begin - 100, "payload": begin + 5000, "last byte": begin + 300_000}[where])
    # 1. Blocks before the damage are right. The client found the damage, the store checked it, and the restore ends
    # there.
    assert await restored(store) == number
    assert asked == [(RECORD_VERSION, 0), (0, number)]
    await until(lambda: servicer.engine.counters.corrupt)
    assert servicer.engine.counters.corrupt == 1
    # 2. From now on the damaged block is a miss without another check.
    asked.clear()
    assert await restored(store) == number
    assert asked == [(RECORD_VERSION, 0)]
    assert (await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == number
    # 3. Putting the block again makes the later blocks hits too.
    await store.put(PROMPT.blocks())
    assert await restored(store) == 10


async def test_a_record_of_another_name_in_its_place_is_a_miss(store: RemoteStore, servicer: KvStoreServicer) -> None:
    """Two records are swapped with their headers and checksums."""
    path = segment_of(servicer)
    raw = bytearray(path.read_bytes())
    one, other = (raw.find(PROMPT.payload(i)) - 256 for i in (3, 7))
    nbytes = 256 + 300_001
    raw[one : one + nbytes], raw[other : other + nbytes] = raw[other : other + nbytes], raw[one : one + nbytes]
    with path.open("r+b") as file:
        file.write(raw)
    assert await restored(store) == 3


@pytest.mark.parametrize("left", [0, 1_000_000, 2_500_000])
async def test_a_segment_that_was_cut_off_under_the_store_is_a_miss(
    store: RemoteStore, servicer: KvStoreServicer, left: int
) -> None:
    path = segment_of(servicer)
    with path.open("r+b") as file:
        file.truncate(left)
    assert await restored(store) == max(0, left - 4096) // (256 + 300_001)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_byte_that_flipped_on_its_way_is_asked_for_again(
    store: RemoteStore,
    servicer: KvStoreServicer,
    asked: list[tuple[int, int]],
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store finds no damage, quarantines nothing, and sends the block once more."""
    damage(monkeypatch, times, lambda raw: raw[:500_000] + bytes([raw[500_000] ^ 1]) + raw[500_001:])
    assert await restored(store) == 10
    assert asked[:2] == [(RECORD_VERSION, 0), (0, 1)]
    assert len(asked) == 1 + times
    assert servicer.engine.counters.corrupt == 0


async def test_a_message_that_was_cut_off_on_its_way_is_asked_for_again(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, 1, lambda raw: raw[:-1])
    assert await restored(store) == 10


async def test_a_way_that_always_damages_is_an_error(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, 1000, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(BlockCorrupt):
        await restored(store)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize("record_format", slow_but([0], [0, RECORD_VERSION]))
async def test_a_reader_that_does_not_read_holds_no_memory(
    store: RemoteStore, record_format: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 90 MB, the store reads what the connection takes plus two windows, and the rest when the reader continues."""
    prompt = Prompt([9] * BLOCK * 300, payload_bytes=300_001)
    await store.put(prompt.blocks())
    num_read = 0

    def counted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal num_read
        got = preadv_full(fd, buffers, offset)
        num_read += got
        return got

    monkeypatch.setattr("antefix.store_files.read_runs.preadv_cached", counted if cached else lambda *_: 0)
    monkeypatch.setattr("antefix.store_files.read_runs.preadv_full", counted)
    request = kvstore_pb2.GetRequest(
        kind=kvstore_pb2.RECORD_KIND_BLOCK,
        hashes=b"".join(prompt.hashes),
        fingerprint=FINGERPRINT,
        record_format=record_format,
    )
    call = store.stub.Get(request, timeout=AT_MOST_S)
    received = (await call.read()).ByteSize()
    seen = -1
    while seen != num_read:
        seen = num_read
        await asyncio.sleep(0.3)
    assert num_read < 24_000_000
    while (message := await call.read()) is not grpc.aio.EOF:
        received += message.ByteSize()
    assert received >= 300 * 300_001
    assert num_read >= 300 * 300_001


def damage(monkeypatch: pytest.MonkeyPatch, times: int, change: Callable[[bytes], bytes]) -> None:
    """Change the first `times` messages on their way."""
    accept, left = Progress.accept, [times]

    def changed(self: Progress, raw: bytes, buffer: Any) -> None:
        left[0] -= 1
        accept(self, change(raw) if left[0] >= 0 else raw, buffer)

    monkeypatch.setattr(Progress, "accept", changed)


async def test_records_that_moved_since_they_were_looked_up_are_found_again(
    store: RemoteStore, servicer: KvStoreServicer, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int]]
) -> None:
    """Compaction copies the records and deletes their segment between the look-up and the read."""
    engine = servicer.engine
    other = Prompt([77] * BLOCK * 20, payload_bytes=300_001)
    await store.put(other.blocks())
    engine.evict([(RecordKind.BLOCK, other.hashes[0])])
    locate, old = engine.reader.locate, segment_of(servicer)

    def and_compact(*args: Any, **more: Any) -> Any:
        located = locate(*args, **more)
        if old.exists():
            engine.space.compactor.compact_one(0.0)
            assert not old.exists()
        return located

    monkeypatch.setattr(engine.reader, "locate", and_compact)
    assert await restored(store) == 10
    assert asked == [(RECORD_VERSION, 0)]
    assert engine.counters.corrupt == 0


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "cold"])
async def test_streams_at_once_are_each_right_with_calls_between_them(
    store: RemoteStore, servicer: KvStoreServicer, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cached:
        monkeypatch.setattr("antefix.store_files.read_runs.preadv_cached", lambda *_: 0)
    clients = [RemoteStore(servicer.address) for _ in range(5)]  # type: ignore[attr-defined]

    async def look_up() -> int:
        found = [await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT) for _ in range(10)]
        return min(each.num_blocks for each in found)

    found = await asyncio.gather(*(restored(client) for client in clients), look_up())
    assert found == [10] * 6
    for client in clients:
        await client.close()
    assert servicer.num_streams == 0


async def test_readers_that_stop_or_leave_hold_up_no_other(store: RemoteStore, servicer: KvStoreServicer) -> None:
    prompt = Prompt([9] * BLOCK * 300, payload_bytes=300_001)
    await store.put(prompt.blocks())
    request = kvstore_pb2.GetRequest(
        kind=kvstore_pb2.RECORD_KIND_BLOCK,
        hashes=b"".join(prompt.hashes),
        fingerprint=FINGERPRINT,
        record_format=RECORD_VERSION,
    )
    # Each stream has its own connection, because streams of one connection share its window.
    clients = [RemoteStore(servicer.address) for _ in range(6)]  # type: ignore[attr-defined]
    stopped = [client.stub.Get(request, timeout=AT_MOST_S) for client in clients]
    for call in stopped:
        await call.read()
    for call in stopped[:3]:
        call.cancel()
    async with asyncio.timeout(AT_MOST_S):
        assert await restored(store) == 10
    await until(lambda: servicer.num_streams == 3)
    for client in clients:
        await client.close()


@pytest.mark.parametrize("method", ["Lookup", "Fate"])
async def test_urgent_calls_have_payloads_give_way(
    store: RemoteStore, servicer: KvStoreServicer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls for which no request waits do not, such as readers' reports of their reads, five times per second."""
    given: list[bool] = []
    monkeypatch.setattr(servicer.turns, "give_way", lambda: given.append(True))
    await restored(store)
    await store.put(PROMPT.blocks(1))
    await store.stats()
    await store.stub.Touch(kvstore_pb2.TouchRequest(hits=1), timeout=AT_MOST_S)
    assert not given
    if method == "Fate":
        await store.fate(PROMPT.hashes[0], fingerprint=FINGERPRINT)
    else:
        await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
    assert len(given) == 1


async def test_a_store_is_copied_to_a_service_and_purged_there(
    servicer: KvStoreServicer, store: RemoteStore, tmp_path: Path
) -> None:
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "other"), budget_bytes=64 * MIB, scrub_bytes_per_s=0))
    engine.register(FINGERPRINT, BLOCK, {})
    other = Prompt(list(range(5000, 5000 + BLOCK * 6)), payload_bytes=300_001)
    engine.put([*other.blocks(), other.checkpoint(5), *PROMPT.blocks(4)])
    engine.close()
    target = open_target(servicer.address)  # type: ignore[attr-defined]
    with open_source(str(tmp_path / "other")) as contents:
        report = await copy_store(contents, [target], CopyLimits())
    assert (report.num_copied, report.num_there, report.complete) == (7, 4, True)
    assert await restored(store, other) == 6
    held = await store.held(other.hashes[3:], fingerprint=FINGERPRINT)
    assert (held.spans, held.checkpoints) == (((0, 3),), (3,))
    assert await target.purge(owner("")) == 17
    assert await restored(store) == 0
    await target.close()
