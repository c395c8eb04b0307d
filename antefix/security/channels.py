"""Client channels that authenticate this process, and that switch to changed certificates without dropping a call.

A gRPC channel keeps the certificate that it was made with. So when the files change, the next call uses a new channel.
Running calls stay on the old channel, which is closed when none of them can still be running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import grpc

from antefix.security.credentials import Credentials, Options
from antefix.security.identity import Role
from antefix.security.listening import check_calling
from antefix.security.own_credentials import credentials_for

C = TypeVar("C")
# Longer than any call lasts (at most an hour, for requests without a deadline).
_RETIRED_S: Final = 2 * 3600.0
Make = Callable[[str, grpc.ChannelCredentials | None, list[tuple[str, Any]]], C]


class _Current(Generic[C]):
    """The channel for the next call, and older channels.  make: makes a channel, insecure or with credentials."""

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        options: Options,
        to: tuple[Role | None, str],
        make: Make[C],
    ) -> None:
        self._address = address
        self.credentials = credentials
        self._options = options
        self._to = to
        self._make = make
        self._number = 0
        self._retired: list[tuple[float, C]] = []
        self._channel = self._fresh()

    def current(self) -> C:
        if self.credentials is not None and self.credentials.number != self._number:
            self._retired = [(since, old) for since, old in self._retired if time.monotonic() - since < _RETIRED_S]
            self._retired.append((time.monotonic(), self._channel))
            self._channel = self._fresh()
        return self._channel

    def all(self) -> list[C]:
        return [*(channel for _, channel in self._retired), self._channel]

    def shown(self, method: str, metadata: Any) -> tuple[Any, ...]:
        own = self.credentials.metadata(method) if self.credentials is not None else ()
        return (*(metadata or ()), *own)

    def _fresh(self) -> C:
        shown = self.credentials
        if shown is None or shown.files is None:
            return self._make(self._address, None, list(self._options))
        self._number = shown.number
        return self._make(self._address, shown.grpc_credentials(), [*self._options, *shown.target(*self._to)])


class BlockingChannel(_Current[grpc.Channel]):
    """A blocking gRPC channel, for calls in threads."""

    def __init__(
        self, address: str, credentials: Credentials | None, options: Options, *, of: Role | None = None
    ) -> None:
        shown = credentials or credentials_for(address)
        check_calling(address, has_tls=shown is not None and shown.files is not None)
        super().__init__(address, shown, options, (of, ""), _make_blocking)

    def close(self) -> None:
        for channel in self.all():
            channel.close()


class ReloadingChannel(grpc.aio.Channel):
    """An asyncio channel that sends credentials with every call."""

    def __init__(
        self, address: str, credentials: Credentials, options: Options, *, of: Role | None = None, name: str = ""
    ) -> None:
        self._over: _Current[grpc.aio.Channel] = _Current(address, credentials, options, (of, name), _make_aio)

    def current(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        return self._over.current()

    async def __aenter__(self) -> ReloadingChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for channel in self._over.all():
            await channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel_ready()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "unary_unary", method, args, kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "unary_stream", method, args, kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "stream_unary", method, args, kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "stream_stream", method, args, kwargs)

    def shown(self, method: str, metadata: Any) -> tuple[Any, ...]:
        return self._over.shown(method, metadata)


class _Method:
    """The calls of one method. Each call uses the channel that is current when the call starts."""

    def __init__(self, channel: ReloadingChannel, kind: str, method: str, args: Any, kwargs: Any) -> None:
        self._channel = channel
        self._method = method
        self._make: Callable[[grpc.aio.Channel], Any] = lambda over: getattr(over, kind)(method, *args, **kwargs)
        self._made: tuple[grpc.aio.Channel, Any] | None = None

    def __call__(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        current = self._channel.current()
        if self._made is None or self._made[0] is not current:
            self._made = (current, self._make(current))
        return self._made[1](*args, metadata=self._channel.shown(self._method, metadata), **kwargs)


def _make_aio(address: str, credentials: grpc.ChannelCredentials | None, options: Any) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _make_blocking(address: str, credentials: grpc.ChannelCredentials | None, options: Any) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)
