"""One thread for the model, and awaits that a cancelled request cannot cut short.

A cancelled request gives its pool rows back. If the thread (or a read) were still writing into them, another
request's KV would be overwritten: so cancellation waits for the work in hand, which takes one chunk at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await `work` to its end even when cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as err:
            cancelled = err
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen here, or asyncio would log it as never retrieved
        raise cancelled
    return task.result()


class ComputeThread:
    """Runs model calls one after another, off the event loop; torch spreads each over the cores by itself."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await uninterrupted(loop.run_in_executor(self._executor, lambda: function(*args, **kwargs)))

    def close(self) -> None:
        self._executor.shutdown(wait=True)
