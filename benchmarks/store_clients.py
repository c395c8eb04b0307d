"""Does a store's service keep its throughput with more clients, and does each kind of call get its fair share?

Every client is a separate process, so that no client waits for another one's interpreter. The benchmark measures these
in turn, repeatedly:

    get, put, lookup        by 1, 4 and 8 clients at once: total throughput must not fall
    put next to four gets   must get at least a fair share: a fifth of the throughput of a put alone
    lookup next to four gets, and alone: the median time of a call

A get restores one of eight prefixes of 32 blocks of V4-Flash's size. The prefixes are 115 MB in all, which exceeds the
processor's cache, as a worker's pool does. A put writes 16 new blocks durably. A look-up names 128K tokens. Higher is
better for bytes per second and calls per second; lower is better for milliseconds. A ratio is the median of each
round's ratio.

    python -m benchmarks.store_clients --seconds 1 --repeats 5 --json benchmarks/results/store_clients.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from antefix.block import Chain, chain_of
from antefix.errors import AntefixError
from antefix.record import Record, RecordKind
from antefix.store.allocator import keep_large_buffers
from antefix.store.remote_store import RemoteStore
from benchmarks.run_record import write
from benchmarks.spread import with_spread

BLOCK_BYTES, BLOCK_TOKENS = 449_792, 128
GET_BLOCKS, PUT_BLOCKS, LOOKUP_BLOCKS = 32, 16, 1024
FINGERPRINT = b"F" * 32
NUM_CLIENTS = (1, 4, 8)
NUM_READERS = 4
# One client alone must not read from the processor's cache if eight clients read from memory. So every client restores
# all prefixes in turn, into a pool as large as all prefixes together.
NUM_PREFIXES = max(NUM_CLIENTS)
NUM_TRIES, TRY_AGAIN_S = 20, 0.5
KINDS = ("get", "put", "lookup")


def names_of(salt: int, num_blocks: int) -> Chain:
    tokens = np.arange(num_blocks * BLOCK_TOKENS, dtype=np.uint32)
    tokens[0] = salt
    return chain_of(tokens, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS)


class Client:
    """One client process' calls. Each method makes one call and returns the payload bytes that it carried."""

    def __init__(self, address: str, number: int) -> None:
        self.store = RemoteStore(address)
        rng = np.random.default_rng(number)
        self._payloads = rng.integers(0, 256, (GET_BLOCKS, BLOCK_BYTES), np.uint8)
        # The pages are touched now, so that this does not happen while the clock runs.
        self._pool = np.full((NUM_PREFIXES, GET_BLOCKS, BLOCK_BYTES), 1, np.uint8)
        self._prefixes = [names_of(each, GET_BLOCKS) for each in range(NUM_PREFIXES)]
        self._number, self._num_got = number, 0
        self._names, self._long = self._prefixes[number], names_of(number, LOOKUP_BLOCKS)
        # Chains that nobody has put yet.
        self._salt = (number + 1) << 20

    async def prepare(self) -> None:
        """Store the records that this client will read later."""
        for _ in range(NUM_TRIES):
            with contextlib.suppress(AntefixError):
                await self.store.put(self._records(self._names))
                if await self._get(self._number):
                    break
            # On a busy machine the store may miss a time limit. The client then does not ask the store for a while.
            await asyncio.sleep(TRY_AGAIN_S)
        assert np.array_equal(self._pool[self._number], self._payloads)

    def _records(self, names: Chain) -> list[Record]:
        return [
            Record(
                kind=RecordKind.BLOCK,
                hash=block_hash,
                parent=names.parent(number),
                fingerprint=FINGERPRINT,
                position=(number + 1) * BLOCK_TOKENS,
                payload=self._payloads[number].data,
            )
            for number, block_hash in enumerate(names.hashes)
        ]

    async def get(self) -> int:
        self._num_got += 1
        return await self._get((self._number + self._num_got) % NUM_PREFIXES)

    async def _get(self, number: int) -> int:
        into = [row.data for row in self._pool[number]]
        num_blocks = await self.store.get_blocks(self._prefixes[number].hashes, into, fingerprint=FINGERPRINT)
        return num_blocks * BLOCK_BYTES

    async def put(self) -> int:
        self._salt += 1
        found = await self.store.put(self._records(names_of(self._salt, PUT_BLOCKS)))
        return found.num_stored * BLOCK_BYTES

    async def lookup(self) -> int:
        found = await self.store.lookup(self._long.hashes, fingerprint=FINGERPRINT)
        assert found.num_blocks == GET_BLOCKS
        return 0

    async def repeat(self, kind: str, until: float) -> dict[str, float]:
        """Make calls until this wall-clock time, at least one.  failed: calls that were refused or got no answer."""
        call: Callable[[], Awaitable[int]] = getattr(self, kind)
        nbytes, failed, took_s, started = 0, 0, [], time.perf_counter()
        while time.time() < until or not took_s:
            before = time.perf_counter()
            try:
                nbytes += await call()
            except AntefixError:
                failed += 1
            took_s.append(time.perf_counter() - before)
        elapsed_s = time.perf_counter() - started
        found = {"bytes_per_s": nbytes / elapsed_s, "calls_per_s": len(took_s) / elapsed_s}
        return {**found, "p50_s": statistics.median(took_s), "failed": failed}


async def serve_client(address: str, number: int) -> None:
    keep_large_buffers()
    client = Client(address, number)
    await client.prepare()
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        kind, until = line.split()
        print(json.dumps(await client.repeat(kind, float(until))), flush=True)
    await client.store.close()


class Clients:
    """The client processes, which all get their orders at the same time."""

    def __init__(self, address: str, num: int) -> None:
        call = [sys.executable, "-m", "benchmarks.store_clients", "--client", address]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes = [subprocess.Popen([*call, "--number", str(number)], **pipes) for number in range(num)]
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"

    def work(self, kinds: Sequence[str], seconds: float) -> list[dict[str, float]]:
        """The first clients work for this time: client i makes calls of kind `kinds[i]`."""
        working = self._processes[: len(kinds)]
        until = time.time() + seconds
        for process, kind in zip(working, kinds, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{kind} {until}\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in working if process.stdout is not None]

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """The address of a store in a separate process."""
    flags = ["--dir", str(directory), "--address", "127.0.0.1:0", "--budget-bytes", "6G", "--compression", "off"]
    command = [sys.executable, "-m", "antefix_console", "serve", "kvstore", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.terminate()
        process.wait()


def one_round(clients: Clients, seconds: float) -> dict[str, float]:
    """One value of each figure. Each number of clients works twice, 1, 4, 8, 8, 4, 1, so that a machine that becomes
    slower during the round slows all of them alike.
    """
    found: dict[str, float] = {"failed_calls": 0.0}

    def work(kinds: Sequence[str]) -> list[dict[str, float]]:
        answers = clients.work(kinds, seconds / 2)
        found["failed_calls"] += sum(each["failed"] for each in answers)
        return answers

    for kind in KINDS:
        unit = "calls_per_s" if kind == "lookup" else "bytes_per_s"
        for num in (*NUM_CLIENTS, *reversed(NUM_CLIENTS)):
            answers = work([kind] * num)
            name = f"{kind}_{num}_{unit}"
            found[name] = found.get(name, 0.0) + sum(each[unit] for each in answers) / 2
            if num == 1:
                name = f"{kind}_alone_p50_ms"
                found[name] = found.get(name, 0.0) + answers[0]["p50_s"] * 1e3 / 2
    for kind in ("put", "lookup"):
        answers = clients.work([kind] + ["get"] * NUM_READERS, seconds)
        found[f"{kind}_next_to_gets_p50_ms"] = answers[0]["p50_s"] * 1e3
        found[f"{kind}_next_to_gets_bytes_per_s"] = answers[0]["bytes_per_s"]
        found[f"gets_next_to_{kind}_bytes_per_s"] = sum(each["bytes_per_s"] for each in answers[1:])
    return found


def ratios(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The ratios that have a goal, as medians of each round's ratio, with their spread."""

    def of(name: str, ours: str, limit: str, times: float = 1.0) -> dict[str, float]:
        return with_spread(name, [each[ours] / each[limit] * times for each in rounds])

    found: dict[str, float] = {}
    for kind, unit in (("get", "bytes_per_s"), ("put", "bytes_per_s"), ("lookup", "calls_per_s")):
        for num in NUM_CLIENTS[1:]:
            found |= of(f"{kind}_{num}_over_1", f"{kind}_{num}_{unit}", f"{kind}_1_{unit}")
    found |= of("put_over_fair_share", "put_next_to_gets_bytes_per_s", "put_1_bytes_per_s", NUM_READERS + 1)
    return found | of("gets_next_to_put_over_gets", "gets_next_to_put_bytes_per_s", "get_4_bytes_per_s")


def measure(seconds: float, repeats: int, directory: Path | None, tell: Callable[[str], object]) -> dict[str, Any]:
    """Medians of each figure, and `ratios`.  directory: where to write about 6 GB; None: where temporary files go."""
    with tempfile.TemporaryDirectory(prefix="antefix-bench-", dir=directory) as name, served(Path(name)) as address:
        clients = Clients(address, max(NUM_CLIENTS))
        rounds = []
        for number in range(repeats):
            rounds.append(one_round(clients, seconds))
            tell(f"clients: round {number + 1} of {repeats}")
        clients.end()
    medians: dict[str, float] = {}
    for name in rounds[0]:
        medians |= with_spread(name, [each[name] for each in rounds])
    return {"seconds": seconds, "repeats": repeats, **medians, "ratios": ratios(rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="seconds for each of the 11 measurements of a round; most measurements run in two halves",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="directory to write about 6 GB to (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if args.client:
        asyncio.run(serve_client(args.client, args.number))
        return
    report = measure(args.seconds, args.repeats, args.dir, Console(stderr=True).print)
    print(json.dumps(report, indent=2))
    if args.json:
        write(args.json, report, "grpcio")


if __name__ == "__main__":
    main()
