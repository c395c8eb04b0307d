"""A request leaves a worker that hangs or is late, within a budget. Work that is done twice is shown once."""

import asyncio

import numpy as np
import pytest

from antefix.clients.decode import Decoded
from antefix.errors import Overloaded, Unavailable
from antefix_router.decode_stream import DecodeStream, first_work_s
from antefix_router.hedging import SAVED_MAX, HedgeBudget
from antefix_router.placement.pace import PROBE_S, slow_ones, without_slow
from antefix_router.placement.policy import make_policy
from antefix_router.placement.work import Work
from antefix_router.placement.workers import WorkerRole, Workers
from tests.router.test_prefilling import TOKENS, assert_idle, build, settled, start
from tests.waiting import AT_MOST_S, until


class Silent:
    """A worker's pulse, as the worker sends it."""

    rtt_s = 0.0

    def __init__(self):
        self.is_silent = False
        self._hushed = asyncio.Event()

    def hush(self):
        self.is_silent = True
        self._hushed.set()

    def guard(self, patience_s=0.0):
        return _Guard(self)


class _Guard:
    def __init__(self, pulse):
        self._pulse = pulse

    def __enter__(self):
        if self._pulse.is_silent:
            raise Unavailable("it does not answer")
        self._task = asyncio.create_task(self._watch(asyncio.current_task()))

    async def _watch(self, task):
        await self._pulse._hushed.wait()
        task.cancel()

    def __exit__(self, kind, err, trace):
        self._task.cancel()
        if self._pulse.is_silent and kind is asyncio.CancelledError:
            raise Unavailable("it does not answer")


@pytest.fixture(autouse=True)
def no_slack(monkeypatch):
    """Hangs are noticed in a hundredth of the usual time."""
    monkeypatch.setattr("antefix_router.prefill_calls.SLACK_S", 0.01)
    monkeypatch.setattr("antefix_router.decode_stream.SLACK_S", 0.01)


def speeds(workers, *tokens_per_s):
    for worker, speed in zip(workers.workers, tokens_per_s, strict=True):
        worker.backlog.tokens_per_s = speed


async def test_a_worker_that_hangs_is_left_for_another_one():
    prefilling, workers, clients, _ = build(num_workers=2)
    for worker in workers.workers:
        worker.pulse = Silent()
    task = start(prefilling, "r")
    await settled()
    hung = next(worker for worker, client in zip(workers.workers, clients, strict=True) if client.calls)
    other = next(client for client in clients if not client.calls)
    other.gate.set()
    hung.pulse.hush()
    assert (await task).answer is not None
    assert other.calls == ["r"]
    # No request goes to that worker until it answers again.
    assert (await start(prefilling, "next", np.flip(TOKENS))).answer is not None
    assert other.calls == ["r", "next"]
    assert_idle(prefilling, workers)


async def test_without_another_worker_decode_does_what_a_hanging_one_does_not():
    prefilling, workers, _, _ = build()
    workers.workers[0].pulse = Silent()
    task = start(prefilling, "r")
    await settled()
    workers.workers[0].pulse.hush()
    assert (await task).answer is None
    assert prefilling.counters.num_left == 1
    assert_idle(prefilling, workers)


async def test_of_two_workers_the_first_answer_counts_and_the_other_call_ends():
    prefilling, workers, clients, _ = build(num_workers=2)
    speeds(workers, 1e9, 1e9)
    task = start(prefilling, "r")
    await settled()
    other = next(client for client in clients if not client.calls)
    other.gate.set()
    assert (await task).answer.handoff == b"r"
    assert [client.calls for client in clients] == [["r"], ["r"]]
    counters = prefilling.counters
    assert (counters.num_hedged, counters.num_hedges_won, counters.num_led) == (1, 1, 1)
    assert_idle(prefilling, workers)
    assert sum(workers.num_ended.values()) == 2 and workers.num_ended["cancelled"] == 1


async def test_the_late_one_may_still_be_first():
    prefilling, workers, clients, _ = build(num_workers=2)
    speeds(workers, 1e9, 1e9)
    task = start(prefilling, "r")
    await settled()
    late = next(client for client in clients if client.calls)
    await until(lambda: prefilling.counters.num_hedged)
    late.gate.set()
    assert (await task).answer is not None
    assert prefilling.counters.num_hedges_won == 0
    assert_idle(prefilling, workers)


async def test_a_loaded_deployment_does_not_do_its_work_twice():
    """All workers are late at once. The budget bounds the hedged requests, whatever the number of requests."""
    prefilling, workers, clients, _ = build(num_workers=2)
    speeds(workers, 1e9, 1e9)
    num = 200
    tasks = [start(prefilling, f"r{i}", (np.arange(400, dtype=np.uint32) * 7 + i * 13)) for i in range(num)]
    await until(lambda: prefilling._calls._budget.num_denied)
    for client in clients:
        client.gate.set()
    await asyncio.gather(*tasks)
    num_calls = sum(len(client.calls) for client in clients)
    assert num_calls <= num + SAVED_MAX + 0.1 * num
    assert_idle(prefilling, workers)


async def test_a_late_answer_is_waited_for_where_the_others_have_more_to_do():
    prefilling, workers, clients, _ = build(num_workers=2)
    speeds(workers, 1e9, 1e9)
    workers.workers[0].num_requests, workers.workers[1].num_requests = 3, 9
    task = start(prefilling, "r")
    await asyncio.sleep(0.05)
    assert [client.calls for client in clients] == [["r"], []]
    assert prefilling.counters.num_hedged == 0
    for client in clients:
        client.gate.set()
    await task


async def test_a_second_worker_that_is_full_takes_nothing_from_the_first():
    prefilling, workers, clients, _ = build(num_workers=2)
    speeds(workers, 1e9, 1e9)
    task = start(prefilling, "r")
    await settled()
    late, other = sorted(clients, key=lambda client: not client.calls)
    other.failures = [Overloaded("full")]
    other.gate.set()
    await until(lambda: other.calls)
    late.gate.set()
    assert (await task).answer is not None
    assert_idle(prefilling, workers)


def test_a_budget_gives_a_tenth_and_what_was_saved():
    budget = HedgeBudget()
    assert sum(budget.take() for _ in range(100)) == SAVED_MAX
    for _ in range(1000):
        budget.note_request()
    assert sum(budget.take() for _ in range(100)) == SAVED_MAX
    taken = 0
    for _ in range(1000):
        budget.note_request()
        taken += budget.take()
    assert 99 <= taken <= 101


def decoders(num=2):
    return Workers(WorkerRole.DECODE, make_policy("least_work"), [f"127.0.0.1:{7101 + i}" for i in range(num)])


async def messages(*gaps_s):
    for seconds in gaps_s:
        await asyncio.sleep(seconds)
        yield Decoded(tokens=np.zeros(1, np.uint32))


async def read(stream, outputs):
    num = 0
    while await stream.next(outputs) is not None:
        num += 1
    return num


async def test_an_output_that_stops_coming_moves():
    workers = decoders()
    stream = DecodeStream(workers, workers.workers[0], {workers.workers[0].address}, HedgeBudget(), own_s=0.0)
    with pytest.raises(Unavailable, match="nothing came"):
        async with asyncio.timeout(AT_MOST_S):
            await read(stream, messages(0, 0, 0, 30))


async def test_an_output_waits_where_nobody_else_is_or_the_budget_is_gone():
    workers = decoders(1)
    stream = DecodeStream(workers, workers.workers[0], {workers.workers[0].address}, HedgeBudget(), own_s=0.0)
    assert await read(stream, messages(0, 0, 0, 0.05)) == 4
    workers, budget = decoders(2), HedgeBudget()
    while budget.take():
        pass
    stream = DecodeStream(workers, workers.workers[0], {workers.workers[0].address}, budget, own_s=0.0)
    assert await read(stream, messages(0, 0, 0, 0.05)) == 4


async def test_a_prompt_that_decode_computes_itself_has_its_time():
    workers = decoders()
    own_s = first_work_s(Work(num_tokens=1000, stored_tokens=0, affinity=0), False, workers.workers[0], 1000.0, False)
    assert own_s == 1.0
    stream = DecodeStream(workers, workers.workers[0], {workers.workers[0].address}, HedgeBudget(), own_s=own_s)
    assert await read(stream, messages(0.1, 0, 0)) == 3


def test_a_worker_that_is_far_behind_gets_a_request_now_and_then():
    workers = decoders(3)
    slow, *others = workers.workers
    for worker in others:
        worker.pace.gap_s = 0.1
    slow.pace.gap_s = 0.35
    assert without_slow(workers.workers, now=5.0) == workers.workers, "three times is load, or chance"
    slow.pace.gap_s = 0.5
    assert slow_ones(workers.workers) == [slow]
    assert without_slow(workers.workers, now=5.0) == others
    assert without_slow(workers.workers, now=PROBE_S + 1.0) == workers.workers
    slow.probed_at = PROBE_S + 1.0
    assert without_slow(workers.workers, now=PROBE_S + 2.0) == others
    assert without_slow([slow], now=5.0) == [slow], "better a slow one than none"


def test_slow_answers_and_slow_prefills_show_too():
    workers = decoders(2)
    slow, other = workers.workers
    slow.pulse, other.pulse = Silent(), Silent()
    slow.pulse.rtt_s, other.pulse.rtt_s = 0.9, 0.01
    assert slow_ones(workers.workers) == [slow]
    slow.pulse.rtt_s = 0.2
    assert slow_ones(workers.workers) == []
    slow.backlog.tokens_per_s, other.backlog.tokens_per_s = 100.0, 1000.0
    assert slow_ones(workers.workers) == [slow]


async def test_a_hung_worker_is_the_last_choice():
    workers = decoders(2)
    hung, other = workers.workers
    hung.pulse = Silent()
    hung.pulse.hush()
    assert list(workers.fit(workers.workers, frozenset())) == [other]
    assert list(workers.fit(workers.workers, frozenset({other.address}))) == [hung]
