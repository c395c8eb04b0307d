"""Requests that would wait too long are refused at once, by tenant. As many are answered as without overload."""

import asyncio
import contextlib
import dataclasses
import heapq
import itertools

import httpx2
import pytest

from antefix.errors import Overloaded
from antefix_router.load_shedding import BURST_FACTOR, FREE_PER_WORKER, LoadShedding
from antefix_router.router_config import RouterConfig
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S, until

PER_S = 20.0
WAIT_S_MAX = next(field.default for field in dataclasses.fields(RouterConfig) if field.name == "wait_s_max")


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class Played:
    """A first come, first served deployment that gives PER_S first tokens per second, and its clients, on one clock.

    requests: (time of arrival, time when it was served, or None if it was refused).
    """

    def __init__(self, wait_s_max=WAIT_S_MAX):
        self.clock = Clock()
        self.shedding = LoadShedding(wait_s_max, lambda: 1, clock=self.clock)
        self.requests = []
        self._queue, self._places = [], []
        self._free_s = 0.0
        self._numbers = itertools.count()

    def ask(self, at_s, tenant="a"):
        self._serve_until(at_s)
        self.clock.now_s = at_s
        place = self.shedding.waiting(tenant)
        try:
            place.__enter__()
        except Overloaded as err:
            assert err.retry_after_s >= 1
            self.requests.append((at_s, None))
            return False
        self._free_s = max(self._free_s, at_s) + 1 / PER_S
        self._places.append(place)
        heapq.heappush(self._queue, (self._free_s, next(self._numbers), at_s, tenant))
        return True

    def at_rate(self, per_s, seconds, start_s):
        for number in range(round(per_s * seconds)):
            self.ask(start_s + number / per_s)
        return start_s + seconds

    def _serve_until(self, now_s):
        while self._queue and self._queue[0][0] <= now_s:
            done_s, _, came_s, tenant = heapq.heappop(self._queue)
            self.clock.now_s = done_s
            self.shedding._leave(tenant, is_served=True)
            self.requests.append((came_s, done_s))

    def waits_s(self, start_s, stop_s):
        self._serve_until(stop_s + 1000)
        return [done_s - came_s for came_s, done_s in self.requests if start_s <= came_s < stop_s and done_s]


@pytest.mark.parametrize("factor", [2, 10])
def test_overload_costs_no_goodput_and_is_over_ten_seconds_after_its_end(factor):
    played = Played()
    end_s = played.at_rate(0.7 * PER_S, 30, 100.0)
    over_s = played.at_rate(factor * PER_S, 60, end_s)
    played.at_rate(0.7 * PER_S, 60, over_s)
    num_served = len(played.waits_s(end_s, over_s))
    # The requests of that time that were served, some of them slightly later, within the bound.
    assert num_served >= 0.9 * PER_S * 60
    # In the first seconds the speed of the queue is being measured.
    assert max(played.waits_s(end_s + 20, over_s)) <= 1.1 * WAIT_S_MAX + 1 / PER_S
    before, after = played.waits_s(100.0, end_s), played.waits_s(over_s + 10, over_s + 60)
    assert len(after) == round(0.7 * PER_S * 50)
    assert max(after) <= 1.1 * max(before)


@pytest.fixture
def crowd():
    """Lets requests wait until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda shedding, tenant: stack.enter_context(shedding.waiting(tenant))


def test_fewer_than_a_worker_takes_at_once_are_never_refused(crowd):
    clock = Clock()
    shedding = LoadShedding(8.0, lambda: 2, clock=clock)
    for _ in range(2 * FREE_PER_WORKER - 1):
        crowd(shedding, "a")
        clock.now_s += 60
    assert shedding.wait_s("a") == 0 and shedding.num_refused == 0


def test_a_tenant_that_has_none_waiting_is_let_in_and_the_greedy_one_is_told_when_to_come_back(crowd):
    clock = Clock()
    shedding = LoadShedding(8.0, lambda: 1, clock=clock)
    for _ in range(100):
        crowd(shedding, "greedy")
    clock.now_s += 5
    # A new queue may be a burst. No request of this one was served, so it is not a burst that ends soon.
    with pytest.raises(Overloaded, match="more than 40 s") as told:
        crowd(shedding, "greedy")
    assert 1 <= told.value.retry_after_s <= 60
    crowd(shedding, "modest")
    assert (shedding.num_waiting, shedding.num_refused) == (101, 1)


@pytest.mark.parametrize("per_s", [5.0, 10.0, 20.0])
def test_a_burst_that_is_gone_in_time_is_answered_whole_and_again_after_a_pause(per_s, monkeypatch):
    """Also on slow machines, where even requests that are never refused wait longer than an overload's queue may."""
    monkeypatch.setattr("tests.router.test_load_shedding.PER_S", per_s)
    played, start_s = Played(), 100.0
    for _ in range(3):
        size = max(FREE_PER_WORKER + 8, round(0.9 * per_s * BURST_FACTOR * WAIT_S_MAX))
        answers = [played.ask(start_s + number / 1000) for number in range(size)]
        assert all(answers) and max(played.waits_s(start_s, start_s + 1)) <= size / per_s + 0.1
        start_s += 60.0


def test_a_queue_that_stays_is_no_burst_and_one_burst_is_no_licence_for_the_next():
    played = Played()
    end_s = played.at_rate(3 * PER_S, 60, 100.0)
    waits = played.waits_s(100.0 + 3 * BURST_FACTOR * WAIT_S_MAX, end_s)
    assert waits and max(waits) <= 1.1 * WAIT_S_MAX + 1 / PER_S
    # Some seconds after the overload's end its queue is not forgotten.
    played = Played()
    end_s = played.at_rate(3 * PER_S, 60, 100.0)
    again_s = played.at_rate(3 * PER_S, 10, end_s + 3.0)
    assert max(played.waits_s(end_s + 3.0, again_s)) <= 2 * WAIT_S_MAX


def test_a_larger_share_waits_less():
    waits = []
    for share in (1, 3):
        clock = Clock()
        shedding = LoadShedding(2.0, lambda: 1, clock=clock)
        shedding.share_of = {"large": share, "small": 1}.__getitem__
        with contextlib.ExitStack() as stack:
            for number in range(80):
                stack.enter_context(shedding.waiting("large" if number % 2 else "small"))
            for _ in range(10):
                clock.now_s += 1.0
                shedding._leave("small", is_served=True)
                stack.enter_context(shedding.waiting("small", may_refuse=False))
            waits.append(shedding.wait_s("large"))
    assert waits[1] == pytest.approx(waits[0] * (4 / 3) / 2)


def test_without_a_bound_nobody_is_refused(crowd):
    clock = Clock()
    shedding = LoadShedding(0.0, lambda: 1, clock=clock)
    for _ in range(500):
        crowd(shedding, "a")
        clock.now_s += 1
    assert shedding.num_refused == 0


async def test_the_door_refuses_before_it_reads_a_body_and_says_when_to_come_again():
    clock, hold = Clock(), asyncio.Event()
    front = make_front(Script(hold=hold), ledger=None)
    front.shedding = LoadShedding(8.0, lambda: 1, clock=clock)
    body = {"model": "antefix-tiny", "prompt": "hello", "max_tokens": 2}
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(FREE_PER_WORKER)]
        await until(lambda: front.shedding.num_waiting >= FREE_PER_WORKER)
        clock.now_s += 5
        refused = await client.post("/v1/completions", content=b"not even JSON")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "server_overloaded"
        hold.set()
        assert {(await each).status_code for each in asking} == {200}
        # No request waits any more, however each one ended.
        assert front.shedding.num_waiting == 0
        assert (await client.post("/v1/completions", json=body)).status_code == 200
