"""Payload streams take turns on the event loop, and let look-ups go first."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from antefix_kvstore import turns as turns_module
from antefix_kvstore.turns import Turns
from tests.waiting import AT_MOST_S


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
            await turns.take()
            self.taken.append((self.number, name))

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
    take = turns.take()
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
    await turns.take()
    waiting = [asyncio.create_task(turns.take()) for _ in range(4)]
    for _ in range(num_passes):
        await asyncio.sleep(0)
    for stream in waiting[:3]:
        stream.cancel()
    async with asyncio.timeout(AT_MOST_S):
        await waiting[3]
        await turns.take()
    assert all(stream.done() for stream in waiting)
