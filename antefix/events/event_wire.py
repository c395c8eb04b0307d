"""Events on gRPC streams. Every service that tells events has responses with the same fields besides the events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from antefix import rpc
from antefix.events.numbered_log import Batch, Cursor

E = TypeVar("E")
R = TypeVar("R")


async def batches_of(start: Callable[[], Any], event_of: Callable[[Any], E]) -> AsyncGenerator[Batch[E], None]:
    """The batches of a call, which begins with the first one asked for and is cancelled when nobody asks any more.

    Raises:  Unavailable: the source went away; watch again from the last cursor.
    """
    call, in_snapshot = start(), False
    try:
        with rpc.rpc_errors():
            async for response in call:
                begins = response.snapshot and not in_snapshot
                in_snapshot = response.snapshot and not response.snapshot_end
                yield Batch(
                    cursor=Cursor(epoch=response.epoch, number=response.number),
                    events=tuple(map(event_of, response.events)),
                    snapshot=response.snapshot,
                    snapshot_begins=begins,
                    snapshot_ends=response.snapshot_end,
                )
    finally:
        call.cancel()


def response_of(batch: Batch[E], response: Callable[..., R], to_wire: Callable[[E], Any]) -> R:
    """The message that `batches_of` reads."""
    return response(
        epoch=batch.cursor.epoch,
        number=batch.cursor.number,
        snapshot=batch.snapshot,
        snapshot_end=batch.snapshot_ends,
        events=map(to_wire, batch.events),
    )
