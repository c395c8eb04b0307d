"""Receives payloads from a store service into the caller's buffers: one copy, every message checked.

gRPC's blocking client, in a thread: it takes a quarter less of a core for a megabyte than the one for event loops, and
checking and copying megabytes would hold up the loop. Nothing else of a store's client blocks.
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
# Streams at once; more wait for one of these to end.
_NUM_THREADS: Final = 8
_GET: Final = f"/{SERVICE}/Get"


class PayloadChannel:
    """A connection for Get alone. Tells the allocator to keep buffers of a message's size."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        """credentials: what we show; without them what this process shows."""
        keep_large_buffers()
        # The calling thread reads the stream itself, without one more thread in between.
        options = (*rpc.CHANNEL_OPTIONS, (ChannelOptions.SingleThreadedUnaryStream, 1))
        self._channel = BlockingChannel(address, credentials, options, of=Role.KVSTORE)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-receive")

    def close(self) -> None:
        """Ends streams that still run."""
        self._channel.close()
        self._threads.shutdown()

    def _get(self, request: kvstore_pb2.GetRequest, *, timeout: float, metadata: Any) -> Any:
        get: Any = self._channel.current().unary_stream(
            _GET,
            request_serializer=kvstore_pb2.GetRequest.SerializeToString,
            # Unpacked where its errors can be told apart.
            response_deserializer=None,
        )
        return get(request, timeout=timeout, metadata=self._channel.shown(_GET, metadata))

    async def receive(
        self, request: kvstore_pb2.GetRequest, done: Progress, buffer: BufferOf, *, deadline_s: float
    ) -> None:
        """Fill buffers from where `done` stands, which moves along.

        Raises:  BlockCorrupt: a message was damaged.  AntefixError: what the service answered.
        """
        call = self._get(request, timeout=deadline_s, metadata=outgoing())
        work = asyncio.get_running_loop().run_in_executor(self._threads, _receive, call, done, buffer)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # Nobody writes to the caller's buffers after this returns.
            call.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                # Seen, or asyncio would log it as never retrieved.
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
