"""The directory follows workers' events. It notices gaps, new epochs and dropped workers; a snapshot repairs it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Unavailable
from antefix.events.numbered_log import Batch, Cursor
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFeed, MemoryFollower
from tests.router.memory_worker import Memory, Worker, leading, names_of
from tests.waiting import until

ADDRESS = "127.0.0.1:7001"
CHAIN = names_of("a", 20)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.02)


def batches(memory, cursor=None):
    """The batches that a direct stream gives to a watcher at this cursor, one event each."""
    found = memory.log.since(cursor or Cursor())
    if found is None:
        return list(memory.log.snapshot())
    first = found.cursor.number - len(found.events) + 1
    return [
        Batch(cursor=Cursor(epoch=found.cursor.epoch, number=number), events=(event,))
        for number, event in enumerate(found.events, first)
    ]


def told(memory):
    directory = Directory()
    follower = MemoryFollower(directory, ADDRESS)
    assert all(follower.apply(batch) for batch in batches(memory))
    return follower, directory


def at(memory, number):
    return Cursor(epoch=memory.log.cursor.epoch, number=number)


def test_events_of_one_kind_are_told_as_one_and_those_told_do_not_change():
    memory = Memory()
    memory.store(CHAIN[:3])
    first = memory.log.since(at(memory, 0)).events
    memory.store(CHAIN[3:5])
    memory.evict(CHAIN[4:5])
    found = memory.log.since(at(memory, 0))
    assert [(e.kind.name, e.num_blocks) for e in found.events] == [("STORED", 3), ("STORED", 2), ("EVICTED", 1)]
    assert found.cursor == at(memory, 3) and found.events[:1] == first


def test_a_full_ring_forgets_the_oldest_and_asks_for_a_snapshot():
    memory = Memory(num_blocks_max=8)
    for name in CHAIN:
        memory.store([name])
        memory.log.since(Cursor())
    assert memory.log.since(at(memory, 3)) is None
    found = memory.log.since(at(memory, 15))
    assert (found.cursor, len(found.events)) == (at(memory, 20), 5)
    assert memory.log.since(at(memory, 99)) is None and memory.log.since(Cursor(epoch=b"another", number=20)) is None


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
    position = memory.log.cursor
    for what, count in steps:
        if what == "store":
            memory.store(CHAIN[:count])
        elif what == "evict":
            memory.evict(reversed(CHAIN[count:]))
        elif what == "lose":
            position = memory.log.cursor
        elif what == "forget":
            directory.forget(ADDRESS)
        elif what == "restart":
            memory = Memory()
        else:
            for batch in batches(memory, position):
                if not feed.apply(batch):
                    assert all(feed.apply(each) for each in memory.log.snapshot())
                    break
            position = memory.log.cursor
            # Lost events are noticed at the next event, or when the worker sends its present number.
            alive = Batch(cursor=memory.log.cursor)
            if not feed.apply(alive):
                assert all(feed.apply(each) for each in memory.log.snapshot())
            assert feed.in_step
            assert leading(directory, ADDRESS, CHAIN) == memory.num_leading(CHAIN)


def test_what_is_told_twice_counts_once_and_half_a_snapshot_is_not_in_step():
    memory = Memory()
    memory.store(CHAIN[:5])
    feed, directory = told(memory)
    memory.evict(CHAIN[4:5])
    (evicted,) = batches(memory, at(memory, 1))
    memory.store(CHAIN[4:5])
    (stored,) = batches(memory, at(memory, 2))
    for batch in (evicted, stored, evicted, stored, evicted):
        feed.take(batch)
        assert feed.in_step
    assert leading(directory, ADDRESS, CHAIN) == 5 and feed.counters.num_snapshots == 1
    feed.apply(Batch(cursor=Cursor(epoch=b"new", number=9), snapshot=True, snapshot_begins=True))
    assert not feed.in_step
    assert not feed.apply(Batch(cursor=Cursor(epoch=b"new", number=9)))


def test_a_snapshot_of_a_hundred_thousand_blocks_takes_pieces_and_counts_when_it_is_whole():
    memory, names = Memory(), names_of("long", 100_000)
    memory.store(names)
    directory = Directory()
    feed = MemoryFollower(directory, ADDRESS)
    pieces = list(memory.log.snapshot())
    assert len(pieces) == 13 and all(feed.apply(piece) for piece in pieces[:-1])
    assert not feed.in_step
    feed.apply(pieces[-1])
    assert feed.in_step and leading(directory, ADDRESS, names) == 100_000


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

    async def watch(channel, cursor):
        cursors.append(cursor)
        for batch in batches(memory, cursor):
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
        assert [cursor and cursor.number for cursor in cursors] == [None, 1] and feed.counters.num_snapshots == 1
    finally:
        gate.set()
        await feed.close()
