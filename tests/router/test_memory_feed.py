"""The directory has what workers say; gaps, other epochs and forgetting are noticed; a snapshot puts it right."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Unavailable
from antefix.events import MemoryBatch
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFeed
from tests.router.memory_worker import Memory, Worker, leading, names_of

ADDRESS = "127.0.0.1:7001"
CHAIN = names_of("a", 20)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("antefix_router.placement.memory_feed._RETRY_S", 0.02)


def batches(memory, epoch=b"", number=0):
    """What a direct stream gives to a watcher that stands there."""
    found = memory.log.since(epoch, number)
    if found is None:
        return list(memory.log.snapshot())
    return [MemoryBatch(epoch=epoch, number=event.number, events=(event,)) for event in found]


def told(memory):
    feed = MemoryFeed(Directory())
    assert all(feed.apply(ADDRESS, batch) for batch in batches(memory))
    return feed, feed._directory


def test_events_of_one_kind_are_told_as_one_and_those_told_do_not_change():
    memory = Memory()
    memory.store(CHAIN[:3])
    first = memory.log.since(memory.log.epoch, 0)
    memory.store(CHAIN[3:5])
    memory.evict(CHAIN[4:5])
    assert [(e.number, e.kind.name, len(e.keys) // 8) for e in memory.log.since(memory.log.epoch, 0)] == [
        (1, "STORED", 3),
        (2, "STORED", 2),
        (3, "EVICTED", 1),
    ]
    assert memory.log.since(memory.log.epoch, 0)[:1] == first


def test_a_full_ring_forgets_the_oldest_and_asks_for_a_snapshot():
    memory = Memory(num_keys_max=8)
    for name in CHAIN:
        memory.store([name])
        memory.log.since(memory.log.epoch, 0)
    assert memory.log.since(memory.log.epoch, 3) is None
    assert [event.number for event in memory.log.since(memory.log.epoch, 15)] == list(range(16, 21))
    assert memory.log.since(memory.log.epoch, 99) is None and memory.log.since(b"another", 20) is None


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["store", "evict", "tell", "lose", "forget", "restart"]), st.integers(0, 20)),
        max_size=40,
    )
)
def test_a_feed_in_step_knows_exactly_what_is_there_whatever_was_lost(steps):
    """lose: the next events never arrive.  forget: the router drops the worker by itself, as when a call failed."""
    memory = Memory()
    feed, directory = told(memory)
    position = memory.log.epoch, memory.log.number
    for what, count in steps:
        if what == "store":
            memory.store(CHAIN[:count])
        elif what == "evict":
            memory.evict(reversed(CHAIN[count:]))
        elif what == "lose":
            position = memory.log.epoch, memory.log.number
        elif what == "forget":
            directory.forget(ADDRESS)
        elif what == "restart":
            memory = Memory()
        else:
            for batch in batches(memory, *position):
                if not feed.apply(ADDRESS, batch):
                    assert all(feed.apply(ADDRESS, each) for each in memory.log.snapshot())
                    break
            position = memory.log.epoch, memory.log.number
            # Lost events show at the next one, or when the worker says where it stands.
            alive = MemoryBatch(epoch=memory.log.epoch, number=memory.log.number)
            if not feed.apply(ADDRESS, alive):
                assert all(feed.apply(ADDRESS, each) for each in memory.log.snapshot())
            assert feed.in_step(ADDRESS)
            assert leading(directory, ADDRESS, CHAIN) == memory.num_leading(CHAIN)


def test_what_is_told_twice_counts_once_and_half_a_snapshot_is_not_in_step():
    memory = Memory()
    memory.store(CHAIN[:5])
    feed, directory = told(memory)
    memory.evict(CHAIN[4:5])
    (evicted,) = batches(memory, memory.log.epoch, 1)
    memory.store(CHAIN[4:5])
    (stored,) = batches(memory, memory.log.epoch, 2)
    assert all(feed.apply(ADDRESS, batch) for batch in (evicted, stored, evicted, stored, evicted))
    assert leading(directory, ADDRESS, CHAIN) == 5 and feed.num_snapshots == 1
    feed.apply(ADDRESS, MemoryBatch(epoch=b"new", number=9, snapshot=True, snapshot_begins=True))
    assert not feed.in_step(ADDRESS)
    assert not feed.apply(ADDRESS, MemoryBatch(epoch=b"new", number=9))


def test_a_snapshot_of_a_hundred_thousand_blocks_takes_pieces_and_counts_when_it_is_whole():
    memory, names = Memory(), names_of("long", 100_000)
    memory.store(names)
    feed = MemoryFeed(Directory())
    pieces = list(memory.log.snapshot())
    assert len(pieces) == 13 and all(feed.apply(ADDRESS, piece) for piece in pieces[:-1])
    assert not feed.in_step(ADDRESS)
    feed.apply(ADDRESS, pieces[-1])
    assert feed.in_step(ADDRESS) and leading(feed._directory, ADDRESS, names) == 100_000


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not come to be")


async def test_a_direct_stream_follows_a_worker_through_its_restart_and_through_forgetting():
    worker = await Worker().start()
    worker.memory.store(CHAIN[:6])
    directory = Directory()
    feed = MemoryFeed(directory)
    feed.follow([worker.address])
    try:
        await until(lambda: leading(directory, worker.address, CHAIN) == 6)
        worker.memory.store(CHAIN[:10])
        worker.memory.evict(CHAIN[9:10])
        await until(lambda: leading(directory, worker.address, CHAIN) == 9)
        directory.forget(worker.address)
        worker.memory.evict(CHAIN[8:9])
        await until(lambda: leading(directory, worker.address, CHAIN) == 8)
        await worker.restart()
        worker.memory.store(CHAIN[:2])
        await until(lambda: leading(directory, worker.address, CHAIN) == 2)
        assert feed.in_step(worker.address)
        feed.follow([])
        assert not feed.in_step(worker.address)
    finally:
        await feed.close()
        await worker.stop()


async def test_a_stream_that_breaks_goes_on_at_its_cursor():
    memory, cursors, gate = Memory(), [], asyncio.Event()
    memory.store(CHAIN[:4])

    async def watch(channel, cursor, snapshot_only):
        cursors.append(cursor)
        for batch in batches(memory, *((cursor.epoch, cursor.number) if cursor else ())):
            yield batch
        if len(cursors) == 1:
            memory.store(CHAIN[:7])
            raise Unavailable("the connection broke")
        await gate.wait()

    directory = Directory()
    feed = MemoryFeed(directory, watch=watch)
    feed.follow([ADDRESS])
    try:
        await until(lambda: leading(directory, ADDRESS, CHAIN) == 7)
        assert [cursor and cursor.number for cursor in cursors] == [None, 1] and feed.num_snapshots == 1
    finally:
        gate.set()
        await feed.close()
