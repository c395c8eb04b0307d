"""How near is a remote restore to a bare gRPC stream of 1 MiB chunks? The restore and the bare stream run on loopback,
each from its own process.

Between the two the benchmark measures a ladder of streams. Each rung adds one thing that a restore must do: read each
chunk from the page cache, checksum it, copy it into the caller's buffer. No restore can be faster than the last rung.
The bare stream is measured with both of gRPC's clients: the one for event loops, and the blocking one, which the
store's client and the rungs use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import xxhash
from grpc.experimental import ChannelOptions

from antefix.block import Chain
from antefix.record import Record
from antefix.store.remote_store import RemoteStore

MIB = 1 << 20
Array = Any

# A server that does as little as a Python server can. Stream sends one chunk repeatedly: the server reads and checks
# nothing, and the client keeps nothing. Read sends the requested file, chunk by chunk.
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


@dataclass
class RemoteFound:
    """Figures per round, by name: bytes per second, and CPU microseconds of both processes together per MiB."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu_us: dict[str, list[float]] = field(default_factory=dict)


def measure_remote(
    directory: Path, names: Chain, records: Sequence[Record], payloads: Array, rounds: int
) -> RemoteFound:
    """Rates of "remote_put", and of the bare streams, the ladder's rungs and "remote" in turn."""
    plain = directory / "plain"
    plain.write_bytes(payloads.data)
    bare = subprocess.Popen([sys.executable, "-c", BARE_SERVER], stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "antefix_console", "serve", "kvstore", "--dir", str(directory / "remote")]
    served = subprocess.Popen(
        [*command, "--budget-bytes", "8g"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert bare.stdout is not None
    assert served.stdout is not None
    try:
        port, address = int(bare.stdout.readline()), json.loads(served.stdout.readline())["address"]
        ladder = _Ladder(port, bare.pid, plain, np.zeros_like(payloads))
        return asyncio.run(_stream_in_turn(ladder, address, served.pid, names, records, payloads, rounds))
    finally:
        bare.kill()
        served.terminate()
        bare.wait()
        served.wait()


async def _stream_in_turn(
    ladder: _Ladder,
    address: str,
    pid: int,
    names: Chain,
    records: Sequence[Record],
    payloads: Array,
    rounds: int,
) -> RemoteFound:
    store = RemoteStore(address)
    start = time.perf_counter()
    await store.put(records)
    found = RemoteFound({"remote_put": [payloads.nbytes / (time.perf_counter() - start)]})
    into = ladder.into
    views = [row.data for row in into]

    async def restore() -> None:
        assert await store.get_blocks(names.hashes, views, fingerprint=records[0].fingerprint) == len(payloads)

    rungs: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
        **{name: (ladder.pid, rung) for name, rung in ladder.rungs.items()},
        "remote": (pid, restore),
    }
    for number in range(rounds + 1):
        for name, (server, run) in rungs.items():
            into[:] = 0
            before_s, start = _cpu_s(server) + time.process_time(), time.perf_counter()
            await run()
            took_s, cpu_s = time.perf_counter() - start, _cpu_s(server) + time.process_time() - before_s
            assert name not in ("lean_stream", "remote") or np.array_equal(into, payloads)
            # The first round fills buffers, so it does not count.
            if number:
                found.rates.setdefault(name, []).append(payloads.nbytes / took_s)
                found.cpu_us.setdefault(name, []).append(cpu_s / (payloads.nbytes / MIB) * 1e6)
    await store.close()
    await ladder.close()
    return found


class _Ladder:
    """Streams from the bare server. The bare streams leave out the last, partial MiB of payloads, which favours the
    streams.
    """

    def __init__(self, port: int, pid: int, plain: Path, into: Array) -> None:
        self.pid = pid
        self.into = into
        self._view = memoryview(into).cast("B")
        self._num_chunks, self._plain = str(into.nbytes // MIB).encode(), str(plain).encode()
        options = [("grpc.max_receive_message_length", 16 * MIB)]
        self._address = f"127.0.0.1:{port}"
        self._channel = grpc.insecure_channel(
            self._address, options=[*options, (ChannelOptions.SingleThreadedUnaryStream, 1)]
        )
        self._aio_options = options
        self._aio: grpc.aio.Channel | None = None

    @property
    def rungs(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """The rungs, in the order in which each adds work to the one before."""
        return {
            "bare_stream": self._drop_aio,
            "bare_blocking_stream": lambda: asyncio.to_thread(self._drop, "Stream", self._num_chunks),
            "read_stream": lambda: asyncio.to_thread(self._drop, "Read", self._plain),
            "checked_stream": lambda: asyncio.to_thread(self._check),
            "lean_stream": lambda: asyncio.to_thread(self._keep),
        }

    async def close(self) -> None:
        self._channel.close()
        if self._aio is not None:
            await self._aio.close()

    async def _drop_aio(self) -> None:
        self._aio = self._aio or grpc.aio.insecure_channel(self._address, options=self._aio_options)
        async for _ in self._aio.unary_stream("/Bare/Stream")(self._num_chunks):
            pass

    def _drop(self, method: str, request: bytes) -> None:
        for _ in self._channel.unary_stream(f"/Bare/{method}")(request):
            pass

    def _check(self) -> None:
        for piece in self._channel.unary_stream("/Bare/Read")(self._plain):
            xxhash.xxh3_128_digest(piece)

    def _keep(self) -> None:
        at = 0
        for piece in self._channel.unary_stream("/Bare/Read")(self._plain):
            xxhash.xxh3_128_digest(piece)
            self._view[at : at + len(piece)] = piece
            at += len(piece)


def _cpu_s(pid: int) -> float:
    """CPU seconds of all threads of another process. The kernel counts these CPU seconds in nanoseconds."""
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9
