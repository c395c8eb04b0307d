"""Keeps background work running: an unexpected exception is logged and counted, and the work begins again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Final

log = logging.getLogger("antefix.tasks")

# The pause before work begins again.
AGAIN_S: Final = 1.0
# By kind of work, how often it failed in this process. Shown as `antefix_background_failures_total`.
failures: Final[Counter[str]] = Counter()


def keep_running(
    work: Callable[[], Coroutine[Any, Any, None]],
    what: str,
    *,
    of: str = "",
    failed: Callable[[Exception], object] = lambda err: None,
    context: Context | None = None,
) -> asyncio.Task[None]:
    """Start a task that runs `work` until it returns or the task is cancelled. `end_tasks` ends the task.

    Without this, a loop that meets an exception that nobody expected ends for ever, and nobody is told. The exceptions
    that are part of the work, such as a peer that does not answer, belong into the loop itself.

    what: names the kind of work in the log and in the metric.  of: the peer that it is about, for the log alone.
    failed: called after each unexpected exception, before the work begins again.
    """
    return asyncio.create_task(_keep(work, what, of, failed), context=context)


async def _keep(
    work: Callable[[], Coroutine[Any, Any, None]], what: str, of: str, failed: Callable[[Exception], object]
) -> None:
    # How often this task met each kind of error.
    met: Counter[type[Exception]] = Counter()
    while True:
        try:
            return await work()
        except Exception as err:  # noqa: BLE001 - logged, counted, and the work begins again
            failures[what] += 1
            met[type(err)] += 1
            _tell(err, met[type(err)], f"{what} ({of})" if of else what)
            failed(err)
        await asyncio.sleep(AGAIN_S)


def _tell(err: Exception, count: int, what: str) -> None:
    """Log the first error of a kind with its traceback, and the 2nd, 4th, 8th and so on as one line each."""
    if count == 1:
        log.error("%s met an unexpected error, and begins again in %g s", what, AGAIN_S, exc_info=err)
    elif count.bit_count() == 1:
        log.error("%s met %s %d times, and begins again each time: %s", what, type(err).__name__, count, err)
