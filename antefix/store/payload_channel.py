"""Receives payloads from a store service into the caller's buffers, with one copy and a check of every message.

gRPC's blocking client is used here in a thread: it takes a quarter less processor time per megabyte than the asyncio
client. Checking and copying megabytes would also block the event loop. All other parts of a store's client work without
blocking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast

import grpc
from grpc.experimental import ChannelOptions

from antefix import rpc
from antefix.security.channels import BlockingChannel
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.allocator import keep_large_buffers
from antefix.store.stream_progress import BufferOf, Progress
from antefix.telemetry.context import outgoing
from antefix.v1 import kvstore_pb2

SERVICE: Final = "antefix.v1.KvStoreService"
# How many streams run at once; further streams wait until one ends.
_NUM_THREADS: Final = 8
_GET: Final = f"/{SERVICE}/Get"


class PayloadChannel:
    """A gRPC connection that is used for Get calls only. The memory allocator is told to keep buffers of a message's
    size.
    """

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        """credentials: sent with each call; None: the credentials of this process."""
        keep_large_buffers()
        # The calling thread reads the stream itself, so gRPC starts no further thread.
        options = (*rpc.CHANNEL_OPTIONS, (ChannelOptions.SingleThreadedUnaryStream, 1))
        self._channel = BlockingChannel(address, credentials, options, of=Role.KVSTORE)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-receive")

    def close(self) -> None:
        """Close the connection. Streams that still run end."""
        self._channel.close()
        self._threads.shutdown()

    def _get(self, request: kvstore_pb2.GetRequest, *, timeout: float, metadata: Any) -> Any:
        get: Any = self._channel.current().unary_stream(
            _GET,
            request_serializer=kvstore_pb2.GetRequest.SerializeToString,
            # `receive` unpacks the message, where it can tell a damaged message from a gRPC error.
            response_deserializer=None,
        )
        return get(request, timeout=timeout, metadata=self._channel.shown(_GET, metadata))

    async def receive(
        self, request: kvstore_pb2.GetRequest, done: Progress, buffer: BufferOf, *, deadline_s: float
    ) -> None:
        """Fill the buffers, beginning at the position that `done` has. `done` advances with every message.

        Raises:  BlockCorrupt: a message was damaged.  AntefixError: the error that the service returned.
        """
        call = self._get(request, timeout=deadline_s, metadata=outgoing())
        work = asyncio.get_running_loop().run_in_executor(self._threads, _receive, call, done, buffer)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # Ensures that no thread writes to the caller's buffers after this method returns.
            call.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                # Retrieve the exception, or asyncio logs that it was never retrieved.
                work.exception()
            raise


def _receive(call: Iterator[bytes], done: Progress, buffer: BufferOf) -> None:
    try:
        for message in call:
            done.accept(message, buffer)
    except grpc.RpcError as err:
        # The blocking client's errors are calls, with the same methods as the other client's errors.
        raise rpc.from_rpc_error(cast("grpc.aio.AioRpcError", err)) from None
    finally:
        cast("Any", call).cancel()
