"""What all clients share: one channel, opened when first used, closed by `close` or `async with`."""

from __future__ import annotations

from types import TracebackType
from typing import ClassVar, Generic, Self, TypeVar
from weakref import WeakSet

import grpc

from antefix import rpc
from antefix.security.credentials import Credentials
from antefix.security.identity import Role

Stub = TypeVar("Stub")
Call = TypeVar("Call", bound=grpc.aio.Call)


class ServiceClient(Generic[Stub]):
    """A connection to one service at `address`, host:port.

    The client connects when first used, reconnects after the service restarts, and may be used on one event loop only.
    """

    # Who must answer; None where several roles serve it.
    _of: ClassVar[Role | None] = None

    def __init__(self, address: str, *, credentials: Credentials | None = None, name: str = "") -> None:
        """credentials: sent with each call; None: those of this process are sent. name: the process name that the
        server's certificate must have, if certificates are used.
        """
        self.address = address
        self._name = name
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._connected: Stub | None = None
        self._streams: WeakSet[grpc.aio.Call] = WeakSet()

    @property
    def _stub(self) -> Stub:
        if self._connected is None:
            self._channel = rpc.channel(self.address, of=self._of, name=self._name, credentials=self._credentials)
            self._connected = self._make_stub(self._channel)
        return self._connected

    def _make_stub(self, channel: grpc.aio.Channel) -> Stub:
        raise NotImplementedError

    def _stream(self, call: Call) -> Call:
        """Record that `close` of the client ends this call.

        A gRPC channel's own `close` misses a stream that nobody reads at that moment: with grpcio 1.78 on Python 3.12,
        the stream's next reader would then wait for ever.
        """
        self._streams.add(call)
        return call

    async def close(self) -> None:
        """End the client's running calls and close its connection. The client may be used again after `close`; it then
        connects again.
        """
        channel, self._channel, self._connected = self._channel, None, None
        for call in list(self._streams):
            call.cancel()
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
