"""Placement: least work wins, never by the first block alone, and load always comes back to zero."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Unavailable
from router.directory import Directory
from router.placement import Candidate, Work, choose, cost
from router.workers import Role, Workers

ADDRESSES = [f"127.0.0.1:{port}" for port in range(7001, 7009)]


def name(*path):
    return hashlib.blake2b(repr(path).encode(), digest_size=32).digest()


def candidate(address="a", queued=0, requests=0, resident=0, served=0, shunned=False):
    return Candidate(
        address=address,
        queued_tokens=queued,
        num_requests=requests,
        resident_tokens=resident,
        num_served=served,
        shunned=shunned,
    )


def work(num_tokens=1000, stored=0, prefix="p"):
    return Work(num_tokens=num_tokens, stored_tokens=stored, affinity=name(prefix))


def test_a_prefix_in_memory_beats_one_on_disk_beats_none():
    costs = [cost(work(1000, stored), candidate(resident=r)) for stored, r in ((900, 900), (900, 0), (0, 0))]
    assert costs == sorted(costs) and len(set(costs)) == 3


def test_a_long_queue_outweighs_a_prefix_in_memory():
    chosen = choose(work(1000), [candidate("busy", queued=5000, resident=900), candidate("free")])
    assert chosen.address == "free"


def test_twins_that_nobody_has_seen_meet():
    first = choose(work(prefix="twin"), [candidate(a) for a in ADDRESSES])
    second = choose(work(prefix="twin"), [candidate(a) for a in reversed(ADDRESSES)])
    assert first.address == second.address


def test_prompts_with_a_common_beginning_spread_over_workers():
    chosen = {
        choose(work(prefix=f"system prompt, user {i}"), [candidate(a) for a in ADDRESSES]).address for i in range(100)
    }
    assert len(chosen) == len(ADDRESSES)


def test_losing_a_worker_moves_only_its_own_prefixes():
    works = [work(prefix=str(i)) for i in range(200)]
    before = [choose(w, [candidate(a) for a in ADDRESSES]).address for w in works]
    after = [choose(w, [candidate(a) for a in ADDRESSES[1:]]).address for w in works]
    assert all(b == a for b, a in zip(before, after, strict=True) if b != ADDRESSES[0])


def test_a_worker_that_just_failed_is_the_last_choice():
    assert choose(work(), [candidate("failed", shunned=True), candidate("busy", queued=10**6)]).address == "busy"


@given(failures=st.lists(st.sampled_from([None, Unavailable, ValueError, KeyboardInterrupt]), max_size=30))
def test_load_is_given_back_however_a_request_ends(failures):
    workers = Workers.at(Role.PREFILL, ADDRESSES[:2])
    for kind in failures:
        worker = workers.place(work(), Directory(), [name("x")], 64, frozenset())
        try:
            with workers.load(worker, 123):
                assert worker.num_tokens == 123
                if kind:
                    raise kind()
        except (Unavailable, ValueError, KeyboardInterrupt):
            continue
    assert all((w.num_requests, w.num_tokens) == (0, 0) for w in workers.workers)
    assert sum(w.num_served for w in workers.workers) == len(failures)


def test_with_nobody_left_placement_says_so():
    workers = Workers.at(Role.DECODE, ADDRESSES[:1])
    with pytest.raises(Unavailable):
        workers.place(work(), Directory(), [], 64, frozenset(ADDRESSES))


@given(length=st.integers(0, 40), known=st.integers(0, 40))
def test_the_directory_finds_the_longest_known_prefix(length, known):
    directory, chain = Directory(), [name(i) for i in range(length)]
    directory.placed("w", chain[:known])
    assert directory.num_leading("w", chain) == min(length, known)
    assert directory.num_leading("other", chain) == 0
    directory.forget("w")
    assert directory.num_leading("w", chain) == 0


def test_the_directory_is_bounded_and_forgets_ends_before_beginnings():
    directory = Directory(num_blocks_max=10)
    old, new = [name("old", i) for i in range(8)], [name("new", i) for i in range(6)]
    directory.placed("w", old)
    directory.placed("w", new)
    assert directory.num_leading("w", new) == 6
    assert directory.num_leading("w", old) == 4
