"""A peer that hangs is noticed and not waited for. A slow, dead or restarted peer does not count as hanging."""

import asyncio

import pytest

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.pulse import Pulse
from antefix.store.breaker import OPEN_S, Breaker
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.impatient
# At least ten times shorter than the real settings, with the same ratios.
FAST = {"every_s": 0.01, "silent_s": 0.03}


class Peer:
    def __init__(self):
        self.answers = asyncio.Event()
        self.answers.set()
        self.is_dead = False

    async def ask(self):
        if self.is_dead:
            raise Unavailable("connection refused")
        await self.answers.wait()


@pytest.fixture
async def peer():
    return Peer()


@pytest.fixture
async def pulse(peer):
    pulse = Pulse("peer", peer.ask, **FAST)
    pulse.start()
    yield pulse
    await pulse.close()


async def waiting(pulse, patience_s=0.0):
    with pulse.guard(patience_s):
        await asyncio.sleep(2 * AT_MOST_S)


async def test_who_waits_for_a_peer_that_falls_silent_is_told(peer, pulse):
    await until(lambda: pulse.answers)
    task = asyncio.create_task(waiting(pulse))
    peer.answers.clear()
    with pytest.raises(Unavailable, match="peer does not answer"):
        async with asyncio.timeout(AT_MOST_S):
            await task
    assert pulse.is_silent and pulse.num_silences == 1 and task.cancelling() == 0
    with pytest.raises(Unavailable):
        await waiting(pulse)


async def test_a_peer_that_comes_back_is_waited_for_again(peer, pulse):
    peer.answers.clear()
    await until(lambda: pulse.is_silent)
    peer.answers.set()
    await until(lambda: not pulse.is_silent)
    with pulse.guard():
        await asyncio.sleep(0)
    assert pulse.answers


async def test_who_has_patience_is_told_later(peer, pulse):
    # A late loop notices a silence up to 0.33 s after it began.
    tasks = [asyncio.create_task(waiting(pulse, patience_s)) for patience_s in (0.0, 1.0)]
    peer.answers.clear()
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert done == {tasks[0]}
    with pytest.raises(Unavailable):
        await tasks[1]
    assert pulse._silence_s() > 1.0
    assert isinstance(tasks[0].exception(), Unavailable)


async def test_a_dead_peer_is_not_silent_since_its_calls_fail_by_themselves(peer, pulse):
    peer.is_dead = True
    await until(lambda: pulse.answers is False)
    assert not pulse.is_silent


async def test_a_cancellation_from_outside_stays_one(peer, pulse):
    task = asyncio.create_task(waiting(pulse))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_pulse_that_ends_in_silence_leaves_nobody_waiting(peer, pulse):
    peer.answers.clear()
    await until(lambda: pulse.is_silent)
    task = asyncio.create_task(waiting(pulse, 100.0))
    await asyncio.sleep(0)
    await pulse.close()
    with pytest.raises(Unavailable):
        await task


async def test_a_busy_machines_slow_answers_are_not_silence(peer):
    pulse = Pulse("peer", peer.ask, silent_s=1.2)
    pulse.rtt_s = 0.5
    assert pulse.limit_s == 4.0
    pulse.rtt_s = 60.0
    assert pulse.limit_s == 10.0


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def late(breaker, clock):
    with pytest.raises(DeadlineExceeded), breaker.asked():
        clock.now += 0.01
        raise DeadlineExceeded("over its time")


def test_one_late_answer_closes_no_store_and_an_answer_in_time_forgives_it():
    clock = Clock()
    breaker = Breaker(clock=clock)
    for _ in range(5):
        late(breaker, clock)
        with breaker.asked():
            pass
    assert (breaker.num_slow, breaker.num_spared) == (5, 0)


async def test_a_store_that_was_too_slow_is_asked_as_soon_as_it_is_back():
    clock = Clock()
    breaker = Breaker(clock=clock)
    late(breaker, clock)
    late(breaker, clock)
    with pytest.raises(Unavailable, match="too slow"), breaker.asked():
        pass
    breaker.pulse = Pulse("the store", None)
    breaker.pulse.returned_s = clock.now + 0.01
    clock.now += 0.02
    with breaker.asked():
        pass


def test_a_slow_store_is_left_alone_for_a_while_and_each_time_for_longer():
    clock = Clock()
    breaker = Breaker(clock=clock)
    late(breaker, clock)
    for times in (1, 2, 4):
        with pytest.raises(DeadlineExceeded), breaker.asked():
            raise DeadlineExceeded("over its time")
        clock.now += times * OPEN_S - 0.1
        with pytest.raises(Unavailable, match="too slow"), breaker.asked():
            pytest.fail("the store was asked")
        clock.now += 0.2
    with breaker.asked():
        pass
    late(breaker, clock)
    late(breaker, clock)
    clock.now += OPEN_S + 0.1
    with breaker.asked():
        pass
    assert (breaker.num_slow, breaker.num_spared) == (6, 3)


def test_a_calls_time_follows_from_its_bytes_and_what_runs_next_to_it():
    clock = Clock()
    breaker = Breaker(clock=clock)
    alone = breaker.limit_s(16 << 20, 60.0)
    assert breaker.limit_s(0, 60.0) < alone < breaker.limit_s(64 << 20, 60.0) <= 60.0
    with breaker.asked(64 << 20):
        assert breaker.limit_s(16 << 20, 60.0) > alone
        clock.now += 0.1
    assert breaker.limit_s(16 << 20, 60.0) < alone, "a fast store is given less"


def test_a_store_that_is_slow_for_good_is_given_its_time_in_the_end():
    clock = Clock()
    breaker = Breaker(clock=clock)
    for _ in range(12):
        limit_s = breaker.limit_s(16 << 20, 60.0)
        if limit_s >= 50.0:
            return
        with pytest.raises(DeadlineExceeded), breaker.asked(16 << 20):
            clock.now += limit_s
            raise DeadlineExceeded("over its time")
        clock.now += 100.0
    pytest.fail("it is never waited for")


def test_calls_that_ran_side_by_side_count_as_one_failure():
    clock = Clock()
    breaker = Breaker(clock=clock)
    with pytest.raises(DeadlineExceeded), breaker.asked():
        with pytest.raises(DeadlineExceeded), breaker.asked():
            clock.now += 1
            raise DeadlineExceeded("first")
        raise DeadlineExceeded("second")
    with breaker.asked():
        pass
    assert (breaker.num_slow, breaker.num_spared) == (2, 0)


async def test_who_has_patience_waits_a_moment_for_a_peer_that_may_be_back(peer, pulse):
    peer.answers.clear()
    await until(lambda: pulse._silence_s() > 0.1)
    task = asyncio.create_task(waiting(pulse, 10.0))
    await asyncio.sleep(0)
    assert not task.done()
    peer.answers.set()
    await until(lambda: not pulse.is_silent)
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
