"""Equal prefixes in flight are computed once. No request waits for ever or is lost.

A queue that is too long refuses.
"""

import asyncio
import contextlib

import numpy as np
import pytest

from antefix.clients import PrefillClient, Prefilled
from antefix.errors import InternalError, InvalidRequest, NotFinite, Overloaded, StepFailed, Unavailable
from antefix.generation_request import Breakpoint, Caller, GenerationRequest
from antefix.record import LookupResult
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix_router import inflight
from antefix_router.load_shedding import LoadShedding
from antefix_router.naming import PromptNames
from antefix_router.placement.directory import Directory
from antefix_router.placement.policy import make_policy
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.prefill_calls import Limits
from antefix_router.prefilling import Prefilling, Ready
from tests.waiting import AT_MOST_S

FINGERPRINT = b"f" * 32
NAMES = PromptNames(fingerprint=FINGERPRINT, keyring=Keyring(b"s" * 32), block_size=4)
TOKENS = np.arange(403, dtype=np.uint32)


class FakeStore:
    """Holds the blocks that prefill workers put. A test may take it down."""

    def __init__(self):
        self.hashes = set()
        self.down = False

    async def lookup(self, chain, *, fingerprint, tenant=b""):
        await asyncio.sleep(0)
        if self.down:
            raise Unavailable("store")
        return LookupResult(num_blocks=next((i for i, h in enumerate(chain) if h not in self.hashes), len(chain)))


class FakePrefill(PrefillClient):
    """Each call waits for `gate`, then stores the prompt's blocks, or raises the error that the test set."""

    def __init__(self, address, store):
        self.address, self.store, self.gate = address, store, asyncio.Event()
        self.failures, self.calls = [], []

    async def prefill(self, request, *, timeout_s, located=None):
        request_id, tokens, tenant = request.request_id, request.tokens, request.cache_tenant
        self.calls.append(request_id)
        self.kept = request.breakpoints
        await asyncio.wait_for(self.gate.wait(), timeout_s)
        if self.failures:
            raise self.failures.pop(0)
        prompt = NAMES.prompt(tenant, tokens)
        new = sum(name not in self.store.hashes for name in prompt.chain.hashes)
        self.store.hashes.update(prompt.chain.hashes)
        return Prefilled(handoff=request_id.encode(), restore=RestoreReport(written_tokens=new * 4))


def build(num_workers=1, **limits):
    store = FakeStore()
    workers = Workers(
        WorkerRole.PREFILL, make_policy("least_work"), [f"127.0.0.1:{7001 + i}" for i in range(num_workers)]
    )
    clients = []
    for worker in workers.workers:
        worker.client = FakePrefill(worker.address, store)
        clients.append(worker.client)
    limits = Limits(**{"prefill_tokens_min": 0, **limits})
    return Prefilling(workers, store, Directory(), fingerprint=FINGERPRINT, limits=limits), workers, clients, store


def start(prefilling, request_id, tokens=TOKENS, timeout_s=AT_MOST_S, breakpoints=()):
    request = request_of(request_id, tokens, breakpoints)
    return asyncio.create_task(prefilling.run(request, NAMES.prompt("t", tokens), timeout_s=timeout_s))


def request_of(request_id, tokens=TOKENS, breakpoints=(), session="", num_samples=1):
    return GenerationRequest(
        tokens=tokens,
        sampling=Sampling(max_tokens=1),
        caller=Caller(tenant="t", request_id=request_id, session=session),
        breakpoints=tuple(breakpoints),
        num_samples=num_samples,
    )


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


def assert_idle(prefilling, workers):
    assert len(prefilling._in_flight) == 0
    assert all((w.num_requests, w.num_tokens, len(w.backlog)) == (0, 0, 0) for w in workers.workers)


async def test_what_a_prompt_takes_a_worker_is_no_wait_of_the_next_one():
    prefilling, workers, (client,), _ = build()
    workers.workers[0].backlog.tokens_per_s = 100.0
    shedding = LoadShedding(2.0, lambda: 1)
    tasks = []
    for number, (length, num_counted) in enumerate(((80, 1), (400, 0), (80, 1))):
        with shedding.waiting("t"):
            tasks.append(start(prefilling, f"r{number}", np.arange(length, dtype=np.uint32) + 10_000 * number))
            await settled()
            # 0.8 s and 4 s of work: the second prompt is passed by short ones.
            assert (shedding.num_waiting, shedding._waiting["t"]) == (1, num_counted)
    client.gate.set()
    await asyncio.gather(*tasks)


async def test_twins_are_computed_once():
    prefilling, workers, (client,), _ = build()
    tasks = [start(prefilling, f"r{i}") for i in range(5)]
    await settled()
    assert client.calls == ["r0"]
    client.gate.set()
    results = await asyncio.gather(*tasks)
    assert sorted(r.answer.restore.written_tokens for r in results) == [0, 0, 0, 0, 400]
    assert prefilling.counters.num_followed == 4
    assert_idle(prefilling, workers)


async def test_a_prompt_that_shares_a_beginning_waits_for_it_and_computes_the_rest():
    prefilling, workers, (client,), _ = build()
    other = np.concatenate((TOKENS[:360], np.full(60, 9, np.uint32)))
    tasks = [start(prefilling, "first"), start(prefilling, "second", other)]
    await settled()
    assert client.calls == ["first"]
    client.gate.set()
    first, second = await asyncio.gather(*tasks)
    assert (first.answer.restore.written_tokens, second.answer.restore.written_tokens) == (400, 60)
    assert_idle(prefilling, workers)


async def test_a_prompt_that_shares_little_does_not_wait():
    prefilling, workers, clients, _ = build(num_workers=2)
    other = np.concatenate((TOKENS[:8], np.full(400, 9, np.uint32)))
    tasks = [start(prefilling, "first"), start(prefilling, "second", other)]
    await settled()
    assert sorted(call for client in clients for call in client.calls) == ["first", "second"]
    for client in clients:
        client.gate.set()
    await asyncio.gather(*tasks)
    assert_idle(prefilling, workers)


async def test_a_leader_that_fails_wakes_its_followers_and_one_of_them_leads_on():
    prefilling, workers, (client,), _ = build()
    client.failures = [InvalidRequest("only the leader's fault")]
    tasks = [start(prefilling, f"r{i}") for i in range(4)]
    await settled()
    client.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], InvalidRequest)
    assert sorted(r.answer.restore.written_tokens for r in results[1:]) == [0, 0, 400]
    assert_idle(prefilling, workers)


async def test_a_leader_whose_client_leaves_wakes_its_followers():
    prefilling, workers, (client,), _ = build()
    tasks = [start(prefilling, f"r{i}") for i in range(3)]
    await settled()
    tasks[0].cancel()
    await settled()
    client.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert sorted(r.answer.restore.written_tokens for r in results[1:]) == [0, 400]
    assert_idle(prefilling, workers)


async def test_a_leaders_dead_worker_is_replaced_while_followers_wait():
    prefilling, workers, clients, _ = build(num_workers=2)
    tasks = [start(prefilling, f"r{i}") for i in range(3)]
    await settled()
    busy = next(client for client in clients if client.calls)
    busy.failures = [Unavailable("killed")]
    for client in clients:
        client.gate.set()
    results = await asyncio.gather(*tasks)
    assert sorted(r.answer.restore.written_tokens for r in results) == [0, 0, 400]
    assert_idle(prefilling, workers)


async def test_followers_do_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(inflight, "WAIT_SLACK_S", 0.05)
    monkeypatch.setattr(inflight, "WAIT_FACTOR", 0.0)
    prefilling, workers, clients, _ = build(num_workers=2)
    leader = start(prefilling, "stuck")
    await settled()
    monkeypatch.setattr("antefix_router.prefilling.worth_waiting", lambda remaining_s, shared_s: True)
    follower = start(prefilling, "follower")
    idle = next(client for client in clients if not client.calls)
    idle.gate.set()
    answer = await asyncio.wait_for(follower, AT_MOST_S)
    assert answer.answer.restore.written_tokens == 400 and not leader.done()
    assert prefilling.counters.num_gave_up_waiting == 1
    for client in clients:
        client.gate.set()
    await leader
    assert_idle(prefilling, workers)


async def test_a_store_that_is_down_stops_nobody_and_makes_nobody_compute_twice():
    """The handoff of a prefill worker would be lost, so the decode worker computes the prompt, which it then does once.
    A request with breakpoints still needs a prefill worker.
    """
    prefilling, workers, (client,), store = build()
    store.down = True
    client.gate.set()
    results = await asyncio.gather(*(start(prefilling, f"r{i}") for i in range(3)))
    assert all(result.answer is None for result in results) and not client.calls
    assert (await start(prefilling, "marked", breakpoints=[Breakpoint(64, 0.0)])).answer is not None
    assert_idle(prefilling, workers)


async def test_without_any_worker_decode_does_it_alone():
    prefilling, _, clients, _ = build()
    clients[0].failures = [Unavailable("dead")]
    clients[0].gate.set()
    assert (await start(prefilling, "r")).answer is None


async def test_too_long_a_queue_is_refused_early_with_a_hint_and_an_idle_worker_never_refuses():
    prefilling, workers, (client,), _ = build(ttft_s_max=1.0)
    worker = workers.workers[0]
    worker.backlog.tokens_per_s = 100.0
    leader = start(prefilling, "long")  # 4 s of work, on an idle worker
    await settled()
    with pytest.raises(Overloaded) as caught:
        await start(prefilling, "other", np.full(200, 8, np.uint32))
    assert 0 < caught.value.retry_after_s <= 6
    assert prefilling.counters.num_refused == 1
    client.gate.set()
    await leader
    assert_idle(prefilling, workers)


async def test_a_short_rest_goes_straight_to_decode():
    prefilling, _, (client,), _ = build(prefill_tokens_min=10)
    client.gate.set()
    await start(prefilling, "first")
    assert (await start(prefilling, "second", np.append(TOKENS, [1, 2]).astype(np.uint32))).answer is None
    assert client.calls == ["first"]


async def test_what_is_to_be_kept_is_asked_of_a_prefill_worker():
    prefilling, _, (client,), _ = build(prefill_tokens_min=1000)
    client.gate.set()
    assert (await start(prefilling, "r", breakpoints=((256, 60.0),))).answer is not None
    assert client.kept == ((256, 60.0),)


async def test_measured_speeds_decide_what_a_short_rest_is():
    prefilling, workers, (client,), _ = build(prefill_tokens_min=-1)
    client.gate.set()
    await start(prefilling, "first")
    longer = np.append(TOKENS, np.arange(100)).astype(np.uint32)
    workers.workers[0].backlog.tokens_per_s = 1000.0
    for overhead_s, running, straight in ((0.05, 0, True), (0.05, 9, False), (2.0, 9, True)):
        prefilling.counters.overhead_s = overhead_s
        prefilling._num_decoding = lambda running=running: running
        assert prefilling._goes_straight(NAMES.prompt("t", longer).work(100)) is straight
    prefilling.counters.overhead_s = 0.0
    assert not prefilling._goes_straight(NAMES.prompt("t", longer).work(100))


async def test_prompts_that_wait_on_a_decode_worker_keep_further_ones_from_it():
    prefilling, workers, (client,), _ = build(prefill_tokens_min=-1)
    client.gate.set()
    await start(prefilling, "first")
    workers.workers[0].backlog.tokens_per_s, prefilling.counters.overhead_s = 1000.0, 0.3
    work = NAMES.prompt("t", np.append(TOKENS, np.arange(100)).astype(np.uint32)).work(100)
    with contextlib.ExitStack() as left:
        for number in range(3):
            # 103 tokens are 0.1 s, and each one waits for those before it.
            assert prefilling._goes_straight(work), number
            left.enter_context(prefilling.left_to_decode(Ready(work=work, answer=None)))
        assert not prefilling._goes_straight(work)
        # A prompt that a prefill worker has computed waits for nothing there.
        with prefilling.left_to_decode(Ready(work=work, answer=Prefilled(handoff=b"", restore=RestoreReport()))):
            prefilling.counters.overhead_s = 0.4
            assert prefilling._goes_straight(work)
    prefilling.counters.overhead_s = 0.3
    assert prefilling._goes_straight(work)
    # Half of a worker that decodes belongs to its steps: own wait 0.2 s, and 0.1 s for the other one.
    prefilling._num_decoding, prefilling.counters.overhead_s = (lambda: 1), 0.19
    assert not prefilling._goes_straight(work)


@pytest.mark.parametrize("error", [StepFailed("a step failed"), NotFinite("NaN"), InternalError("a bug")])
async def test_a_prompt_whose_steps_fail_is_tried_on_one_other_worker(error):
    """It may make every worker fail. If only one has failed, decode tries it."""
    prefilling, workers, clients, _ = build(num_workers=4)
    for client in clients:
        client.failures = [error] * 4
        client.gate.set()
    with pytest.raises(type(error)):
        await start(prefilling, "r")
    assert sorted(len(client.calls) for client in clients) == [0, 0, 1, 1]
    assert_idle(prefilling, workers)
    prefilling, workers, (client,), _ = build()
    client.failures = [error]
    client.gate.set()
    ready = await start(prefilling, "r")
    assert ready.answer is None and ready.has_failed
    assert_idle(prefilling, workers)
