"""As PID 1 of a container, we become the parent of orphaned processes, which stay zombies for ever unless we wait for
them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from typing import Final

_EVERY_S: Final = 1.0


async def reap_orphans(own: Callable[[], Collection[int]]) -> None:
    """Wait for orphans until cancelled. own: processes that other code waits for."""
    while True:
        with contextlib.suppress(ChildProcessError):
            reap(own())
        await asyncio.sleep(_EVERY_S)


def reap(own: Collection[int]) -> int:
    """Wait for children that ended and are not our own. Returns how many.  Raises:  ChildProcessError: no child is
    left.

    A child's id is read before waiting for it: if one of our own were waited for here, other code would never learn
    that it ended. While an own child that ended has not been waited for, the children behind it stay for the next call.
    """
    num = 0
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        if ended.si_pid in own:
            break
        os.waitpid(ended.si_pid, 0)
        num += 1
    return num
