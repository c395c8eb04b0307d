"""How near is a remote restore to a bare gRPC stream of 1 MiB chunks? Both on loopback, each from its own process.

Between the two stands a lean stream, which does the least that a restore must: its server reads each chunk from the
page cache, its client checksums it once and keeps it. What it loses against the bare one, no restore can win back.
"""

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
import xxhash

from antefix.block import Chain
from antefix.store.api import Record
from antefix.store.client import RemoteStore

MIB = 1 << 20
Array = Any

# As little as a Python server can do. Stream: one chunk, made once; it reads nothing, checks nothing, and its client
# keeps nothing. Read: the file that is named, chunk by chunk.
BARE_SERVER = """
import asyncio, grpc, os
from antefix.store.allocator import keep_large_buffers
keep_large_buffers()
chunk = bytes(1 << 20)
async def stream(request, context):
    for _ in range(int(request)):
        yield chunk
async def read(request, context):
    file = os.open(request, os.O_RDONLY)
    for start in range(0, os.fstat(file).st_size, 1 << 20):
        yield os.pread(file, 1 << 20, start)
    os.close(file)
async def main():
    server = grpc.aio.server()
    handlers = {name: grpc.unary_stream_rpc_method_handler(f) for name, f in (("Stream", stream), ("Read", read))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


def measure_remote(
    directory: Path, names: Chain, records: Sequence[Record], payloads: Array, rounds: int
) -> dict[str, list[float]]:
    """Bytes a second of "remote_put", and of "bare_stream", "lean_stream" and "remote" in turn, one number a round."""
    plain = directory / "plain"
    plain.write_bytes(payloads.data)
    bare = subprocess.Popen([sys.executable, "-c", BARE_SERVER], stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "antefix", "serve", "kvstore", "--dir", str(directory / "remote")]
    served = subprocess.Popen(
        [*command, "--budget-bytes", "8g"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert bare.stdout is not None
    assert served.stdout is not None
    try:
        port, address = int(bare.stdout.readline()), json.loads(served.stdout.readline())["address"]
        return asyncio.run(_stream_in_turn(port, address, plain, names, records, payloads, rounds))
    finally:
        bare.kill()
        served.terminate()
        bare.wait()
        served.wait()


async def _stream_in_turn(
    port: int, address: str, plain: Path, names: Chain, records: Sequence[Record], payloads: Array, rounds: int
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
        for number in range(rounds + 1):
            seconds = {
                "bare_stream": await _drop(channel, payloads.nbytes // MIB),
                "lean_stream": await _keep(channel, plain, into),
            }
            assert np.array_equal(into, payloads)
            into[:] = 0
            start = time.perf_counter()
            assert await store.get_blocks(names.hashes, views, fingerprint=fingerprint) == len(payloads)
            seconds["remote"] = time.perf_counter() - start
            # The first round fills buffers.
            if number:
                for name, took in seconds.items():
                    found.setdefault(name, []).append(payloads.nbytes / took)
    assert np.array_equal(into, payloads)
    await store.close()
    return found


async def _drop(channel: grpc.aio.Channel, num_chunks: int) -> float:
    """Seconds of the bare stream; the last, partial MiB is left out, in its favour."""
    start = time.perf_counter()
    async for _ in channel.unary_stream("/Bare/Stream")(str(num_chunks).encode()):
        pass
    return time.perf_counter() - start


async def _keep(channel: grpc.aio.Channel, plain: Path, into: Array) -> float:
    """Seconds of the lean stream."""
    view = memoryview(into).cast("B")
    at = 0
    start = time.perf_counter()
    async for piece in channel.unary_stream("/Bare/Read")(str(plain).encode()):
        xxhash.xxh3_64_digest(piece)
        view[at : at + len(piece)] = piece
        at += len(piece)
    return time.perf_counter() - start
