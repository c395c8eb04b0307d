"""Payload streams take turns on the event loop, and let look-ups go first."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from antefix_kvstore import turns as turns_module
from antefix_kvstore.turns import Turns
from tests.waiting import AT_MOST_S


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough slots for all streams, and no time limit; tests of slots set their own."""
    monkeypatch.setattr(turns_module, "NUM_SLOTS", 64)
    monkeypatch.setattr(turns_module, "PATIENCE_S", 3600.0)


class Passes:
    """Counts passes of the event loop, and notes the passes in which turns were taken."""

    def __init__(self) -> None:
        self.number = 0
        self.taken: list[tuple[int, str]] = []
        self._task = asyncio.create_task(self._count())

    async def _count(self) -> None:
        while True:
            self.number += 1
            await asyncio.sleep(0)

    async def stream(self, turns: Turns, name: str, num_messages: int) -> None:
        for _ in range(num_messages):
            await turns.take(name)
            self.taken.append((self.number, name))
        turns.leave(name)

    def stop(self) -> list[int]:
        """Passes from each turn to the next one."""
        self._task.cancel()
        numbers = [number for number, _ in self.taken]
        return [later - earlier for earlier, later in pairwise(numbers)]


async def test_one_turn_per_pass_and_the_longest_waiting_first() -> None:
    turns, passes = Turns(), Passes()
    await asyncio.gather(*(passes.stream(turns, name, 5) for name in "abcd"))
    gaps = passes.stop()
    assert min(gaps) >= 1
    # The first stream asks again before the others ask at all, so it ends first.
    assert "".join(name for _, name in passes.taken) == "a" + "abcd" * 4 + "bcd"


async def test_a_stream_alone_never_waits_for_its_first_turn() -> None:
    turns = Turns()
    take = turns.take("a")
    with pytest.raises(StopIteration):
        take.send(None)


async def test_the_loop_sleeps_between_messages_while_a_look_up_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "GIVE_WAY_S", 3600.0)
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.01)
    turns, passes = Turns(), Passes()
    turns.give_way()
    begun = time.monotonic()
    await asyncio.gather(*(passes.stream(turns, name, 3) for name in "ab"))
    passes.stop()
    assert time.monotonic() - begun > 5 * 0.009


async def test_streams_go_on_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "GIVE_WAY_S", -1.0)
    monkeypatch.setattr(turns_module, "PAUSE_S", 3600.0)
    turns, passes = Turns(), Passes()
    turns.give_way()
    async with asyncio.timeout(AT_MOST_S):
        await asyncio.gather(*(passes.stream(turns, name, 3) for name in "ab"))
    passes.stop()
    assert len(passes.taken) == 6


@pytest.mark.parametrize("num_passes", range(4))
async def test_streams_that_end_while_they_wait_hold_up_nobody(num_passes: int) -> None:
    """Others continue, whether or not the stream had already been given its turn."""
    turns = Turns()
    await turns.take(0)
    waiting = [asyncio.create_task(turns.take(1 + number)) for number in range(4)]
    for _ in range(num_passes):
        await asyncio.sleep(0)
    for stream in waiting[:3]:
        stream.cancel()
    async with asyncio.timeout(AT_MOST_S):
        await waiting[3]
        await turns.take(0)
    assert all(stream.done() for stream in waiting)


async def test_streams_with_a_slot_send_some_messages_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "NUM_SLOTS", 1)
    monkeypatch.setattr(turns_module, "SLOT_MESSAGES", 3)
    turns, passes = Turns(), Passes()
    await asyncio.gather(*(passes.stream(turns, name, 5) for name in "abc"))
    passes.stop()
    assert "".join(name for _, name in passes.taken) == "aaabbbcccaabbcc"


async def test_two_slots_are_shared_by_two_streams_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "NUM_SLOTS", 2)
    monkeypatch.setattr(turns_module, "SLOT_MESSAGES", 2)
    turns, passes = Turns(), Passes()
    await asyncio.gather(*(passes.stream(turns, name, 2) for name in "abcd"))
    passes.stop()
    order = "".join(name for _, name in passes.taken)
    at_work = [{name for name in order[:end] if order[:end].count(name) < 2} for end in range(len(order))]
    assert max(map(len, at_work)) == 2
    assert sorted(order) == sorted("aabbccdd")


async def test_a_stream_that_does_not_keep_up_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "NUM_SLOTS", 1)
    monkeypatch.setattr(turns_module, "PATIENCE_S", 0.01)
    turns = Turns()
    await turns.take("stalls")
    async with asyncio.timeout(AT_MOST_S):
        await turns.take("b")
    # "b" has the only slot now. The stream that stalled sends without one.
    monkeypatch.setattr(turns_module, "PATIENCE_S", 3600.0)
    async with asyncio.timeout(AT_MOST_S):
        await turns.take("b")
        for _ in range(3):
            await turns.take("stalls")


@pytest.mark.parametrize("num_passes", range(4))
async def test_a_stream_that_ends_gives_its_slot_to_the_next(num_passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that ends may be the one with the slot, one that waits, or one that was just given a slot."""
    monkeypatch.setattr(turns_module, "NUM_SLOTS", 1)
    turns = Turns()
    await turns.take("a")
    waiting = {name: asyncio.create_task(turns.take(name)) for name in "bcd"}
    await asyncio.sleep(0)
    turns.leave("a")
    for _ in range(num_passes):
        await asyncio.sleep(0)
    for name in "bc":
        waiting[name].cancel()
        turns.leave(name)
    async with asyncio.timeout(AT_MOST_S):
        await waiting["d"]
        turns.leave("d")
        await turns.take("e")
