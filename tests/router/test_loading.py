"""Placement considers how fast each worker reads from the stores that hold a prompt's blocks."""

import pytest

from antefix.located import Located, ReadSpeed
from antefix.record import Held
from antefix_router.naming import _places
from antefix_router.placement.directory import Directory
from antefix_router.placement.loading import loading_tokens
from antefix_router.placement.policy import make_policy
from antefix_router.placement.work import FETCH_WEIGHT, Work
from antefix_router.placement.workers import WorkerRole, Workers

NEAR = ReadSpeed(latency_s=0.001, seconds_per_token=1e-6)
FAR = ReadSpeed(latency_s=0.01, seconds_per_token=1e-5)
SLOW = ReadSpeed(latency_s=1.0, seconds_per_token=1e-2)


def work(*places, num_tokens=40_000):
    stored = sum(tokens for tokens, _ in places)
    runs = tuple((tokens, frozenset(stores)) for tokens, stores in places)
    return Work(num_tokens=num_tokens, stored_tokens=stored, affinity=1, places=runs)


def test_a_prefix_costs_what_the_fastest_of_its_stores_takes():
    prefix = work((10_000, "ab"))
    assert loading_tokens(prefix, 0, {"a": FAR, "b": NEAR}, 1000.0) == pytest.approx(1000 * (0.001 + 0.01))
    assert loading_tokens(prefix, 0, {"a": FAR}, 1000.0) == pytest.approx(1000 * (0.01 + 0.1))


def test_what_is_in_memory_is_not_loaded():
    prefix = work((10_000, "a"), (10_000, "b"))
    assert loading_tokens(prefix, 15_000, {"a": FAR, "b": FAR}, 1000.0) == pytest.approx(1000 * (0.01 + 0.05))
    assert loading_tokens(prefix, 20_000, {"a": FAR, "b": FAR}, 1000.0) == 0


def test_a_tier_that_is_slower_than_computing_counts_as_computing():
    assert loading_tokens(work((10_000, "a")), 0, {"a": SLOW}, 1000.0) == 10_000


def test_of_a_store_that_nobody_has_measured_a_guess_counts():
    assert loading_tokens(work((10_000, "a")), 0, {"b": NEAR}, 1000.0) == FETCH_WEIGHT * 10_000


def workers_of(*speeds):
    workers = Workers(
        WorkerRole.PREFILL, make_policy("least_work"), [f"127.0.0.1:{n}" for n in range(1, 1 + len(speeds))]
    )
    for worker, each in zip(workers.workers, speeds, strict=True):
        worker.note_speeds(each)
    return workers


@pytest.mark.parametrize("where", "ab")
def test_a_request_goes_where_its_blocks_are_read_fastest(where):
    workers = workers_of({"a": NEAR, "b": SLOW}, {"a": SLOW, "b": NEAR})
    chosen = workers.place(work((32_000, where)), Directory(), [1, 2], 128, frozenset())
    assert chosen is workers.workers["ab".index(where)]


def test_a_worker_whose_store_became_slow_gets_no_more_of_its_prefixes():
    workers = workers_of({"a": NEAR}, {"a": FAR})
    prefix = work((32_000, "a"))
    first, second = workers.workers
    assert workers.place(prefix, Directory(), [1], 128, frozenset()) is first
    first.note_speeds({"a": SLOW})
    assert workers.place(prefix, Directory(), [1], 128, frozenset()) is second


def test_without_speeds_placement_is_what_it_was():
    workers = workers_of({}, {})
    assert workers._loading(workers.workers, work((32_000, "a")), None) is None


def test_a_prompt_in_many_turns_of_stores_has_few_runs():
    flags = {name: [] for name in "ab"}
    for block in range(40):
        flags["ab"[block % 2]].append((block, block + 1))
    held = {name: Held(spans=tuple(spans)) for name, spans in flags.items()}
    word = Located(chain=[bytes([n]) * 32 for n in range(40)], fingerprint=b"f", held=held)
    runs = _places(word, 40, 128)
    assert len(runs) == 8 and sum(tokens for tokens, _ in runs) == 40 * 128
    assert _places(None, 40, 128) == ()
