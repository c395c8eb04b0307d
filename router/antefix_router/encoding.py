"""Tokenizes text outside the event loop, so that all streams continue while a long prompt is tokenized.

A Hugging Face tokenizer takes a quarter of a second for a million characters, and would delay every stream for as long.
Short texts are tokenized in the event loop, because passing them to a thread would cost more time than it saves.

Tenants take turns at tokenizing, and the turns are measured in characters. The longest texts need most memory, so only
one of them is tokenized at a time.
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

# These take a Hugging Face tokenizer 4 ms at the measured 0.25 us per character; the byte tokenizer takes 0.05 ms.
CHARACTERS_MIN: Final = 16_384
# A tokenization that has begun is not stopped when its client leaves, so this many run at once at most.
_THREADS_MAX: Final = 4
# A tokenizer holds some 30 bytes per character until it is done.
_LARGE_CHARACTERS: Final = 4 << 20
# How many may wait for those that run. Each holds its text in memory while it waits.
_NUM_WAITING_MAX: Final = 256


class Encoding:
    """Tokenizing has threads of its own, so that the ledger's writes do not wait for prompts."""

    def __init__(self) -> None:
        num_threads = min(_THREADS_MAX, usable_cores())
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="antefix-encode")
        self._turns = FairTurns(num_threads, _NUM_WAITING_MAX)
        self._large_turns = FairTurns(1, _NUM_WAITING_MAX)

    async def run(self, num_characters: int, work: Callable[[], T], *, tenant: str = "") -> T:
        """The result of `work`, which encodes text of this length and must be thread-safe.

        If it is cancelled before a thread has taken it, it never runs. Later, its result is dropped.
        Raises:  Overloaded: too many wait.
        """
        if num_characters < CHARACTERS_MIN:
            return work()
        async with contextlib.AsyncExitStack() as turn:
            if num_characters >= _LARGE_CHARACTERS:
                await turn.enter_async_context(self._large_turns.turn(tenant, float(num_characters)))
            await turn.enter_async_context(self._turns.turn(tenant, float(num_characters)))
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
