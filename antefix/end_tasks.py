"""Ends tasks, including tasks in libraries that lose a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_S: Final = 0.2


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], *, again_s: float = AGAIN_S) -> None:
    """Cancel tasks and wait until they have ended.

    again_s: seconds until a task that still runs is cancelled again; longer than a task needs to clean up.

    In Python 3.11, `wait_for` loses a cancellation that arrives together with its result, and Redis' client uses it.
    Such a task would run for ever, and its caller would wait for it for ever. So the task is cancelled a second time.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again_s)
