"""Starts the threads of a pool at once, so that a service has all of its threads when it begins to serve.

A `ThreadPoolExecutor` starts a thread only when jobs overlap. A service that is rarely busy would gain threads, and the
memory that each of them needs, for hours.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from antefix.host_limits import usable_cores

T = TypeVar("T")
# As asyncio's own default: blocking calls mostly wait, so there may be more threads than cores.
_MORE_THAN_CORES: Final = 4
_THREADS_MAX: Final = 32


def start_threads(pool: ThreadPoolExecutor, num_threads: int) -> None:
    """Start `num_threads` threads of an idle pool.

    If the system refuses a thread, the pool starts it later, when a job needs it.
    """
    go = threading.Event()
    try:
        with contextlib.suppress(RuntimeError):  # "can't start new thread"
            for _ in range(num_threads):
                # A job that waits keeps its thread busy, so that the next job needs another thread.
                pool.submit(go.wait)
    finally:
        go.set()


async def with_threads(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in this event loop with a default pool of threads that has started.

    The pool's size follows the cores that this process may use. asyncio's own pool follows the cores of the host.
    """
    num_threads = min(_THREADS_MAX, usable_cores() + _MORE_THAN_CORES)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="asyncio")
    start_threads(pool, num_threads)
    asyncio.get_running_loop().set_default_executor(pool)
    return await work
