"""The feed knows the store's contents from events, notices gaps, and gives no answer while it is not in step."""

import asyncio
import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Unavailable
from antefix.events.block_events import BlockEvent, EventKind, keys_of
from antefix.events.numbered_log import Batch, Cursor, snapshot_batches
from antefix.store.feed_room import BYTES_PER_NAME, FeedRoom
from antefix.store.store_feed import StoreFeed
from tests.waiting import until

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


def room_for(num_names):
    return FeedRoom(num_names * BYTES_PER_NAME)


def test_a_store_with_more_names_than_there_is_room_for_is_asked_for_what_is_not_known_whole():
    feed = feed_of(*snapshot(), room=room_for(3))
    assert (len(feed), feed.num_left_out) == (3, 1) and feed.in_step
    assert feed.num_leading(KEYS[:3]) == 3 and feed.num_leading(KEYS[:4]) is None
    assert feed.held(HASHES[:3], fingerprint=FINGERPRINT).num_leading == 3
    assert feed.held(HASHES[:4], fingerprint=FINGERPRINT) is None
    # Evicted names make room for new ones. Names that were left out stay unknown.
    assert feed.apply(batch(6, event("EVICTED", HASHES[:1]))) and feed.apply(batch(7, event("STORED", HASHES[9:])))
    assert feed.num_leading(KEYS[9:]) == 1 and feed.num_leading(KEYS[:1]) is None
    assert (
        feed.apply(
            batch(
                8,
                event("STORED", HASHES[9:]),
            )
        )
        and feed.num_left_out == 1
    )
    # After a snapshot that fits, all names are known again.
    assert all(feed.apply(each) for each in snapshot(20, HASHES[:3]))
    assert feed.num_left_out == 0 and feed.num_leading(KEYS) == 3


def test_checkpoints_take_room_as_blocks_do():
    feed = feed_of(*snapshot(), batch(6, event("CHECKPOINTED", HASHES[:4])), room=room_for(6))
    assert (len(feed), feed.num_left_out) == (6, 2)
    assert feed.held(HASHES[:4], fingerprint=FINGERPRINT).num_leading == 4


async def test_feeds_share_the_room_in_equal_parts_and_one_that_goes_leaves_its_part():
    room, gone = room_for(8), asyncio.Event()

    def watch_of(hashes):
        async def watch(cursor):
            for each in snapshot(5, hashes):
                yield each
            await gone.wait()

        return watch

    first = StoreFeed(watch_of(HASHES[:8]), fingerprint=FINGERPRINT, room=room)
    first.start()
    await until(lambda: first.in_step)
    assert (len(first), first.num_left_out) == (8, 0)
    second = StoreFeed(watch_of(HASHES[2:]), fingerprint=FINGERPRINT, room=room)
    second.start()
    await until(lambda: second.in_step)
    assert [(len(feed), feed.num_left_out) for feed in (first, second)] == [(4, 4), (4, 4)]
    await second.close()
    assert first.apply(batch(6, event("STORED", HASHES[8:]))) and len(first) == 6
    await first.close()


@pytest.mark.parametrize("bytes_max", [200_000, 1 << 20])
def test_the_stated_bound_holds_in_memory(bytes_max):
    """The feed gets several times more names than it has room for, and stays within its stated memory."""
    feed = feed_of(*snapshot(5, HASHES[:2]), room=FeedRoom(bytes_max))
    part = bytes_max // BYTES_PER_NAME // 4
    batches = []
    for number in range(6, 18):
        names = np.random.default_rng(number).bytes(32 * part)
        hashes = [names[at : at + 32] for at in range(0, len(names), 32)]
        batches.append(batch(number, event("STORED", hashes)))
    tracemalloc.start()
    try:
        assert all(feed.apply(each) for each in batches)
        assert feed.num_left_out > 7 * part
        assert 0 < tracemalloc.get_traced_memory()[0] < bytes_max
    finally:
        tracemalloc.stop()


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
