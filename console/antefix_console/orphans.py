"""As PID 1 of a container, this process becomes the parent of orphaned processes, which stay zombies for ever unless it
waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from typing import Final

_EVERY_S: Final = 1.0


async def reap_orphans(own: Callable[[], Collection[int]]) -> None:
    """Wait for orphaned processes until this task is cancelled. own: processes that other code waits for."""
    while True:
        with contextlib.suppress(ChildProcessError):
            reap(own())
        await asyncio.sleep(_EVERY_S)


def reap(own: Collection[int]) -> int:
    """Wait for child processes that ended and are not this program's own. Returns how many. Raises: ChildProcessError:
    no child is left.

    The id of a child is read before it is waited for: if an own child were waited for here, other code would never
    learn that it ended. As long as an own child that ended has not been waited for, the children behind it stay for the
    next call.
    """
    num = 0
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        if ended.si_pid in own:
            break
        os.waitpid(ended.si_pid, 0)
        num += 1
    return num
