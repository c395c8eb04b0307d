"""One connection to a store's service: its gRPC channels, opened when first used, and one breaker for all its calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from antefix import rpc
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.breaker import Breaker
from antefix.store.payload_channel import SERVICE, PayloadChannel
from antefix.store.payload_wire import pack_put_request
from antefix.v1 import kvstore_pb2, kvstore_pb2_grpc


class StoreConnection:
    """A connection that is restored after the service restarts."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        """credentials: sent with each call; None: the credentials of this process."""
        self.address = address
        self.breaker = Breaker()
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._payloads: PayloadChannel | None = None

    @property
    def stub(self) -> Any:
        """The gRPC stub for calls on the event loop."""
        if self._channel is None:
            self._channel = rpc.channel(self.address, of=Role.KVSTORE, credentials=self._credentials)
            stub_type: Callable[[grpc.aio.Channel], Any] = kvstore_pb2_grpc.KvStoreServiceStub
            self._stub = stub_type(self._channel)
            # Put's messages are written by `payload_wire`, which avoids protobuf's copies.
            self._stub.Put = self._channel.stream_unary(
                f"/{SERVICE}/Put",
                request_serializer=pack_put_request,
                response_deserializer=kvstore_pb2.PutResponse.FromString,
            )
        return self._stub

    @property
    def payloads(self) -> PayloadChannel:
        """The channel for payloads, which are received in threads."""
        if self._payloads is None:
            self._payloads = PayloadChannel(self.address, self._credentials)
        return self._payloads

    @contextlib.contextmanager
    def asked(self, nbytes: int = 0) -> Iterator[None]:
        """A context around a call that a request waits for. Raises: the errors of `Breaker.asked`, and the service's
        own errors.
        """
        if self.stub is not None and self._channel is not None:
            self.breaker.follow(self.address, self._channel)
        with self.breaker.asked(nbytes), rpc.rpc_errors():
            yield

    async def close(self) -> None:
        await self.breaker.close()
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        if self._payloads is not None:
            self._payloads.close()
            self._payloads = None
