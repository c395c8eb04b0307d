"""Merges several streams into one, in the order in which their items arrive. Does not examine the items."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End(Generic[Item]):
    """Marks that a stream is over or has failed."""

    def __init__(self, err: Exception | None = None) -> None:
        self.err = err


async def merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Ends when all streams have ended. If one stream fails, or if the merged stream is closed early, the other streams
    are ended.

    A slow reader holds up all streams: none is more than two items ahead.
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
        # After the merge was closed, a failing stream has no reader to tell. The queue is full, so `put` would wait
        # without end.
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
