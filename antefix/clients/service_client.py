"""What all clients share: one channel, opened when first used, closed by `close` or `async with`."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, Self, TypeVar

import grpc

from antefix import rpc

Stub = TypeVar("Stub")


class ServiceClient(Generic[Stub]):
    """A connection to one service at `address`, host:port.

    It connects when first used, finds a restarted service again, and belongs to the event loop that it is used on.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel | None = None
        self._connected: Stub | None = None

    @property
    def _stub(self) -> Stub:
        if self._connected is None:
            self._channel = rpc.channel(self.address)
            self._connected = self._make_stub(self._channel)
        return self._connected

    def _make_stub(self, channel: grpc.aio.Channel) -> Stub:
        raise NotImplementedError

    async def close(self) -> None:
        """End calls that are under way and let go of the connection. The client may be used again: it reconnects."""
        channel, self._channel, self._connected = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"
