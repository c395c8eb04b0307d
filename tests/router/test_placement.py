"""Load always returns to zero, and the directory knows what it was told, within its bound."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Unavailable
from antefix.events.block_events import keys_of
from antefix_router.placement.backlog import Backlog
from antefix_router.placement.directory import Directory
from antefix_router.placement.policy import make_policy
from antefix_router.placement.work import Work
from antefix_router.placement.workers import WorkerRole, Workers

ADDRESSES = [f"127.0.0.1:{port}" for port in range(7001, 7009)]


def key(*path):
    return int.from_bytes(hashlib.blake2b(repr(path).encode(), digest_size=8).digest(), "little")


def work(num_tokens=1000, stored=0, prefix="p"):
    return Work(num_tokens=num_tokens, stored_tokens=stored, affinity=key(prefix))


def workers_of(role, addresses):
    return Workers(role, make_policy("least_work"), addresses)


@given(failures=st.lists(st.sampled_from([None, Unavailable, ValueError, KeyboardInterrupt]), max_size=30))
def test_load_is_given_back_however_a_request_ends(failures):
    workers = workers_of(WorkerRole.PREFILL, ADDRESSES[:2])
    for kind in failures:
        worker = workers.place(work(), Directory(), [key("x")], 64, frozenset())
        try:
            with workers.load(worker, 123, num_active_tokens=7):
                assert worker.num_tokens == 123
                if kind:
                    raise kind()
        except (Unavailable, ValueError, KeyboardInterrupt):
            continue
    assert all((w.num_requests, w.num_tokens, w.num_active_tokens) == (0, 0, 0) for w in workers.workers)
    assert all(len(w.backlog) == 0 and w.backlog.pending_tokens(1e12) == 0 for w in workers.workers)
    assert sum(w.num_served for w in workers.workers) == len(failures)


def test_with_nobody_left_placement_says_so():
    workers = workers_of(WorkerRole.DECODE, ADDRESSES[:1])
    with pytest.raises(Unavailable):
        workers.place(work(), Directory(), [], 64, frozenset(ADDRESSES))


def test_a_request_moves_on_though_the_worker_that_failed_has_left_since():
    workers = Workers(WorkerRole.DECODE, make_policy("least_work"), ["a:1", "b:1"])
    assert workers.has_another({"a:1"})
    workers.leave("a:1")  # its lease ended while the request waited
    assert workers.has_another({"a:1"}) and not workers.has_another({"a:1", "b:1"})
    for address in ("c:1", "d:1", "e:1"):
        workers.join(address)
    assert not workers.has_another({"a:1", "b:1", "c:1"})  # a request moves at most three times


def test_a_worker_that_failed_or_drains_is_taken_only_where_there_is_no_other():
    workers = workers_of(WorkerRole.PREFILL, ADDRESSES[:2])
    first, second = workers.workers
    with pytest.raises(Unavailable), workers.load(first, 10):
        raise Unavailable("gone")
    assert workers.place(work(), Directory(), [], 64, frozenset()) is second
    assert workers.place(work(), Directory(), [], 64, frozenset({second.address})) is first
    second.draining = True
    assert workers.place(work(), Directory(), [], 64, frozenset()) is first


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 10_000)),
            st.tuples(st.just("end"), st.integers(0, 9), st.booleans()),
        ),
        max_size=40,
    )
)
def test_a_backlog_is_never_negative_nor_more_than_what_was_added(steps):
    backlog, tickets, now = Backlog(), {}, 0.0
    for step in steps:
        now += 0.25
        if step[0] == "add":
            tickets[backlog.add(step[1], now)] = step[1]
        elif tickets:
            ticket = list(tickets)[step[1] % len(tickets)]
            backlog.remove(ticket, now, done=step[2])
            del tickets[ticket]
        assert 0 <= backlog.pending_tokens(now) <= sum(tickets.values()) + 1e-6
    for ticket in tickets:
        backlog.remove(ticket, now, done=False)
    assert backlog.pending_tokens(now) == 0


def test_a_backlog_counts_what_the_worker_has_done_of_the_first_request():
    backlog = Backlog()
    backlog.remove(backlog.add(1000, 0.0), 10.0, done=True)
    assert backlog.tokens_per_s == 100
    backlog.add(1000, 20.0)
    backlog.add(500, 21.0)
    assert backlog.pending_tokens(25.0) == 1000
    assert backlog.pending_tokens(1000.0) == 500


def test_prompts_that_end_together_do_not_make_a_worker_look_faster_than_it_is():
    backlog, now = Backlog(), 0.0
    waiting = [backlog.add(256, now) for _ in range(8)]
    for number in range(200):
        now += 0.25
        # Two rests in one call, which need not be the ones that were placed first, and end 0.1 ms apart.
        for ticket in (waiting.pop(number % 3), waiting.pop(0)):
            backlog.remove(ticket, now, done=True)
            now += 0.0001
            waiting.append(backlog.add(256, now))
    assert backlog.tokens_per_s == pytest.approx(2 * 256 / 0.2502, rel=0.1)


def test_a_worker_that_hung_once_is_not_slow_for_ever_after():
    backlog = Backlog()
    for number in range(40):
        start = 100.0 * number
        backlog.remove(backlog.add(1000, start), start + (60.0 if number == 20 else 1.0), done=True)
        assert backlog.tokens_per_s >= 850
    assert backlog.tokens_per_s == pytest.approx(1000, rel=0.1)


@given(length=st.integers(0, 40), known=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_the_directory_finds_each_workers_longest_known_prefix(length, known):
    directory, chain = Directory(), [key(i) for i in range(length)]
    for number, num_blocks in enumerate(known):
        directory.placed(f"w{number}", chain[:num_blocks])
    addresses = [*(f"w{number}" for number in range(len(known))), "other"]
    assert directory.leading(addresses, chain).tolist() == [*(min(length, n) for n in known), 0]
    directory.forget("w0")
    assert directory.leading(addresses, chain)[0] == 0
    assert directory.leading(addresses, chain)[1:].tolist() == [*(min(length, n) for n in known[1:]), 0]


def test_what_a_worker_dropped_is_not_its_own_any_more_and_others_keep_theirs():
    directory, chain = Directory(), [key(i) for i in range(8)]
    directory.placed("a", chain)
    directory.placed("b", chain)
    directory.evicted("a", chain[5:])
    assert directory.leading(["a", "b"], chain).tolist() == [5, 8]
    directory.evicted("b", chain)
    directory.evicted("a", chain)
    assert len(directory) == 0


def test_a_worker_that_comes_back_under_its_address_is_believed_empty():
    directory, chain = Directory(), [key(i) for i in range(4)]
    for _ in range(200):  # more than the number of departed workers that are remembered
        directory.placed("w", chain)
        directory.forget("w")
        assert directory.leading(["w"], chain).tolist() == [0]
    directory.placed("v", chain[:2])
    assert directory.leading(["w", "v"], chain).tolist() == [0, 2]


def test_the_directory_is_bounded_and_forgets_what_was_not_used():
    directory = Directory(num_blocks_max=100)
    used = [key("used", i) for i in range(20)]
    for number in range(50):
        directory.placed("w", used)
        directory.placed("w", [key(number, i) for i in range(20)])
        assert len(directory) <= 100
    assert directory.leading(["w"], used).tolist() == [20]
    assert directory.leading(["w"], [key(0, i) for i in range(20)]).tolist() == [0]


def test_keys_are_the_first_bytes_of_hashes():
    hashes = [hashlib.blake2b(bytes([i]), digest_size=32).digest() for i in range(5)]
    assert keys_of(hashes) == [int.from_bytes(name[:8], "little") for name in hashes]
    assert keys_of([]) == []
    assert all(isinstance(name, int) for name in keys_of(hashes)) and np.dtype("<u8").itemsize == 8
