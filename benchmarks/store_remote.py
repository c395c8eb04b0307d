"""How near is a remote restore to a bare gRPC stream of 1 MiB chunks? Both on loopback, each from its own process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from antefix.block import Chain
from antefix.store.api import Record
from antefix.store.client import RemoteStore

MIB = 1 << 20
Array = Any

# As lean as a Python server gets: one chunk, made once. It reads nothing, checks nothing, and its client keeps nothing.
BARE_SERVER = """
import asyncio, grpc
from antefix.store.allocator import keep_large_buffers
keep_large_buffers()
chunk = bytes(1 << 20)
async def stream(request, context):
    for _ in range(int(request)):
        yield chunk
async def main():
    server = grpc.aio.server()
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


def measure_remote(
    directory: Path, names: Chain, records: Sequence[Record], payloads: Array, rounds: int
) -> dict[str, list[float]]:
    """Bytes a second of "remote_put", and of "bare_stream" and "remote" in turn, one number a round."""
    bare = subprocess.Popen([sys.executable, "-c", BARE_SERVER], stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "antefix", "serve", "kvstore", "--dir", str(directory / "remote")]
    served = subprocess.Popen(
        [*command, "--budget-bytes", "8g"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert bare.stdout is not None
    assert served.stdout is not None
    try:
        port, address = int(bare.stdout.readline()), json.loads(served.stdout.readline())["address"]
        return asyncio.run(_stream_both(port, address, names, records, payloads, rounds))
    finally:
        bare.kill()
        served.terminate()
        bare.wait()
        served.wait()


async def _stream_both(
    port: int, address: str, names: Chain, records: Sequence[Record], payloads: Array, rounds: int
) -> dict[str, list[float]]:
    store = RemoteStore(address)
    start = time.perf_counter()
    await store.put(records)
    found: dict[str, list[float]] = {"remote_put": [payloads.nbytes / (time.perf_counter() - start)]}
    into = np.zeros_like(payloads)
    views = [row.data for row in into]
    fingerprint = records[0].fingerprint
    options = [("grpc.max_receive_message_length", 16 * MIB)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.unary_stream("/Bare/Stream")
        for number in range(rounds + 1):
            start = time.perf_counter()
            received = 0
            async for piece in call(str(payloads.nbytes // MIB).encode()):
                received += len(piece)
            bare = received / (time.perf_counter() - start)
            start = time.perf_counter()
            assert await store.get_blocks(names.hashes, views, fingerprint=fingerprint) == len(payloads)
            remote = payloads.nbytes / (time.perf_counter() - start)
            # The first round fills buffers.
            if number:
                found.setdefault("bare_stream", []).append(bare)
                found.setdefault("remote", []).append(remote)
    assert np.array_equal(into, payloads)
    await store.close()
    return found
