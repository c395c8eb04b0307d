"""Answers per second under overload, and when an overload is over."""

import asyncio
import math
import time

import pytest

from benchmarks.load_outcome import Outcome, back
from benchmarks.other_load import OtherLoad
from benchmarks.overload import Door, highest


def outcome_of(waits, seconds=20.0):
    outcome = Outcome(seconds=seconds, waits=waits)
    outcome.statuses.update({200: len(waits)})
    outcome.answered_s = max(sent_s + latency_s for sent_s, latency_s in waits)
    return outcome


def test_answers_after_the_last_request_take_their_time():
    """100 requests within 10 s, of which a server that answers 5 per s answers the last after 20 s."""
    late = outcome_of([(number / 10, (number + 1) / 5 - number / 10) for number in range(100)], seconds=10.0)
    assert (late.figures()["asked_per_s"], late.figures()["goodput_per_s"]) == (10.0, 5.0)


def test_refused_requests_are_asked_and_not_answered():
    outcome = Outcome(seconds=1.0)
    for number in range(10):
        outcome.note(outcome.begun, 200 if number < 4 else 429)
    assert (outcome.figures()["asked_per_s"], outcome.figures()["goodput_per_s"]) == (10.0, 4.0)
    assert [latency_s == math.inf for _, latency_s in outcome.waits] == [False] * 4 + [True] * 6


@pytest.mark.parametrize(("slow_until_s", "found"), [(0.0, 0.0), (4.0, 3.9), (9.9, 9.8), (12.0, None)])
def test_p99_is_back_when_it_is_as_low_as_before_for_all_later_requests(slow_until_s, found):
    waits = [(number / 10, 5.0 if number / 10 < slow_until_s else 0.3) for number in range(200)]
    assert back(outcome_of(waits), 0.33) == found


def test_refused_requests_are_above_any_p99():
    waits = [(number / 10, math.inf if 40 <= number < 60 else 0.3) for number in range(200)]
    assert back(Outcome(seconds=20.0, waits=waits), 0.33) == 5.9


class Held(Door):
    """A server that answers when it may."""

    def __init__(self):
        self.may = asyncio.Event()
        self.other_load = OtherLoad(tuple)

    async def ask(self, outcome, **_):
        sent_at = time.monotonic()
        await self.may.wait()
        outcome.note(sent_at, 200)


async def test_sending_does_not_wait_for_the_answers():
    door = Held()
    outcome, left = await door.send(400, 0.1)
    assert (len(left), outcome.waits) == (40, [])
    door.may.set()
    await asyncio.gather(*left)
    assert len(outcome.latencies_s) == 40
    assert outcome.answered_s >= outcome.seconds


async def test_the_highest_rate_is_looked_for_above_what_clients_in_turn_get():
    door = Held()
    door.may.set()
    rate, outcome = await highest(door, 100.0, 60.0, 0.3)
    assert rate == pytest.approx(135.0)
    assert outcome.statuses == {200: 40}
