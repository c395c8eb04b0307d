"""Tenants get places in turn, counted by work, whatever a single tenant asks for."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import Overloaded
from antefix.fair_turns import FairTurns


async def serve(turns, asked):
    """The order in which requests (tenant, cost) get their turns.

    They arrive in this order while the place is taken.
    """
    order, let_go = [], asyncio.Event()

    async def hold():
        async with turns.turn("first", 0.0):
            await let_go.wait()

    async def ask(tenant, cost):
        async with turns.turn(tenant, cost):
            order.append((tenant, cost))

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    tasks = [asyncio.create_task(ask(*each)) for each in asked]
    await asyncio.sleep(0)
    let_go.set()
    await asyncio.gather(holder, *tasks)
    assert (turns.num_running, turns.num_waiting) == (0, 0)
    return order


async def settled():
    """Wait until every task has continued as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_modest_tenant_is_next_whatever_a_greedy_one_has_queued():
    order = await serve(FairTurns(1), [("greedy", 1.0)] * 50 + [("modest", 1.0)])
    assert order.index(("modest", 1.0)) <= 1


async def test_work_counts_not_requests():
    order = await serve(FairTurns(1), [("long", 100.0)] * 5 + [("short", 1.0)] * 100)
    # The first long request counts as 100, so the other tenant's hundred short ones come before the second.
    assert order[:2].count(("long", 100.0)) == 1
    assert order.index(("long", 100.0), order.index(("long", 100.0)) + 1) >= 99


async def test_a_share_of_three_has_three_turns_for_one():
    turns, order, let_go = FairTurns(1), [], asyncio.Event()

    async def ask(tenant, share):
        async with turns.turn(tenant, 1.0, share=share):
            order.append(tenant)
            await let_go.wait()

    tasks = [asyncio.create_task(ask("first", 1))]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(ask(*each)) for _ in range(12) for each in (("large", 3), ("small", 1))]
    await asyncio.sleep(0)
    let_go.set()
    await asyncio.gather(*tasks)
    assert order[1:13].count("large") == 9


async def test_one_tenants_requests_keep_their_order():
    asked = [("a", float(cost)) for cost in (5, 1, 3, 2)]
    assert await serve(FairTurns(1), asked) == asked


async def test_a_pause_is_not_saved_up():
    turns = FairTurns(1)
    for _ in range(100):
        async with turns.turn("busy", 10.0):
            pass
    order = await serve(turns, [("busy", 10.0), ("idle", 10.0)] * 10)
    # A tenant that paused gets no credit for the time of its pause.
    assert order[:4].count(("idle", 10.0)) <= 3


async def test_who_is_refused_is_told_to_come_when_half_of_the_queue_is_gone(monkeypatch):
    now = 0.0
    monkeypatch.setattr("antefix.fair_turns.time.monotonic", lambda: now)
    turns, let_go = FairTurns(2, 8), asyncio.Event()
    for _ in range(50):
        async with turns.turn("a", 1.0):
            now += 6.0

    async def hold():
        async with turns.turn("a", 1.0):
            await let_go.wait()

    tasks = [asyncio.create_task(hold()) for _ in range(10)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        async with turns.turn("a", 1.0):
            pass
    # Two places are held for 6 s each, so four of the eight waiting requests have their turn within this time.
    assert refused.value.retry_after_s == pytest.approx(12.0)
    with pytest.raises(Overloaded) as told:
        async with turns.turn("a", 1.0, retry_after_s=3.0):
            pass
    assert told.value.retry_after_s == 3.0
    let_go.set()
    await asyncio.gather(*tasks)


async def test_where_the_queue_is_full_the_greediest_gives_way():
    turns, let_go = FairTurns(1, 4), asyncio.Event()

    async def ask(tenant):
        async with turns.turn(tenant, 1.0):
            await let_go.wait()

    greedy = [asyncio.create_task(ask("greedy")) for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await ask("greedy")
    modest = [asyncio.create_task(ask("modest")) for _ in range(2)]
    await settled()
    refused = [task for task in greedy if task.done()]
    assert len(refused) == 2 and all(isinstance(task.exception(), Overloaded) for task in refused)
    assert greedy[0] not in refused and greedy[1] not in refused, "the last ones give way"
    with pytest.raises(Overloaded):
        await ask("modest")
    let_go.set()
    await asyncio.gather(*modest, *(task for task in greedy if task not in refused))
    assert (turns.num_running, turns.num_waiting) == (0, 0)


async def test_who_leaves_takes_no_turn_and_is_not_charged():
    turns, let_go = FairTurns(1), asyncio.Event()

    async def hold():
        async with turns.turn("first", 0.0):
            await let_go.wait()

    async def ask():
        async with turns.turn("t", 1000.0):
            pass

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    tasks = [asyncio.create_task(ask()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns.num_waiting == 0 and turns._clocks["t"] == 0.0
    let_go.set()
    await holder
    assert turns.num_running == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.sampled_from(["stay", "cancel", "fail"])), max_size=40
    ),
    st.integers(1, 3),
    st.integers(0, 6),
    st.integers(0, 2),
)
def test_places_come_back_whatever_happens(asked, num_places, num_waiting_max, num_extra):
    async def run():
        turns = FairTurns(num_places, num_waiting_max, num_extra)
        most = 0

        async def ask(tenant, cost, what):
            nonlocal most
            async with turns.turn(tenant, cost):
                most = max(most, turns.num_running)
                await asyncio.sleep(0)
                if what == "fail":
                    raise ValueError

        tasks = [(asyncio.create_task(ask(*each)), each[2]) for each in asked]
        await asyncio.sleep(0)
        for task, what in tasks:
            if what == "cancel":
                task.cancel()
        for task, _ in tasks:
            with contextlib.suppress(Overloaded, ValueError, asyncio.CancelledError):
                await task
        assert (turns.num_running, turns.num_waiting, turns._queue) == (0, 0, [])
        assert most <= num_places + num_extra

    asyncio.run(run())


async def test_tenants_that_are_gone_are_forgotten():
    turns = FairTurns(2)
    async with turns.turn("stays", 1.0):
        for number in range(3000):
            async with turns.turn(f"tenant {number}", 0.0):
                pass
        assert len(turns._clocks) <= 1026
    assert not turns._clocks


async def test_who_has_nothing_at_work_gets_an_extra_place_whatever_lasts():
    turns, let_go = FairTurns(2, 8, num_extra=1), asyncio.Event()
    order = []

    async def ask(tenant):
        async with turns.turn(tenant, 1.0):
            order.append(tenant)
            await let_go.wait()

    tasks = [asyncio.create_task(ask(tenant)) for tenant in (*["greedy"] * 5, "modest", "modest", "third")]
    await settled()
    assert order == ["greedy", "greedy", "modest"] and turns.num_running == 3, "one more each, as long as there is one"
    let_go.set()
    await asyncio.gather(*tasks)
    assert (turns.num_running, turns.num_waiting) == (0, 0)


async def test_an_extra_place_that_is_free_again_goes_to_who_has_none():
    turns, gates = FairTurns(1, 8, num_extra=1), {name: asyncio.Event() for name in ("greedy", "modest", "third")}
    order = []

    async def ask(tenant):
        async with turns.turn(tenant, 1.0):
            order.append(tenant)
            await gates[tenant].wait()

    tasks = [asyncio.create_task(ask(tenant)) for tenant in ("greedy", "greedy", "modest", "third")]
    await settled()
    assert order == ["greedy", "modest"]
    gates["modest"].set()
    await settled()
    assert order == ["greedy", "modest", "third"]
    for gate in gates.values():
        gate.set()
    await asyncio.gather(*tasks)
    assert (turns.num_running, turns.num_waiting, turns._running.total()) == (0, 0, 0)
