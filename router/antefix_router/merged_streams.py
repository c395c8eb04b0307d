"""Several streams as one, in the order in which their items come. Knows nothing of what they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End(Generic[Item]):
    """A stream is over, or has failed."""

    def __init__(self, err: Exception | None = None) -> None:
        self.err = err


async def merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Ends when all have ended. The first that fails ends the others, and so does closing this one early.

    A reader that is slow holds all of them up: no stream is further ahead than two items.
    """
    items: asyncio.Queue[Item | _End[Item]] = asyncio.Queue(maxsize=1)

    async def read(stream: AsyncGenerator[Item, None]) -> None:
        end: _End[Item] = _End()
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await items.put(item)
        except Exception as err:  # noqa: BLE001 - raised where the streams are read
            end = _End(err)
        # A stream that fails as it is cut off has nobody left to tell: the queue is full, and this would wait for ever.
        if not is_closing:
            await items.put(end)

    is_closing = False
    tasks = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        num_running = len(tasks)
        while num_running:
            item = await items.get()
            if not isinstance(item, _End):
                yield item
            elif item.err is not None:
                raise item.err
            else:
                num_running -= 1
    finally:
        is_closing = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
