"""One connection to a store's service: its channels, made when first used, and the breaker that all its calls share."""

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
    """Finds a restarted service again."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        """credentials: what we show; without them what this process shows."""
        self.address = address
        self.breaker = Breaker()
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._payloads: PayloadChannel | None = None

    @property
    def stub(self) -> Any:
        """For calls on the event loop."""
        if self._channel is None:
            self._channel = rpc.channel(self.address, of=Role.KVSTORE, credentials=self._credentials)
            stub_type: Callable[[grpc.aio.Channel], Any] = kvstore_pb2_grpc.KvStoreServiceStub
            self._stub = stub_type(self._channel)
            # Past protobuf's copies.
            self._stub.Put = self._channel.stream_unary(
                f"/{SERVICE}/Put",
                request_serializer=pack_put_request,
                response_deserializer=kvstore_pb2.PutResponse.FromString,
            )
        return self._stub

    @property
    def payloads(self) -> PayloadChannel:
        """For payloads, which are received in threads."""
        if self._payloads is None:
            self._payloads = PayloadChannel(self.address, self._credentials)
        return self._payloads

    @contextlib.contextmanager
    def asked(self, nbytes: int = 0) -> Iterator[None]:
        """Around a call that somebody waits for.  Raises: as `Breaker.asked`, and what the service answered."""
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
