"""Keeps background work running: an unexpected exception is logged, and the work begins again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Final

log = logging.getLogger("antefix.tasks")

# The pause before work begins again. Work that fails each time logs a message and a traceback per pause.
AGAIN_S: Final = 1.0


def keep_running(
    work: Callable[[], Coroutine[Any, Any, None]],
    what: str,
    *,
    failed: Callable[[Exception], object] = lambda err: None,
    context: Context | None = None,
) -> asyncio.Task[None]:
    """Start a task that runs `work` until it returns or the task is cancelled. `end_tasks` ends the task.

    Without this, a loop that meets an exception that nobody expected ends for ever, and nobody is told. The exceptions
    that are part of the work, such as a peer that does not answer, belong into the loop itself.

    what: names the work in the log.  failed: called after each unexpected exception, before the work begins again.
    """
    return asyncio.create_task(_keep(work, what, failed), context=context)


async def _keep(
    work: Callable[[], Coroutine[Any, Any, None]], what: str, failed: Callable[[Exception], object]
) -> None:
    while True:
        try:
            return await work()
        except Exception as err:
            log.exception("%s met an unexpected error, and begins again in %g s", what, AGAIN_S)
            failed(err)
        await asyncio.sleep(AGAIN_S)
