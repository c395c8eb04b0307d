"""The embedded store is a `Store` in this process. It keeps the promises of a service's clients, and checks layouts."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import antefix_kvstore
from antefix import BlockingStore, ConfigError, InvalidRequest, MissReason, RecordKind, Store
from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind
from antefix.store_files import codec
from antefix_kvstore.embedded_store import EmbeddedStore
from antefix_kvstore.group_commit import GroupCommitter
from antefix_kvstore.identity import CLEAN_FILE
from antefix_kvstore.reading_here import ReadingHere
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.waiting import AT_MOST_S

PROMPT = Prompt(list(range(BLOCK * 6)))


async def test_what_was_put_is_restored_and_survives_reopening(tmp_path: Path) -> None:
    async with antefix_kvstore.open(tmp_path / "store", budget_bytes="8M") as store:
        done = await store.put([*PROMPT.blocks(), PROMPT.checkpoint(2)])
        assert (done.num_stored, done.num_existing, done.refused) == (7, 0, {})
        assert (await store.put(PROMPT.blocks())).num_existing == 6
    async with antefix_kvstore.open(tmp_path / "store", budget_bytes=8 << 20) as store:
        found = await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
        assert (found.num_blocks, found.checkpoints) == (6, (3,))
        into = PROMPT.buffers()
        assert await store.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT) == 6
        assert [bytes(row) for row in into] == [PROMPT.payload(i) for i in range(6)]
        checkpoint = await store.get(RecordKind.CHECKPOINT, PROMPT.hashes[2], fingerprint=FINGERPRINT)
        assert checkpoint == PROMPT.payload(2, RecordKind.CHECKPOINT)
        assert (await store.fate(PROMPT.hashes[0], fingerprint=FINGERPRINT)).reason is MissReason.NONE
        held = await store.stats()
        assert (held.kinds[RecordKind.BLOCK].num_records, held.kinds[RecordKind.CHECKPOINT].num_records) == (6, 1)
        assert (held.hits, held.budget_bytes, held.stopped) == (7, 8 << 20, "")
        names = [(RecordKind.BLOCK, name) for name in PROMPT.hashes]
        assert await store.pin(names[5:], duration_s=60, owner=owner("")) == 1
        assert await store.pin(names[5:], duration_s=60, owner=owner("another")) == 0
        assert await store.evict(names[4:5], owner=owner("")) == 2
        with pytest.raises(InvalidRequest, match="on disk"):
            await store.evict([(RecordKind.HANDOFF, PROMPT.hashes[0])], owner=owner(""))
        assert (await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 4


async def test_handoffs_are_kept_in_memory_alone(tmp_path: Path) -> None:
    handoff = PROMPT.block(0, kind=RecordKind.HANDOFF, hash=b"h" * 32, payload=b"state")
    async with antefix_kvstore.open(tmp_path / "store") as store:
        assert (await store.put([PROMPT.block(0), handoff])).num_stored == 2
        assert await store.get(RecordKind.HANDOFF, b"h" * 32, fingerprint=FINGERPRINT) == b"state"
    async with antefix_kvstore.open(tmp_path / "store") as store:
        assert await store.get(RecordKind.HANDOFF, b"h" * 32, fingerprint=FINGERPRINT) is None
        assert (await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 1


async def test_what_is_stored_is_told_to_who_watches(tmp_path: Path) -> None:
    async with antefix_kvstore.open(tmp_path / "store") as store:
        await store.put(PROMPT.blocks(2))
        async with contextlib.aclosing(store.watch()) as batches:
            told = [name for event in (await anext(batches)).events for name in event.names()]
            assert set(told) == set(PROMPT.hashes[:2])
    with BlockingStore(antefix_kvstore.open(tmp_path / "store")) as store_:
        stream = store_.watch()
        assert next(stream).events
        assert store_.stats().kinds[RecordKind.BLOCK].num_records == 2


async def test_a_store_is_open_once_and_closing_twice_does_nothing(tmp_path: Path) -> None:
    store = antefix_kvstore.open(tmp_path / "store")
    with pytest.raises(ConfigError, match="is open in another process"):
        antefix_kvstore.open(tmp_path / "store")
    await store.close()
    await store.close()
    await antefix_kvstore.open(tmp_path / "store").close()


def test_a_malformed_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20XB"):
        antefix_kvstore.open(tmp_path / "store", budget_bytes="20XB")
    with pytest.raises(ConfigError, match="compression"):
        antefix_kvstore.open(tmp_path / "store", compression="lzma")


def test_it_makes_the_protocols_calls_with_its_parameters() -> None:
    for name, method in inspect.getmembers(Store, inspect.isfunction):
        if name.startswith("_"):
            continue
        for kind in (EmbeddedStore, BlockingStore, ReadingHere):
            assert list(inspect.signature(getattr(kind, name)).parameters) == list(inspect.signature(method).parameters)


@pytest.mark.parametrize("kind", [BlockingStore, ReadingHere])
def test_a_plain_script_needs_no_loop(tmp_path: Path, kind: type[BlockingStore]) -> None:
    with kind(antefix_kvstore.open(tmp_path / "store")) as store:
        assert store.put(PROMPT.blocks()).num_stored == 6
        assert store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).num_blocks == 6
        into = PROMPT.buffers()
        assert store.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT) == 6
        assert bytes(into[5]) == PROMPT.payload(5)
        with pytest.raises(InvalidRequest, match="a buffer has 7 bytes, its payload 300"):
            store.get_blocks(PROMPT.hashes[:1], [memoryview(bytearray(7))], fingerprint=FINGERPRINT)
    with pytest.raises(InvalidRequest, match="closed"):
        store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)


def test_reads_run_in_the_thread_that_asks_and_closing_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = antefix_kvstore.open(tmp_path / "store")
    store, begun, may_go, threads = ReadingHere(embedded), threading.Event(), threading.Event(), []
    lookup = embedded.lookup_here

    def slow(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        begun.set()
        may_go.wait(AT_MOST_S)
        return lookup(*args, **kwargs)

    monkeypatch.setattr(embedded, "lookup_here", slow)
    reading = threading.Thread(target=store.lookup, args=(PROMPT.hashes,), kwargs={"fingerprint": FINGERPRINT})
    closing = threading.Thread(target=store.close)
    reading.start()
    assert begun.wait(AT_MOST_S)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and embedded.engine.is_open
    may_go.set()
    for thread in (reading, closing):
        thread.join(AT_MOST_S)
    assert threads == [reading] and not embedded.engine.is_open


def test_a_store_closes_while_python_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Python ends, no thread pool accepts work."""
    store = ReadingHere(antefix_kvstore.open(tmp_path / "store"))
    store.put(PROMPT.blocks())
    with monkeypatch.context() as ending:
        ending.setattr("concurrent.futures.thread._shutdown", True)
        store.close()
    # The mark of a clean end, with which the next opening need not examine the index.
    assert (tmp_path / "store" / CLEAN_FILE).exists()
    with BlockingStore(antefix_kvstore.open(tmp_path / "store")) as again:
        assert again.lookup(PROMPT.hashes, fingerprint=FINGERPRINT).num_blocks == 6


SMALL = KVGeometry(
    layers=(LayerKind.WINDOW, LayerKind.CSA, LayerKind.HCA),
    head_dim=64,
    rope_dim=16,
    indexer_dim=32,
    csa_ratio=2,
    hca_ratio=BLOCK,
    window=8,
)
LAYOUT = BlockLayout(geometry=SMALL, kv_format=KVFormat.FP8)
THREE_HUNDRED = codec.PlanePlan(parts=(codec.PlanePart(num_rows=3, fields=((100, 1),)),))


@pytest.mark.parametrize("kind", [RecordKind.BLOCK, RecordKind.CHECKPOINT])
@pytest.mark.parametrize("change", [-1, 1])
async def test_a_payload_that_does_not_fit_its_layout_is_refused(tmp_path: Path, kind: RecordKind, change: int) -> None:
    sizes = {
        RecordKind.BLOCK: codec.plan_of_block(LAYOUT).payload_bytes,
        RecordKind.CHECKPOINT: codec.plan_of_checkpoint(LAYOUT).payload_bytes,
    }
    good = PROMPT.block(0, payload=bytes(sizes[RecordKind.BLOCK]))
    checkpoint = PROMPT.checkpoint(0, payload=bytes(sizes[RecordKind.CHECKPOINT]))
    wrong = PROMPT.block(0, kind=kind, payload=bytes(sizes[kind] + change))
    name, nbytes = kind.name.lower(), sizes[kind]
    message = f"a {name} of fingerprint .* has {nbytes} bytes .* this payload has {nbytes + change}"
    async with antefix_kvstore.open(tmp_path / "store") as store:
        await store.register(FINGERPRINT, LAYOUT)
        with pytest.raises(InvalidRequest, match=message):
            await store.put([good, wrong] if kind is RecordKind.CHECKPOINT else [wrong])
        assert (await store.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 0, "nothing was stored"
        assert (await store.put([good, checkpoint])).num_stored == 2
        other = Prompt(list(range(BLOCK)), fingerprint=b"G" * 32)
        assert (await store.put(other.blocks())).num_stored == 1, "another fingerprint has no layout"
    # The layout is kept in the store.
    async with antefix_kvstore.open(tmp_path / "store") as store:
        with pytest.raises(InvalidRequest, match=message):
            await store.put([wrong])


async def test_a_put_that_is_refused_does_not_fail_its_neighbours(open_engine: Callable[..., StorageEngine]) -> None:
    engine = open_engine()
    engine.register(FINGERPRINT, BLOCK, {RecordKind.BLOCK: THREE_HUNDRED})
    writer = GroupCommitter(engine)
    good = asyncio.wrap_future(writer.submit(PROMPT.blocks(2)))
    with pytest.raises(InvalidRequest, match="has 300 bytes by its registered layout, but this payload has 299"):
        writer.submit([PROMPT.block(2, payload=bytes(299))])
    assert (await good).num_stored == 2
    writer.stop()
