"""Requests that would wait too long are refused at once, by tenant. As many are answered as without overload."""

import asyncio
import contextlib
import dataclasses
import heapq
import itertools

import httpx2
import pytest

from antefix.errors import Overloaded
from antefix_router.load_shedding import (
    BURST_FACTOR,
    BUSY_PER_WORKER,
    FREE_PER_WORKER,
    REFUSALS_PER_S,
    LoadShedding,
    _place,
    note_own_work,
)
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

    per_s_of: returns the first tokens per second while this many requests wait. requests: (time of arrival, time when
    it was served, or None if it was refused).
    """

    def __init__(self, wait_s_max=WAIT_S_MAX, per_s_of=lambda num_waiting: PER_S):
        self.clock = Clock()
        self.per_s_of = per_s_of
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
        self._free_s = max(self._free_s, at_s) + 1 / self.per_s_of(len(self._queue))
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

    def num_refused(self, start_s, stop_s):
        return sum(start_s <= came_s < stop_s and done_s is None for came_s, done_s in self.requests)

    def waits_s(self, start_s, stop_s):
        self._serve_until(stop_s + 1000)
        return [done_s - came_s for came_s, done_s in self.requests if start_s <= came_s < stop_s and done_s]


@pytest.mark.parametrize("factor", [2, 10])
@pytest.mark.parametrize("per_s", [8.5, 20.0, 100.0])
@pytest.mark.parametrize("is_known", [False, True], ids=["first", "again"])
def test_overload_costs_no_goodput_and_is_over_ten_seconds_after_its_end(factor, per_s, is_known, monkeypatch):
    """Also the first overload, and one of the seconds that a benchmark takes; first tokens per second of two cores."""
    monkeypatch.setattr("tests.router.test_load_shedding.PER_S", per_s)
    played, start_s = Played(), 100.0
    if is_known:
        start_s = 10 + played.at_rate(factor * per_s, 20, start_s)
    end_s = played.at_rate(0.6 * per_s, 20, start_s)
    over_s = played.at_rate(factor * 0.6 * per_s, 40, end_s)
    played.at_rate(0.6 * per_s, 20, over_s)
    waits, after = played.waits_s(end_s, over_s), played.waits_s(over_s + 10, over_s + 20)
    # Nobody waits for long, not even in the first seconds, when no queue has been measured.
    assert max(waits) <= 1.3 * BURST_FACTOR * WAIT_S_MAX
    assert max(played.waits_s(over_s - 4, over_s)) <= 1.1 * WAIT_S_MAX + 3 / per_s
    # Answers per second until the last one, as the benchmark counts them.
    last_s = max(done_s for came_s, done_s in played.requests if done_s and came_s < over_s)
    assert len(waits) / (last_s - end_s) >= 0.9 * per_s
    before = played.waits_s(start_s, end_s)
    assert len(before) == round(12 * per_s) and len(after) == round(6 * per_s)
    assert max(after) <= 1.1 * max(before)


def test_a_rate_that_falls_under_load_makes_nobody_wait_much_longer():
    """Under load, clients, router and workers share the cores: then a queue gets less than single requests got."""
    played = Played(per_s_of=lambda num_waiting: PER_S / 4 if num_waiting > 8 else PER_S)
    end_s = played.at_rate(0.5 * PER_S, 30, 100.0)
    over_s = played.at_rate(5 * PER_S, 30, end_s)
    assert max(played.waits_s(end_s + 10, over_s)) <= max(1.1 * WAIT_S_MAX, BUSY_PER_WORKER / (PER_S / 4)) + 0.4


def test_as_many_clients_as_workers_run_requests_are_never_refused_however_slow_the_workers_are(crowd):
    """Each client sends its next request when the last one is answered."""
    clock = Clock()
    shedding = LoadShedding(2.0, lambda: 1, clock=clock)
    for _ in range(200):
        with contextlib.ExitStack() as stack:
            for _ in range(FREE_PER_WORKER):
                stack.enter_context(shedding.waiting("a"))
            clock.now_s += 10.0
    assert shedding.num_refused == 0


def test_after_an_overload_of_slow_workers_as_many_may_wait_again():
    clock = Clock()
    shedding = LoadShedding(2.0, lambda: 1, clock=clock)
    with contextlib.ExitStack() as stack:
        for _ in range(FREE_PER_WORKER):
            stack.enter_context(shedding.waiting("a"))
        clock.now_s += 60.0
        with pytest.raises(Overloaded):
            stack.enter_context(shedding.waiting("a"))
    with contextlib.ExitStack() as stack:
        for _ in range(BUSY_PER_WORKER):
            stack.enter_context(shedding.waiting("a"))
        with pytest.raises(Overloaded):
            stack.enter_context(shedding.waiting("a"))
    clock.now_s += 2 * BURST_FACTOR * 2.0
    with contextlib.ExitStack() as stack:
        for _ in range(FREE_PER_WORKER):
            stack.enter_context(shedding.waiting("a"))


def test_a_load_that_workers_can_serve_is_never_refused():
    for per_s in (2.0, 8.5, 100.0):
        played = Played(per_s_of=lambda num_waiting, per_s=per_s: per_s)
        end_s = played.at_rate(0.95 * per_s, 200, 100.0)
        assert not played.num_refused(100.0, end_s)


def test_after_a_pause_of_the_workers_as_much_is_let_in_as_before():
    played = Played()
    end_s = played.at_rate(2 * PER_S, 30, 100.0)
    played._free_s += 5.0  # all workers stand still
    played.at_rate(2 * PER_S, 30, end_s)
    waits = played.waits_s(end_s + 15, end_s + 30)
    assert len(waits) >= 0.9 * PER_S * 15 and max(waits) <= 1.1 * WAIT_S_MAX + 3 / PER_S


@pytest.fixture
def crowd():
    """Lets requests wait until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda shedding, tenant: stack.enter_context(shedding.waiting(tenant))


def test_few_are_never_refused_however_long_they_wait(crowd):
    clock = Clock()
    shedding = LoadShedding(8.0, lambda: 2, clock=clock)
    for _ in range(2 * BUSY_PER_WORKER - 1):
        crowd(shedding, "a")
        clock.now_s += 60
    assert shedding.wait_s("a") == 0 and shedding.num_refused == 0


def test_a_tenant_that_has_none_waiting_is_let_in_and_the_greedy_one_is_told_when_to_come_back(crowd):
    clock = Clock()
    shedding = LoadShedding(8.0, lambda: 1, clock=clock)
    for _ in range(60):
        crowd(shedding, "greedy")
    clock.now_s += 5
    # A new queue may be a burst. No request of this one was served, so it is not a burst that ends soon.
    with pytest.raises(Overloaded, match="more than 16 s") as told:
        crowd(shedding, "greedy")
    assert 1 <= told.value.retry_after_s <= 60
    crowd(shedding, "modest")
    assert (shedding.num_waiting, shedding.num_refused) == (61, 1)


@pytest.mark.parametrize("per_s", [5.0, 10.0, 20.0])
def test_a_burst_that_is_gone_in_time_is_answered_whole_and_again_after_a_pause(per_s, monkeypatch):
    """Also on slow machines, where even requests that are never refused wait longer than an overload's queue may."""
    monkeypatch.setattr("tests.router.test_load_shedding.PER_S", per_s)
    played, start_s = Played(), 100.0
    for _ in range(3):
        # Of the first burst, no rate is known yet.
        size = (
            FREE_PER_WORKER
            if start_s == 100.0
            else max(FREE_PER_WORKER, round(0.9 * per_s * BURST_FACTOR * WAIT_S_MAX))
        )
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


def test_a_modest_tenants_requests_are_not_refused_for_a_greedy_ones_queue(crowd):
    """The greedy tenant's streams wait for places, and the modest one gets all it asks for."""
    clock = Clock()
    shedding = LoadShedding(2.0, lambda: 1, clock=clock)
    for _ in range(40):
        crowd(shedding, "greedy")
    for _ in range(400):
        with contextlib.ExitStack() as stack:
            places = []
            for _ in range(4):
                stack.enter_context(shedding.waiting("modest"))
                places.append(_place.get())
            clock.now_s += 0.8
            for place in places:
                place.leave(is_served=True)
    with pytest.raises(Overloaded):
        crowd(shedding, "greedy")
    assert shedding.num_refused == 1


def test_prompts_with_much_work_of_their_own_keep_nobody_out_and_are_counted(crowd):
    clock = Clock()
    shedding = LoadShedding(2.0, lambda: 1, clock=clock)
    for number in range(FREE_PER_WORKER - 1):
        for own_s in (0.01, 60.0, 90.0)[: 3 if number else 1]:
            crowd(shedding, "a")
            note_own_work(own_s)
            clock.now_s += 1
    assert (shedding.num_refused, shedding.num_waiting) == (0, 3 * FREE_PER_WORKER - 5)
    crowd(shedding, "a")
    with pytest.raises(Overloaded):
        crowd(shedding, "a")


def test_usual_prompts_count_as_waiting_however_slow_a_busy_worker_is(crowd):
    clock = Clock()
    shedding = LoadShedding(2.0, lambda: 1, clock=clock)
    for number in range(FREE_PER_WORKER):
        crowd(shedding, "a")
        note_own_work(0.5 * 1.07**number)
        clock.now_s += 1
    with pytest.raises(Overloaded):
        crowd(shedding, "a")


def test_clients_that_ask_again_at_once_get_their_refusals_later(crowd):
    clock = Clock()
    shedding = LoadShedding(2.0, lambda: 1, clock=clock)
    for _ in range(FREE_PER_WORKER):
        crowd(shedding, "greedy")
    clock.now_s += 30

    def held_s(num, per_s):
        held = []
        for _ in range(num):
            with pytest.raises(Overloaded) as told, shedding.waiting("greedy"):
                pass
            held.append(told.value.hold_s)
            clock.now_s += 1 / per_s
        return held

    assert not any(held_s(200, 0.9 * REFUSALS_PER_S))
    clock.now_s += 5
    held = held_s(400, 10 * REFUSALS_PER_S)
    assert not any(held[: round(REFUSALS_PER_S)]) and 0.9 <= held[-1] <= 1.0
    clock.now_s += 5
    assert not any(held_s(20, REFUSALS_PER_S))
    assert len(shedding._refused_s) == 1


def test_a_larger_share_waits_less():
    waits = []
    for share in (1, 3):
        clock = Clock()
        shedding = LoadShedding(2.0, lambda: 1, clock=clock)
        shedding.share_of = {"large": share, "small": 1}.__getitem__
        with contextlib.ExitStack() as stack:
            for number in range(80):
                stack.enter_context(shedding.waiting("large" if number % 2 else "small", may_refuse=False))
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
