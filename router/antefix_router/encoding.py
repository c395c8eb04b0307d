"""Text to tokens beside the event loop: while a long prompt is tokenized, all other streams go on.

A million characters take a Hugging Face tokenizer a quarter of a second, and would hold up everybody's tokens for as
long. Short texts are encoded where they are: handing them to a thread would cost them more than it saves others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from antefix.host_limits import usable_cores

T = TypeVar("T")

# 4 ms of a Hugging Face tokenizer at the measured 0.25 us a character; the byte tokenizer takes 0.05 ms for them.
CHARACTERS_MIN: Final = 16_384
# Clients that leave do not stop an encoding that has begun: so many run at once, whoever comes and goes.
_THREADS_MAX: Final = 4


class Encoding:
    """Threads of its own, because a ledger's write must not wait behind somebody's prompt."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(_THREADS_MAX, usable_cores()), thread_name_prefix="antefix-encode")

    async def run(self, num_characters: int, work: Callable[[], T]) -> T:
        """What `work` returns or raises, which encodes that much text. It must be thread-safe.

        Cancelled before a thread has taken it, it never runs; afterwards its result is dropped.
        """
        if num_characters < CHARACTERS_MIN:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
