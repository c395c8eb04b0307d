"""How much time does the HTTP gateway add to a request, compared with the router's own gRPC?

    python benchmarks/gateway.py [--seconds S] [--json benchmarks/results/gateway.json]

One router process runs without workers; stand-ins return every answer at once. So the benchmark measures only the
router's own work: reading the request, rendering, tokenizing, the bill (durable, in a ledger) and the answer. Clients
are bare sockets and a bare gRPC stub, so no client library is measured. Prints one JSON object. Latency is the median
latency when there is only one caller.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import numpy as np

from antefix import rpc
from antefix.model_dir import identify
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.secret import Keyring, create_secret_file
from antefix.security.identity import Role
from antefix.security.process_security import OPEN, open_security
from antefix.store.open_store import StoreAddress, open_store
from antefix.tokenizer import load_tokenizer
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix.wire import sampling_to_wire, tokens_to_wire
from antefix_router.assembly import Router
from antefix_router.gateway.app import start_http
from antefix_router.generation import Generation, OutputPiece
from antefix_router.router_config import RouterConfig
from antefix_router.server import RouterServicer
from benchmarks.processor_time import cpu_s
from benchmarks.run_record import write

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 1024, 16
CONCURRENT = 32
Ask = Callable[[], Awaitable[None]]


class InstantWorkers:
    """Stand-ins for workers, which return every prefill and every answer at once."""

    async def run(self, generation: Generation, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        num_tokens, sample = len(generation.tokens), generation.samples[0]
        hit = (num_tokens - 1) // 64 * 64
        generation.restore = RestoreReport(
            plan="checkpoint",
            hit_tokens=hit,
            miss_tokens=num_tokens - hit,
            hit_memory_tokens=hit,
            last_hit_hash=b"\xab" * 32,
        )
        for number in range(NUM_OUTPUT_TOKENS):
            sample.emitted.append(97 + number)
            yield OutputPiece(0, np.array([97 + number], np.uint32))
            await asyncio.sleep(0)  # tokens of a real worker come one message at a time
        sample.finish_reason = "length"


async def serve(model: Path, directory: Path, credentials: str = "") -> None:
    """Run the router under test until stdin closes.  credentials: directory of certificates for TLS; empty: no TLS."""
    config = RouterConfig(
        credentials=credentials,
        model=str(model),
        secret_file=str(create_secret_file(directory / "secret")),
        store_address="127.0.0.1:9",
        decode=("127.0.0.1:9",),
        ledger_dir=str(directory / "ledger"),
        http_address="127.0.0.1:0",
    )
    store = open_store(StoreAddress(address=config.store_address, directory=""))
    router = Router(identify(model), load_tokenizer(model), store, config)
    servicer = RouterServicer(router)
    router.front._run = InstantWorkers().run
    server = await rpc.start_server(
        config.address,
        lambda s: router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, s),
        [router_pb2.DESCRIPTOR],
    )
    keyring = Keyring.from_file(config.secret_file)
    security = open_security(Role.ROUTER, credentials, keyring=keyring) if credentials else OPEN
    http = await start_http(router.front, config, security)
    sys.stdout.write(json.dumps({"grpc": server.address, "http": http.address}) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await http.stop()
    await server.drain(1.0)
    await router.front.accounts.close()


async def measure(ready: dict[str, str], pid: int, seconds: float) -> dict[str, object]:
    """Measured rows for gRPC, for HTTP with whole answers, and for HTTP with streamed answers."""
    text = "x" * (NUM_PROMPT_TOKENS - 4)  # plus the four special tokens of one user turn
    prompt = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    message = {
        "model": "antefix-tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NUM_OUTPUT_TOKENS,
    }
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(rpc.channel(ready["grpc"]))
        stub = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.GenerateRequest(
            tokens=tokens_to_wire(prompt), sampling=sampling_to_wire(Sampling(max_tokens=NUM_OUTPUT_TOKENS))
        )

        async def over_grpc() -> None:
            async for answer in stub.Generate(request, timeout=30):
                last = answer
            assert last.usage.output_tokens == NUM_OUTPUT_TOKENS

        rows: dict[str, object] = {"grpc": await row([over_grpc] * CONCURRENT, pid, seconds)}
        for name, stream in (("http", False), ("http_stream", True)):
            clients = [
                await HttpClient.connect(ready["http"], {**message, "stream": stream}) for _ in range(CONCURRENT)
            ]
            rows[name] = await row([client.ask for client in clients], pid, seconds)
            for client in clients:
                client.writer.close()
    return rows


async def row(asks: list[Ask], pid: int, seconds: float) -> dict[str, float]:
    """Latency of one caller at a time, then throughput of all callers together; CPU time is the server's."""
    times = []
    stop = time.perf_counter() + seconds / 2
    while time.perf_counter() < stop:
        started = time.perf_counter()
        await asks[0]()
        times.append(time.perf_counter() - started)
    num_done = 0
    stop = time.perf_counter() + seconds

    async def caller(ask: Ask) -> None:
        nonlocal num_done
        while time.perf_counter() < stop:
            await ask()
            num_done += 1

    started, cpu = time.perf_counter(), cpu_s(pid)
    await asyncio.gather(*(caller(ask) for ask in asks))
    elapsed, used = time.perf_counter() - started, cpu_s(pid) - cpu
    return {
        "latency_ms": round(1000 * statistics.median(times), 2),
        "requests_per_s": round(num_done / elapsed, 1),
        "server_cpu_ms_per_request": round(1000 * used / num_done, 3),
    }


class HttpClient:
    """One keep-alive connection that sends the same request repeatedly, with a minimal HTTP/1.1 parser."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        self.reader = reader
        self.writer = writer
        self.request = request

    @classmethod
    async def connect(cls, address: str, body: dict[str, object], tls: ssl.SSLContext | None = None) -> HttpClient:
        host, port = address.split(":")
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(data)}\r\n\r\n"
        streams = await asyncio.open_connection(host, int(port), ssl=tls)
        return cls(*streams, head.encode() + data)

    async def close(self) -> None:
        self.writer.close()
        # Closing TLS may find unread bytes of the answer's end.
        with contextlib.suppress(ssl.SSLError):
            await self.writer.wait_closed()

    async def ask(self) -> None:
        self.writer.write(self.request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 200"), head
        if "content-length:" in head:
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            assert b"completion_tokens" in await self.reader.readexactly(length)
            return
        last = b""
        while size := int(await self.reader.readline(), 16):
            last = await self.reader.readexactly(size + 2)
        await self.reader.readline()
        assert b"[DONE]" in last


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models" / "antefix-tiny")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of each measurement")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--credentials", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        await serve(args.model, args.serve, args.credentials)
        return
    with tempfile.TemporaryDirectory() as scratch:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--model", str(args.model), "--serve", scratch),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), *sys.path))},
        )
        assert process.stdin is not None and process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        rows = await measure(ready, process.pid, args.seconds)
        process.stdin.close()
        await process.wait()
    shape = {"prompt_tokens": NUM_PROMPT_TOKENS, "output_tokens": NUM_OUTPUT_TOKENS, "concurrent": CONCURRENT}
    sys.stdout.write(json.dumps({**shape, **rows}, indent=2) + "\n")
    if args.json:
        write(args.json, {**shape, **rows}, "grpcio", "uvicorn")


if __name__ == "__main__":
    asyncio.run(main())
