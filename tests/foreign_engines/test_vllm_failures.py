"""While vLLM runs prompts, the store fills up, evicts, is slow, is shared, or dies. Each leads to a recomputation,
never to an error, and rows that are reported as restored are right.
"""

import threading
import time

import numpy as np
import pytest

from antefix.blocking import LoopThread
from antefix.errors import DeadlineExceeded
from antefix.secret import create_secret_file
from antefix_engines.vllm.v4_pages import Kind
from tests.foreign_engines import vllm_stand_in
from tests.foreign_engines.vllm_stand_in import Engine, LookupResult, key_of
from tests.small_disk import fill, small_disk
from tests.store.test_service import Service

PROMPTS = [list(range(first, first + 600)) for first in range(0, 60_000, 2000)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def vllm():
    with vllm_stand_in.stand_in() as modules:
        yield modules


@pytest.fixture
def start(vllm, tmp_path):
    started = []

    def start(**settings):
        own = {"directory": str(tmp_path / "data"), "budget_bytes": "64M"} if "address" not in settings else {}
        started.append(Engine(vllm, own | {"weights_revision": "w", "lookup_wait_s": 30.0} | settings))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def check_restored(engine, tokens, end):
    """Restore, and compare every row that was reported as restored. Returns the number of those rows."""
    context = engine.request(tokens)
    rows, result = engine.restore(tokens, end, context)
    good = set(result.successful_keys or ())
    assert result.success == (len(good) == len(rows))
    for (group, position), row in rows.items():
        if key_of(tokens, group, position) not in good:
            continue
        theirs = vllm_stand_in.row_bytes(tokens, group, position, engine.config.worker_kv_bytes_per_block)
        for run in engine.tier.rows.pages.runs[group]:
            if run.kind in (Kind.WINDOW, Kind.CSA, Kind.HCA, Kind.KEYS):
                assert np.array_equal(run.used(row), run.used(theirs)), (group, position)
    return len(good)


@pytest.mark.slow
def test_prompts_that_push_each_other_out_while_they_are_restored(start):
    """One thread of the store writes and evicts. Rows that are read meanwhile are right or missing."""
    engine = start(budget_bytes="16M")
    for tokens in PROMPTS[:6]:
        engine.store(tokens)
    found = [engine.num_hit(tokens) for tokens in PROMPTS[:6]]
    contexts = [engine.request(tokens) for tokens in PROMPTS]
    # These jobs wait in a queue, and are written while the restores below read.
    for tokens, context in zip(PROMPTS[6:], contexts[6:], strict=True):
        engine.submit_store(context, tokens, engine.rows_of(tokens))
    restored = [check_restored(engine, tokens, 512) for tokens in PROMPTS[:6]]
    assert any(found) and len(restored) == 6
    assert 0 in [engine.num_hit(tokens) for tokens in PROMPTS]


@pytest.mark.services
def test_a_full_disk_stores_nothing_and_still_restores(start, tmp_path):
    with small_disk(tmp_path / "small", 24 * MIB) as path:
        engine = start(directory=str(path / "data"))
        engine.store(PROMPTS[0])
        fill(path / "filler")
        results = [result for tokens in PROMPTS[1:12] for result in engine.store(tokens)]
        assert not all(result.success for result in results)
        assert engine.num_hit(PROMPTS[0]) in (0, 256, 512)
        for tokens in PROMPTS[:12]:
            if hit := engine.num_hit(tokens):
                assert check_restored(engine, tokens, hit)
        (path / "filler").unlink()
        # There is room again, so rows that are computed from now on are stored.
        deadline = time.monotonic() + 60
        while not all(result.success for result in engine.store(PROMPTS[20])) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert engine.num_hit(PROMPTS[20]) == 512
        engine.close()


def test_a_slow_read_holds_up_nothing_but_its_own_request(start, monkeypatch):
    engine = start(load_threads=2)
    for tokens in PROMPTS[:2]:
        engine.store(tokens)
    may_go, get = threading.Event(), engine.tier.rows.get
    slow = {key_of(PROMPTS[0], 3, 256)}
    monkeypatch.setattr(
        engine.tier.rows,
        "get",
        lambda prompt, rows: (slow & {row.key for row in rows} and may_go.wait(30), get(prompt, rows))[1],
    )
    context = engine.request(PROMPTS[0])
    assert engine.num_hit(PROMPTS[0], context) == 512
    rows = engine.rows_of(PROMPTS[0][:512], ends=[512])
    keys = [key_of(PROMPTS[0], *row) for row in rows]
    began = time.monotonic()
    engine.tier.submit_load(vllm_stand_in.TransferJob(10**6, keys, np.arange(len(keys)) + 200, True, context))
    assert time.monotonic() - began < 25 and not list(engine.tier.get_finished_jobs())
    other = engine.request(PROMPTS[1])
    assert engine.num_hit(PROMPTS[1], other) == 512
    keys = [key_of(PROMPTS[1], *row) for row in rows]
    engine.tier.submit_load(vllm_stand_in.TransferJob(10**6 + 1, keys, np.arange(len(keys)) + 100, True, other))
    deadline = time.monotonic() + 30
    done = []
    while not done and time.monotonic() < deadline:
        done = list(engine.tier.get_finished_jobs())
    assert [(each.job_id, each.success) for each in done] == [(10**6 + 1, True)]
    may_go.set()
    engine.tier.drain_jobs()
    assert [each.success for each in engine.tier.get_finished_jobs()] == [True]


def test_a_store_that_answers_too_late_is_a_miss(start, monkeypatch):
    engine = start()
    engine.store(PROMPTS[0])
    context = engine.request(PROMPTS[0])
    assert engine.num_hit(PROMPTS[0], context) == 512

    def late(*args, **kwargs):
        raise DeadlineExceeded("no answer in time")

    for name in ("lookup", "get_blocks", "get", "put"):
        monkeypatch.setattr(type(engine.tier._store._store), name, late)
    assert engine.restore(PROMPTS[0], 512, context)[1].successful_keys is None
    # vLLM asks for the request's keys again and gets a miss.
    assert engine.ask(context, key_of(PROMPTS[0], 3, 256)) is LookupResult.MISS
    assert not any(result.success for result in engine.store(PROMPTS[1]))
    counters = engine.tier._store.counters
    assert counters.by_kind["DeadlineExceeded"] == counters.errors > 0
    monkeypatch.undo()
    # Rows whose put failed are not taken as stored.
    assert all(result.success for result in engine.store(PROMPTS[1])) and engine.num_hit(PROMPTS[1]) == 512


@pytest.fixture
def served(tmp_path):
    loop, service = LoopThread(), Service(tmp_path / "served" / "store")
    loop.run(service.start())
    create_secret_file(tmp_path / "served" / "secret")
    yield loop, service
    loop.run(service.stop())
    loop.close()


@pytest.mark.slow
def test_two_engines_fill_and_read_one_service_at_once(start, served, tmp_path):
    where = {"address": served[1].address, "secret_file": str(tmp_path / "served" / "secret")}
    engines, shared, own = [start(**where), start(**where)], PROMPTS[:3], {0: PROMPTS[3:6], 1: PROMPTS[6:9]}
    failures = []

    def work(number):
        try:
            engine = engines[number]
            for tokens in (*shared, *own[number]):
                assert all(result.success for result in engine.store(tokens))
                assert check_restored(engine, tokens, engine.num_hit(tokens))
        except BaseException as err:
            failures.append(err)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    # Each engine reads rows that the other one stored.
    assert [engines[0].num_hit(tokens) for tokens in own[1]] == [512] * 3
    assert check_restored(engines[1], own[0][0], 512)


def test_a_service_that_restarts_in_the_middle_of_prompts(start, served, tmp_path):
    """The service stops between a prompt's look-up and its load, while other prompts are stored. No call raises."""
    loop, service = served
    engine = start(address=service.address, secret_file=str(tmp_path / "served" / "secret"))
    engine.store(PROMPTS[0])
    context = engine.request(PROMPTS[0])
    assert engine.num_hit(PROMPTS[0], context) == 512
    stored = engine.request(PROMPTS[1])
    job = engine.submit_store(stored, PROMPTS[1], engine.rows_of(PROMPTS[1]))
    loop.run(service.stop())
    engine.tier.drain_jobs()
    engine.result(job)
    _, result = engine.restore(PROMPTS[0], 512, context)
    assert not result.success and result.successful_keys is None
    loop.run(service.start())
    deadline = time.monotonic() + 60
    while engine.num_hit(PROMPTS[0]) != 512 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert check_restored(engine, PROMPTS[0], 512)
    # The stop may have lost this prompt's rows. They are stored when they are computed again.
    assert all(result.success for result in engine.store(PROMPTS[1])) and engine.num_hit(PROMPTS[1]) == 512
