"""A prefix with many requests spreads over workers by load, and its copies are known. A hint breaks ties."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.numbered_log import Batch, Cursor, snapshot_batches
from antefix.secret import Keyring
from antefix.store.store_feed import StoreFeed
from antefix_router.naming import PromptNames
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFollower
from antefix_router.placement.policy import make_policy
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import cached_tokens, own_work
from antefix_router.placement.workers import WorkerRole, Workers, loads_of
from tests.router.memory_worker import Memory

ADDRESSES = [f"127.0.0.1:{port}" for port in range(7001, 7005)]
FINGERPRINT = b"f" * 32
BLOCK = 64
NAMES = PromptNames(fingerprint=FINGERPRINT, keyring=Keyring(b"s" * 32), block_size=BLOCK)
HOT = np.arange(100 * BLOCK, dtype=np.uint32)


class Router:
    """Placement as in the router, with requests that run as long as their `with` block."""

    def __init__(self, *, stored=True):
        self.workers = Workers(WorkerRole.PREFILL, make_policy("least_work"), ADDRESSES)
        self.directory = Directory()
        self.stored = stored

    def place(self, tail, hint=""):
        prompt = NAMES.prompt("t", np.concatenate((HOT, np.full(300, tail, np.uint32))))
        work = prompt.work(100 if self.stored else None)
        worker = self.workers.place(work, self.directory, prompt.keys, BLOCK, frozenset(), hint=hint)
        held = self.directory.leading([worker.address], prompt.keys) * BLOCK
        own = sum(own_work(work, loads_of([worker], held, 0.0)))
        self.directory.placed(worker.address, prompt.keys)
        return worker, round(float(own[0]))

    @contextlib.contextmanager
    def running(self, tail):
        worker, own = self.place(tail)
        with self.workers.load(worker, own):
            yield worker.address

    def copies(self):
        return int((self.directory.leading(ADDRESSES, NAMES.prompt("t", HOT).keys) == 100).sum())


@pytest.mark.parametrize("stored", [True, False])
def test_without_load_a_hot_prefix_stays_where_it_is(stored):
    router = Router(stored=stored)
    homes = set()
    for tail in range(20):
        with router.running(tail) as address:
            homes.add(address)
    assert len(homes) == 1 and router.copies() == 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_hot_prefix_spreads_as_load_demands_and_the_copies_are_known(stored):
    router, copies = Router(stored=stored), []
    with contextlib.ExitStack() as stack:
        homes = set()
        for tail in range(400):
            homes.add(stack.enter_context(router.running(tail)))
            copies.append(router.copies())
            assert copies[-1] == len(homes)
    assert copies[0] == 1 and copies[-1] >= 2
    assert copies == sorted(copies)
    # Afterwards the copies serve all requests, and no worker has to load the prefix again.
    for tail in range(400, 420):
        with router.running(tail) as address:
            assert address in homes


def test_more_load_makes_more_copies():
    def copies_at(num_running):
        router = Router()
        with contextlib.ExitStack() as stack:
            for tail in range(num_running):
                stack.enter_context(router.running(tail))
        return router.copies()

    assert copies_at(1) == 1 and copies_at(2) <= copies_at(16) == 4


def test_a_hint_decides_between_equals_and_never_against_load():
    for hint in ADDRESSES:
        router = Router()
        assert router.place(1, hint)[0].address == hint
    router = Router()
    hinted = router.workers.find(ADDRESSES[2])
    with router.workers.load(hinted, 10_000):
        assert router.place(1, ADDRESSES[2])[0].address != ADDRESSES[2]
    router.workers.leave(ADDRESSES[2])
    assert router.place(1, ADDRESSES[2])[0].address != ADDRESSES[2]


def test_sessions_belong_to_tenants_and_roles_and_are_bounded():
    sessions = Sessions(num_max=3)
    sessions.note("t", "s", WorkerRole.PREFILL, "a")
    assert sessions.last("t", "s", WorkerRole.PREFILL) == "a"
    assert not any((sessions.last("t", "s", WorkerRole.DECODE), sessions.last("u", "s", WorkerRole.PREFILL)))
    assert sessions.last("", "ts", WorkerRole.PREFILL) == sessions.last("ts", "", WorkerRole.PREFILL) == ""
    sessions.note("t", "", WorkerRole.PREFILL, "a")
    assert len(sessions) == 1
    for number in range(5):
        sessions.note("t", f"s{number}", WorkerRole.PREFILL, "b")
        sessions.note("t", "s", WorkerRole.PREFILL, "c")
    assert len(sessions) == 3 and sessions.last("t", "s", WorkerRole.PREFILL) == "c"
    assert sessions.last("t", "s0", WorkerRole.PREFILL) == ""


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "drop", "compute", "evict", "guess", "lose the store"]),
            st.integers(0, 3),
            st.integers(0, 100),
        ),
        max_size=30,
    )
)
def test_what_the_store_does_not_have_is_never_promised_whatever_workers_say(steps):
    """put, drop: the store's. compute, evict: a worker's memory, told by events. guess: the router's own placements."""
    prompt = NAMES.prompt("t", HOT)
    directory, memories = Directory(), [Memory() for _ in ADDRESSES]
    followers = [MemoryFollower(directory, address) for address in ADDRESSES]
    store_feed = StoreFeed(None, fingerprint=FINGERPRINT)
    (nothing,) = snapshot_batches(Cursor(epoch=b"e"), ())
    store_feed.apply(nothing)
    stored, number = 0, 0
    for what, who, count in steps:
        kind = {"put": EventKind.STORED, "drop": EventKind.EVICTED}.get(what)
        if kind is not None:
            names = prompt.chain.hashes[stored:count] if what == "put" else prompt.chain.hashes[count:stored]
            stored, number = (max(stored, count), number + 1) if what == "put" else (min(stored, count), number + 1)
            event = BlockEvent.of(kind, names, FINGERPRINT)
            assert store_feed.apply(Batch(cursor=Cursor(epoch=b"e", number=number), events=(event,)))
        elif what == "compute":
            memories[who].store(prompt.chain.hashes[:count])
        elif what == "evict":
            memories[who].evict(reversed(prompt.chain.hashes[count:]))
        for follower, memory in zip(followers, memories, strict=True):
            assert all(follower.apply(batch) for batch in memory.log.snapshot())
        if what == "guess":
            directory.placed(ADDRESSES[who], prompt.keys[:count])
        known = None if what == "lose the store" else store_feed.num_leading(prompt.keys)
        work = prompt.work(known)
        workers = Workers(WorkerRole.PREFILL, make_policy("least_work"), ADDRESSES).workers
        loads = loads_of(workers, directory.leading(ADDRESSES, prompt.keys) * BLOCK, 0.0)
        if known is not None:
            assert known == stored
            assert cached_tokens(work, loads).max() <= stored * BLOCK
            assert own_work(work, loads)[0].min() >= work.num_tokens - min(stored * BLOCK, work.num_tokens - 1)
