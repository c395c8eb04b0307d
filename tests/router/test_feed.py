"""The feed knows what the store's events say, notices gaps, and says nothing while it is not in step."""

import asyncio
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Unavailable
from antefix.events.block_events import BlockEvent, EventKind, keys_of
from antefix.events.numbered_log import Batch, Cursor, snapshot_batches
from antefix.store.store_feed import StoreFeed
from tests.redis_servers import until

FINGERPRINT = b"f" * 32
HASHES = [hashlib.blake2b(bytes([i]), digest_size=32).digest() for i in range(10)]
KEYS = keys_of(HASHES)


def event(kind, hashes, fingerprint=FINGERPRINT):
    return BlockEvent.of(EventKind[kind], hashes, fingerprint)


def batch(number, *events, epoch=b"e"):
    return Batch(cursor=Cursor(epoch=epoch, number=number), events=events)


def feed_of(*batches, **options):
    feed = StoreFeed(None, fingerprint=FINGERPRINT, **options)
    assert all(feed.apply(each) for each in batches)
    return feed


def snapshot(number=5, hashes=HASHES[:4]):
    pieces = [event("STORED", hashes[:2])], [event("STORED", hashes[2:])]
    return list(snapshot_batches(Cursor(epoch=b"e", number=number), pieces))


def test_a_feed_says_nothing_before_its_first_snapshot_is_whole():
    first, last = snapshot()
    feed = feed_of(first)
    assert feed.num_leading(KEYS) is None
    feed.apply(last)
    assert feed.num_leading(KEYS) == 4


def test_events_after_the_snapshot_count_and_others_fingerprints_do_not():
    feed = feed_of(*snapshot(), batch(6, event("STORED", HASHES[4:6])), batch(7, event("EVICTED", HASHES[5:6])))
    assert feed.num_leading(KEYS) == 5
    assert feed.apply(batch(9, event("STORED", HASHES[5:], b"other" * 6 + b"xx"), event("CHECKPOINTED", HASHES[5:])))
    assert feed.num_leading(KEYS) == 5


@pytest.mark.parametrize("number, epoch", [(7, b"e"), (5, b"e"), (4, b"e"), (6, b"another opening of the store")])
def test_a_gap_a_repeat_or_another_epoch_is_noticed(number, epoch):
    feed = feed_of(*snapshot())
    assert not feed.apply(batch(number, event("STORED", HASHES[4:]), epoch=epoch))
    assert feed.num_leading(KEYS) is None
    assert all(feed.apply(each) for each in snapshot(20, HASHES))
    assert feed.num_leading(KEYS) == 10 and feed.counters.num_snapshots == 2


def test_more_blocks_than_it_may_hold_are_not_half_known():
    feed = StoreFeed(None, fingerprint=FINGERPRINT, num_blocks_max=3)
    first, last = snapshot()
    assert feed.apply(first) and not feed.apply(last)
    assert feed.num_leading(KEYS) is None


async def test_a_store_with_too_many_blocks_is_not_asked_for_a_snapshot_again_and_again(monkeypatch):
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.0)
    cursors = []

    async def watch(cursor):
        cursors.append(cursor)
        for each in snapshot():
            yield each

    feed = StoreFeed(watch, fingerprint=FINGERPRINT, num_blocks_max=3)
    feed.start()
    await until(lambda: cursors)
    await asyncio.sleep(0.1)
    assert cursors == [None] and not feed.in_step
    await feed.close()


async def test_a_feed_that_is_renamed_in_mid_snapshot_knows_the_other_fingerprints_blocks_alone():
    other, gate = b"other" * 6 + b"xx", asyncio.Event()

    async def watch(cursor):
        yield Batch(
            cursor=Cursor(epoch=b"e", number=5),
            events=(event("STORED", HASHES[:4]), event("STORED", HASHES[:7], other)),
            snapshot=True,
            snapshot_begins=True,
        )
        await gate.wait()
        yield Batch(cursor=Cursor(epoch=b"e", number=5), snapshot=True, snapshot_ends=True)
        await asyncio.Event().wait()

    feed = StoreFeed(watch, fingerprint=FINGERPRINT)
    feed.start()
    await until(lambda: len(feed) == 4)
    feed.rename(other)
    gate.set()
    assert feed.num_leading(KEYS) is None
    await until(lambda: feed.in_step)
    assert feed.num_leading(KEYS) == 7
    await feed.close()


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 10)), max_size=30))
def test_the_feed_is_the_store_after_every_event(steps):
    feed, stored, number = feed_of(*snapshot_batches(Cursor(epoch=b"e"), ())), 0, 0
    for store, upto in steps:
        number += 1
        if store and upto > stored:
            feed.apply(batch(number, event("STORED", HASHES[stored:upto])))
            stored = upto
        elif not store and upto < stored:
            feed.apply(batch(number, event("EVICTED", HASHES[upto:stored])))
            stored = upto
        else:
            number -= 1
        assert feed.num_leading(KEYS) == stored == len(feed)


async def test_a_stream_that_breaks_goes_on_at_its_cursor_and_says_nothing_meanwhile(monkeypatch):
    monkeypatch.setattr("antefix.events.follower._RETRY_S", 0.01)
    cursors, gate = [], asyncio.Event()

    async def watch(cursor):
        cursors.append(cursor)
        if len(cursors) == 1:
            for each in snapshot():
                yield each
            raise Unavailable("killed")
        await gate.wait()
        yield batch(6, event("STORED", HASHES[4:]))
        await asyncio.Event().wait()

    feed = StoreFeed(watch, fingerprint=FINGERPRINT)
    feed.start()
    try:
        await until(lambda: len(cursors) == 2)
        assert cursors[1] == Cursor(epoch=b"e", number=5) and feed.num_leading(KEYS) is None
        gate.set()
        await until(lambda: feed.num_leading(KEYS) == 10)
    finally:
        await feed.close()
