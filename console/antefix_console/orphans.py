"""As PID 1 of a container, whatever lost its parent becomes our child; without us it would stay a zombie for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from typing import Final

_EVERY_S: Final = 1.0


async def reap_orphans(own: Callable[[], Collection[int]]) -> None:
    """Until cancelled. own: the processes that somebody else waits for."""
    while True:
        with contextlib.suppress(ChildProcessError):
            reap(own())
        await asyncio.sleep(_EVERY_S)


def reap(own: Collection[int]) -> int:
    """Take leave of children that ended and are not ours. Returns how many.  Raises:  ChildProcessError: none is left.

    Looked at first: one of ours that is taken away here would never be known to have ended. While one of ours has not
    been waited for, those behind it wait for the next time.
    """
    num = 0
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        if ended.si_pid in own:
            break
        os.waitpid(ended.si_pid, 0)
        num += 1
    return num
