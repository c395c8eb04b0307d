"""How tests wait for other tasks, threads and processes. The default run has no other bound.

On a busy machine everything is late: a process that starts, a peer that reconnects, an event that is sent. A test that
passes waits no longer because its bound is high, so all of them have this one. A test of a time limit sets that limit.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

# More than twice what services wait for a peer in tests (patient_services), so a peer's limit always comes first.
AT_MOST_S = 300.0
# At first a look is due soon. Later it takes no time from the processes that are waited for.
_PAUSE_S, _PAUSE_S_MAX, _GROWTH = 0.002, 0.1, 1.2


async def until(
    condition: Callable[[], Any],
    what: str = "",
    *,
    despite: type[Exception] | tuple[type[Exception], ...] = (),
    every_s: float = _PAUSE_S_MAX,
) -> Any:
    """Wait until a condition holds, and return its value.

    Args:
        condition: A function or a coroutine function. It holds if its value is true.
        what: What is waited for. Without it, the error shows the condition's source.
        despite: Errors of the condition that mean "not yet".
        every_s: The longest pause between two looks, for what is only true for a moment.
    """
    last, pause_s = None, _PAUSE_S
    try:
        async with asyncio.timeout(AT_MOST_S) as limit:
            while True:
                try:
                    value = condition()
                    last = await value if isinstance(value, Awaitable) else value
                    if last:
                        return last
                except despite as err:
                    last = err
                await asyncio.sleep(pause_s)
                pause_s = min(_GROWTH * pause_s, every_s)
    except TimeoutError as err:
        if not limit.expired():
            raise
        raise AssertionError(_complaint(condition, what, last)) from err


def wait_until(
    condition: Callable[[], Any], what: str = "", *, despite: type[Exception] | tuple[type[Exception], ...] = ()
) -> Any:
    """As `until`, for a test without an event loop."""
    last, pause_s, ends_s = None, _PAUSE_S, time.monotonic() + AT_MOST_S
    while time.monotonic() < ends_s:
        try:
            if last := condition():
                return last
        except despite as err:
            last = err
        time.sleep(pause_s)
        pause_s = min(_GROWTH * pause_s, _PAUSE_S_MAX)
    raise AssertionError(_complaint(condition, what, last))


def _complaint(condition: Callable[[], Any], what: str, last: object) -> str:
    if not what:
        try:
            what = " ".join(inspect.getsource(condition).split())
        except (OSError, TypeError):
            what = repr(condition)
    return f"waited {AT_MOST_S:.0f} s for: {what}; the last value: {last!r}"
