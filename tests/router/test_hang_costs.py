"""What a hang costs, on a simulated clock: at most 2 s more than the prediction for a worker. A store that hangs keeps
the router for a moment, and its calls end when the hang is noticed; tests/prefill/test_late_store.py has what it costs
workers.
"""

import asyncio

import pytest

from antefix.clients import PrefillClient, Prefilled
from antefix.errors import DeadlineExceeded, Unavailable
from antefix.pulse import Pulse
from antefix.restore_report import RestoreReport
from antefix.store.breaker import SLACK_S, Breaker
from antefix.store.patience import FLOOR_S, UNKNOWN_S
from antefix_router.placement.directory import Directory
from antefix_router.placement.policy import make_policy
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.prefill_calls import Limits
from antefix_router.prefilling import Prefilling
from tests.router.test_moves import FOREVER, Peer, asked, simulate
from tests.router.test_prefilling import FINGERPRINT, NAMES, TOKENS, FakeStore, request_of

pytestmark = pytest.mark.impatient

# A hang is noticed within this time, and moves a request (the issue of all timings here).
COST_S = 2.0
TOKENS_PER_S = 200.0
ALONE_S = len(TOKENS) / TOKENS_PER_S


def now_s():
    return asyncio.get_running_loop().time()


class Prefiller(PrefillClient):
    """A prefill worker that computes for `ALONE_S`.  hangs_s: when it stops for ever, by the loop's clock."""

    def __init__(self, hangs_s=FOREVER):
        self.hangs_s = hangs_s

    async def ask(self):
        await asyncio.sleep(0.001)
        if now_s() >= self.hangs_s:
            await asyncio.sleep(FOREVER)

    async def prefill(self, request, *, timeout_s, located=None):
        await asyncio.sleep(ALONE_S)
        if now_s() >= self.hangs_s:
            await asyncio.sleep(FOREVER)
        return Prefilled(handoff=b"h", restore=RestoreReport())


class HungLookUps(FakeStore):
    async def lookup(self, chain, *, fingerprint, tenant=b""):
        await asyncio.sleep(60.0)
        return await super().lookup(chain, fingerprint=fingerprint, tenant=tenant)


def prefilled_s(*clients, store=None):
    """How long a prompt takes with these workers, and whether one of them computed it."""

    async def one():
        clock = asyncio.get_running_loop().time
        workers = Workers(WorkerRole.PREFILL, make_policy("least_work"), [f"p:{i}" for i, _ in enumerate(clients)])
        for worker, client in zip(workers.workers, clients, strict=True):
            worker.client, worker.backlog.tokens_per_s = client, TOKENS_PER_S
            worker.pulse = Pulse(worker.address, client.ask, clock=clock)
            worker.pulse.start()
        limits = Limits(prefill_tokens_min=0)
        prefilling = Prefilling(workers, store or FakeStore(), Directory(), fingerprint=FINGERPRINT, limits=limits)
        await asyncio.sleep(5.0 - clock())
        ready = await prefilling.run(request_of("r"), NAMES.prompt("t", TOKENS), timeout_s=600.0)
        took_s = clock() - 5.0
        for worker in workers.workers:
            await worker.pulse.close()
        return took_s, ready.answer is not None

    return simulate(one)


@pytest.mark.parametrize("hangs_s", [4.0, 4.6, 5.0, 5.1, 5.6, 6.2, 6.9, 7.0])
def test_a_prefill_worker_that_hangs_costs_two_seconds_more_than_predicted(hangs_s):
    """It hangs before the request, when the request comes, or while it computes."""
    assert prefilled_s(Prefiller()) == (pytest.approx(ALONE_S, abs=0.1), True)
    # With another worker, the prompt is computed there.
    for clients in ((Prefiller(hangs_s), Prefiller()), (Prefiller(), Prefiller(hangs_s))):
        took_s, is_computed = prefilled_s(*clients)
        # The other worker begins again, when the hang was noticed.
        assert is_computed and took_s <= max(0.0, hangs_s - 5.0) + COST_S + ALONE_S + 0.1
    # Without another one, decode is told to compute it.
    took_s, is_computed = prefilled_s(Prefiller(hangs_s))
    assert not is_computed and took_s <= max(0.0, hangs_s - 5.0) + COST_S


@pytest.mark.parametrize("hangs_s", [4.0, 4.9, 5.0, 5.05, *(5.0 + 0.13 * number for number in range(1, 7))])
def test_a_decode_worker_that_hangs_costs_two_seconds_more_than_its_output(hangs_s):
    """It hangs before the first token, between two tokens, or before the end."""
    found, alone_s = asked(Peer(), Peer())
    assert found == list(range(8)) and alone_s == pytest.approx(0.8, abs=0.05)
    hung = {"silent": (hangs_s, FOREVER)}
    for peers in ((Peer(**hung), Peer()), (Peer(), Peer(**hung))):
        found, took_s = asked(*peers)
        assert found == list(range(8)) and took_s <= alone_s + COST_S


def test_a_store_that_hangs_keeps_the_router_for_a_moment_and_decode_computes_the_prompt():
    took_s, is_computed = prefilled_s(Prefiller(), store=HungLookUps())
    assert not is_computed and took_s <= UNKNOWN_S + FLOOR_S


class HungStore:
    """A store whose calls never end.  is_alive: its health checks are answered, as of a process whose disk hangs."""

    def __init__(self, *, is_alive):
        self.is_alive, self.num_calls = is_alive, 0

    async def ask(self):
        if not self.is_alive:
            await asyncio.sleep(FOREVER)

    async def call(self, breaker, nbytes):
        with breaker.asked(nbytes):
            self.num_calls += 1
            try:
                async with asyncio.timeout(breaker.limit_s(nbytes, 60.0)):
                    await asyncio.sleep(FOREVER)
            except TimeoutError as err:
                raise DeadlineExceeded("over its time") from err


@pytest.mark.parametrize(("is_alive", "most_s"), [(False, COST_S), (True, 2 * SLACK_S + 0.1)])
def test_a_store_that_hangs_costs_what_noticing_it_takes(is_alive, most_s):
    """A prompt's look-up, reads and puts together, which then is computed. The next prompts wait for nothing."""

    async def prompts():
        clock = asyncio.get_running_loop().time
        store, breaker, took_s = HungStore(is_alive=is_alive), Breaker(clock=clock), []
        breaker.pulse = Pulse("the store", store.ask, clock=clock)
        breaker.pulse.start()
        for _ in range(4):
            begun = clock()
            for nbytes in (0, 0, 1 << 20, 1 << 20, 0):
                with pytest.raises((Unavailable, DeadlineExceeded)):
                    await store.call(breaker, nbytes)
            took_s.append(clock() - begun)
        await breaker.close()
        return took_s, store.num_calls

    took_s, num_calls = simulate(prompts)
    assert took_s[0] <= most_s + 0.2 and took_s[1:] == [0.0] * 3
    assert num_calls <= 2
