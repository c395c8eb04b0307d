"""How long callers wait for a store, on a simulated clock."""

import asyncio

import pytest

from antefix.errors import Unavailable
from antefix.store.patience import (
    FACTOR,
    FLOOR_S,
    NUM_OBSERVED_MIN,
    UNKNOWN_S,
    USUAL_FACTOR,
    USUAL_S_MAX,
    Patience,
    StoreLate,
    UsualTimes,
    Watch,
)
from tests.router.test_moves import simulate

pytestmark = pytest.mark.impatient


def observed(predicted_s, *times_s):
    times = UsualTimes()
    for took_s in times_s:
        times.observe(predicted_s, took_s)
    return times


def test_the_limit_follows_what_nearly_all_calls_took():
    assert observed(0.005).limit_s(0.0) == UNKNOWN_S
    quick = observed(0.005, *[0.002] * NUM_OBSERVED_MIN)
    assert quick.limit_s(0.0) == FLOOR_S and quick.limit_s(2.0) == FACTOR * 2.0
    busy = observed(0.005, *[0.1] * 100)
    assert busy.limit_s(0.0) == pytest.approx(USUAL_FACTOR * 0.1)
    # Relative to predictions: a read of ten times the bytes may take ten times as long.
    assert busy.limit_s(0.05) == pytest.approx(USUAL_S_MAX)
    # Two slow calls of a hundred change nothing, five do.
    assert observed(0.005, *[0.002] * 100, 9.0, 9.0).limit_s(0.0) == FLOOR_S
    assert observed(0.005, *[0.002] * 100, *[9.0] * 5).limit_s(0.0) == USUAL_S_MAX


def test_a_call_is_late_at_its_limit_and_no_longer_when_it_ends():
    async def calls():
        patience, clock = Patience(), asyncio.get_running_loop().time
        watch, found = Watch(patience), []

        async def call(times, lasts_s):
            with watch.waiting(times):
                await asyncio.sleep(lasts_s)

        for times, lasts_s in ((patience.look_ups, UNKNOWN_S - 0.01), (patience.reads, UNKNOWN_S + 1.0)):
            begun, task = clock(), asyncio.create_task(call(times, lasts_s))
            in_time = await watch.ended_in_time(task)
            found.append((in_time, clock() - begun, patience.num_late))
            await task
        assert patience.num_late == 0 and not watch.late.is_set()
        return found

    (first, _, _), (second, took_s, num_late) = simulate(calls)
    assert (first, second, num_late) == (True, False, 1)
    assert UNKNOWN_S <= took_s < UNKNOWN_S + 0.02


def test_a_watch_is_late_until_all_of_its_late_calls_have_ended():
    async def calls():
        watch = Watch(patience := Patience())

        async def call(lasts_s):
            with watch.waiting(patience.reads):
                await asyncio.sleep(lasts_s)

        first, second = (asyncio.create_task(call(UNKNOWN_S + more_s)) for more_s in (1.0, 2.0))
        await first
        is_late = watch.late.is_set()
        await second
        return is_late, watch.late.is_set(), patience.num_late

    assert simulate(calls) == (True, False, 0)


def test_while_a_call_is_late_others_get_the_shortest_limit():
    async def calls():
        patience, clock = Patience(), asyncio.get_running_loop().time

        async def hangs():
            await asyncio.Event().wait()

        async def keeps_hanging():
            while True:
                try:
                    await hangs()
                except asyncio.CancelledError:
                    if clock() > 50.0:
                        raise

        took_s = []
        for call in (keeps_hanging, hangs, hangs):
            begun = clock()
            with pytest.raises(StoreLate):
                await patience.within(patience.writes, 0.0, call())
            took_s.append(clock() - begun)
        for left in tuple(patience._left):
            left.get_loop().call_later(60.0, left.cancel)
        await asyncio.sleep(100.0)
        assert patience.num_late == 0 and not patience._left
        return took_s

    first, *others = simulate(calls)
    assert first == pytest.approx(1.0, abs=0.02) and others == [pytest.approx(FLOOR_S, abs=0.02)] * 2


def test_calls_that_fail_teach_nothing():
    async def calls():
        patience = Patience()

        async def fails():
            await asyncio.sleep(0.2)
            raise Unavailable("silent")

        for _ in range(2 * NUM_OBSERVED_MIN):
            with pytest.raises(Unavailable):
                await patience.within(patience.look_ups, 0.0, fails())
        assert patience.limit_s(patience.look_ups, 0.0) == UNKNOWN_S

    simulate(calls)


def test_a_process_whose_own_loop_was_delayed_looks_again_before_it_calls_a_store_late():
    async def call():
        patience, loop = Patience(), asyncio.get_running_loop()

        async def answered():
            await asyncio.sleep(UNKNOWN_S + 0.03)

        # The loop does nothing until then, as if another task had kept it.
        loop.call_later(0.01, lambda: setattr(loop, "now_s", loop.now_s + UNKNOWN_S + 0.1))
        await patience.within(patience.look_ups, 0.0, answered())

    simulate(call)
