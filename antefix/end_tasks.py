"""Ending tasks that call libraries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_S: Final = 0.2


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], *, again_s: float = AGAIN_S) -> None:
    """Cancel tasks and wait until they have ended.  again_s: longer than what a task needs to put things in order.

    Python 3.11's `wait_for`, which Redis' client uses, forgets that it was cancelled when that comes in the same moment
    as its result. The task would then run for ever, and its caller would wait for ever. So it is cancelled again.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again_s)
