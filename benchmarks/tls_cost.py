"""What does TLS cost at the HTTP API, and for a hit's time to first token? The benchmark measures without and with TLS
in turn, in one run.

    door    a router whose stand-in workers answer at once (as in benchmarks/gateway.py): requests per second of 16
            callers that keep their connections, and of 16 that connect for each request; the median time of one
            caller; and processor time
    ttft    all roles as processes, asked over HTTP: the time to the first token of prompts whose prefix is in the
            store but not in the workers' memory, so the workers read the prefix over the network

With TLS every role has its own certificate, and services check each other's. A ratio is the median of each round's
ratio of TLS to plain. Higher is better for requests per second; lower is better for milliseconds.

    python benchmarks/tls_cost.py --repeats 5 --json benchmarks/results/tls_cost.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from antefix.secret import create_secret_file
from benchmarks.gateway import NUM_OUTPUT_TOKENS, NUM_PROMPT_TOKENS, HttpClient, cpu_s
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "antefix-tiny"
SIDES = ("plain", "tls")
ROLES = ("kvstore", "router", "prefill", "decode")
NUM_CALLERS = 16
# The workers' memory cannot hold all prefixes, so a prefix is no longer in memory when its turn comes again.
NUM_PREFIXES, PREFIX_CHARS, POOL_BYTES = 4, 8192, "10M"


class Certificates:
    """A CA, and a certificate per role."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._certs("init", str(directory / "ca"))
        for role in ROLES:
            hosts = ("--host", "localhost", "--host", "127.0.0.1")
            self._certs("issue", role, role, "--ca", str(directory / "ca"), "--out", str(directory / role), *hosts)

    def of(self, role: str) -> str:
        return str(self.directory / role)

    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.directory / "router" / "ca.crt"))
        context.load_cert_chain(f"{self.of('router')}/tls.crt", f"{self.of('router')}/tls.key")
        return context

    def _certs(self, *args: str) -> None:
        call = [sys.executable, "-m", "antefix_console", "certs", *args]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)


@dataclass
class Side:
    """The services with TLS or without it.  address: of the HTTP API.  pids: processes whose processor time counts."""

    address: str
    pids: list[int]
    tls: ssl.SSLContext | None
    found: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, value: float) -> None:
        self.found.setdefault(name, []).append(value)

    def cpu_s(self) -> float:
        return sum(map(cpu_s, self.pids))

    async def client(self, body: dict[str, object]) -> HttpClient:
        return await HttpClient.connect(self.address, body, self.tls)


async def started(stack: contextlib.AsyncExitStack, *command: str) -> tuple[dict[str, str], int]:
    """Start a child process. Returns the line that the child prints when it is ready, and its process id."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
    )
    assert child.stdin is not None and child.stdout is not None

    async def end() -> None:
        child.stdin.close()
        await child.wait()

    stack.push_async_callback(end)
    line = await child.stdout.readline()
    assert line, f"{command} did not start"
    return json.loads(line), child.pid


# --- the door --------------------------------------------------------------------------------------------------------


async def measure_door(side: Side, seconds: float) -> None:
    body: dict[str, object] = {
        "model": "antefix-tiny",
        "messages": [{"role": "user", "content": "x" * (NUM_PROMPT_TOKENS - 4)}],
        "max_tokens": NUM_OUTPUT_TOKENS,
    }
    clients = [await side.client(body) for _ in range(NUM_CALLERS)]
    times: list[float] = []
    stop = time.perf_counter() + seconds / 2
    while time.perf_counter() < stop:
        before = time.perf_counter()
        await clients[0].ask()
        times.append(time.perf_counter() - before)
    side.note("door_latency_ms", 1e3 * statistics.median(times))
    await throughput(side, "kept", seconds, [client.ask for client in clients])
    for client in clients:
        await client.close()

    async def connect_and_ask() -> None:
        client = await side.client(body)
        await client.ask()
        await client.close()

    await throughput(side, "fresh", seconds, [connect_and_ask] * NUM_CALLERS)


async def throughput(side: Side, name: str, seconds: float, asks: list[Callable[[], Awaitable[None]]]) -> None:
    num_done, stop = 0, time.perf_counter() + seconds

    async def caller(ask: Callable[[], Awaitable[None]]) -> None:
        nonlocal num_done
        while time.perf_counter() < stop:
            await ask()
            num_done += 1

    before, used_s = time.perf_counter(), side.cpu_s()
    await asyncio.gather(*map(caller, asks))
    side.note(f"door_{name}_requests_per_s", num_done / (time.perf_counter() - before))
    side.note(f"door_{name}_server_cpu_ms_per_request", 1e3 * (side.cpu_s() - used_s) / num_done)


@contextlib.asynccontextmanager
async def doors(directory: Path, certificates: Certificates) -> AsyncIterator[dict[str, Side]]:
    async with contextlib.AsyncExitStack() as stack:
        sides = {}
        for name in SIDES:
            place = directory / f"door-{name}"
            place.mkdir()
            own = ["--credentials", certificates.of("router")] if name == "tls" else []
            call = (str(ROOT / "benchmarks" / "gateway.py"), "--model", str(MODEL), "--serve", str(place), *own)
            said, pid = await started(stack, *call)
            sides[name] = Side(said["http"], [pid], certificates.trust() if own else None)
        yield sides


# --- time to first token ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def deployments(directory: Path, certificates: Certificates) -> AsyncIterator[dict[str, Side]]:
    async with contextlib.AsyncExitStack() as stack:
        sides = {}
        for name in SIDES:
            place = directory / name
            place.mkdir()
            sides[name] = await deployed(stack, place, certificates if name == "tls" else None)
        yield sides


async def deployed(stack: contextlib.AsyncExitStack, place: Path, certificates: Certificates | None) -> Side:
    """Start one process per role. The workers can reach the store only over the network."""
    pids: list[int] = []
    secret = ("--model", str(MODEL), "--secret-file", str(create_secret_file(place / "secret")))

    async def serve(role: str, *flags: str) -> dict[str, str]:
        own = ("--credentials", certificates.of(role)) if certificates else ()
        call = ("-m", "antefix_console", "serve", role, "--watch-stdin", "--address", "127.0.0.1:0", "--grace-s", "2")
        said, pid = await started(stack, *call, *own, *flags)
        pids.append(pid)
        return said

    guarded = () if certificates else ("--secret-file", secret[3])
    said = await serve("kvstore", "--dir", str(place / "store"), "--budget-bytes", "512M", *guarded)
    store = ("--store-address", said["address"])
    ledger = ("--ledger-dir", str(place / "ledger"), "--leases", "true")
    router = await serve("router", *secret, *store, *ledger, "--http-address", "127.0.0.1:0")
    to = (*secret, *store, "--routers", router["address"], "--pool-bytes", POOL_BYTES)
    await asyncio.gather(serve("prefill", *to), serve("decode", *to))
    side = Side(router["http_address"], pids, certificates.trust() if certificates else None)
    for _ in range(600):
        if await answers(side):
            return side
        await asyncio.sleep(0.2)
    raise SystemExit("the router found no workers")


async def answers(side: Side) -> bool:
    """Whether the router has workers yet."""
    try:
        await first_token(side, "hello")
        return True
    except (AssertionError, OSError):
        return False


def asking(prompt: str, **more: object) -> dict[str, object]:
    return {"model": "antefix-tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2, **more}


async def first_token(side: Side, prompt: str) -> float:
    """Seconds until the first piece of text arrives. The client's connection is opened before the clock starts."""
    client = await side.client(asking(prompt, stream=True))
    before = time.perf_counter()
    client.writer.write(client.request)
    head = (await client.reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert head.startswith("http/1.1 200"), head + (await client.reader.read(2048)).decode()
    ttft_s = 0.0
    while size := int(await client.reader.readline(), 16):
        piece = (await client.reader.readexactly(size + 2)).decode().replace(" ", "")
        if not ttft_s and '"content"' in piece and '"content":""' not in piece:
            ttft_s = time.perf_counter() - before
    await client.close()
    return ttft_s


async def tier_of(side: Side, prompt: str) -> str:
    """The tier that held the prompt's prefix, according to the answer's header."""
    client = await side.client(asking(prompt))
    client.writer.write(client.request)
    head = (await client.reader.readuntil(b"\r\n\r\n")).decode().lower()
    await client.close()
    return head.split("antefix-tier:")[1].split("\r\n")[0].strip()


async def measure_ttft(side: Side, number: int, prefixes: list[str]) -> None:
    """Send each prefix once, followed by a new question."""
    for prefix in prefixes:
        used_s = side.cpu_s()
        side.note("ttft_ms", 1e3 * await first_token(side, f"{prefix} question {number}?"))
        side.note("cpu_ms_per_request", 1e3 * (side.cpu_s() - used_s))


# --- the run ---------------------------------------------------------------------------------------------------------


async def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)
    prefixes = ["".join(map(chr, rng.integers(97, 123, PREFIX_CHARS))) for _ in range(NUM_PREFIXES)]
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as name:
        certificates = Certificates(Path(name))
        report: dict[str, Any] = {}
        async with doors(Path(name), certificates) as sides:
            for number in range(args.repeats):
                for side in in_turn(sides, number):
                    await measure_door(side, args.seconds)
                console.print(f"[dim]door: round {number + 1} of {args.repeats}[/dim]")
            report |= compared(sides)
        async with deployments(Path(name), certificates) as sides:
            for number in range(args.repeats + 1):
                for side in in_turn(sides, number):
                    await measure_ttft(side, number, prefixes)
                if number == 0:
                    # The first round computed the prefixes, so its requests were not hits.
                    for side in sides.values():
                        side.found.clear()
                console.print(f"[dim]first tokens: round {number} of {args.repeats}[/dim]")
            report |= compared(sides)
            report["tiers"] = {name: await tier_of(side, f"{prefixes[0]} where?") for name, side in sides.items()}
    return {"repeats": args.repeats, "seconds": args.seconds, **report}


def in_turn(sides: dict[str, Side], number: int) -> list[Side]:
    order = list(sides.values())
    return order if number % 2 else order[::-1]


def compared(sides: dict[str, Side]) -> dict[str, dict[str, float]]:
    plain, tls = (sides[name].found for name in SIDES)
    return {
        name: {
            "plain": statistics.median(plain[name]),
            "tls": statistics.median(tls[name]),
            "ratio": statistics.median(b / a for a, b in zip(plain[name], tls[name], strict=True)),
        }
        for name in plain
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each measurement at the HTTP API")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    report = asyncio.run(measure(args, Console(stderr=True)))
    print(json.dumps(report, indent=2))
    if args.json:
        write(args.json, report, "grpcio", "uvicorn")


if __name__ == "__main__":
    main()
