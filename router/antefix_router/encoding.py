"""Text to tokens off the event loop: while a long prompt is tokenized, all other streams continue.

A million characters take a Hugging Face tokenizer a quarter of a second, and would hold up everybody's tokens for as
long. Short texts are encoded where they are: handing them to a thread would cost them more than it saves others.

Turns go round by tenant, counted in characters. Of the longest texts, which take most memory, one is done at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from antefix.fair_turns import FairTurns
from antefix.host_limits import usable_cores

T = TypeVar("T")

# 4 ms of a Hugging Face tokenizer at the measured 0.25 us a character; the byte tokenizer takes 0.05 ms for them.
CHARACTERS_MIN: Final = 16_384
# Clients that leave do not stop an encoding that has begun: so many run at once, no matter who comes and goes.
_THREADS_MAX: Final = 4
# A tokenizer holds some 30 bytes per character until it is done.
_LARGE_CHARACTERS: Final = 4 << 20
# Behind those at work. Each waits with its text in memory.
_NUM_WAITING_MAX: Final = 256


class Encoding:
    """Threads of its own, because a ledger's write must not wait behind somebody's prompt."""

    def __init__(self) -> None:
        num_threads = min(_THREADS_MAX, usable_cores())
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="antefix-encode")
        self._turns = FairTurns(num_threads, _NUM_WAITING_MAX)
        self._large_turns = FairTurns(1, _NUM_WAITING_MAX)

    async def run(self, num_characters: int, work: Callable[[], T], *, tenant: str = "") -> T:
        """What `work` returns or raises, which encodes that much text. It must be thread-safe.

        Cancelled before a thread has taken it, it never runs; afterwards its result is dropped.
        Raises:  Overloaded: too many wait.
        """
        if num_characters < CHARACTERS_MIN:
            return work()
        async with contextlib.AsyncExitStack() as turn:
            if num_characters >= _LARGE_CHARACTERS:
                await turn.enter_async_context(self._large_turns.turn(tenant, float(num_characters)))
            await turn.enter_async_context(self._turns.turn(tenant, float(num_characters)))
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
