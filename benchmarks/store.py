"""How near is the store to its disk, and how far from its peers, with V4-sized payloads?

    python -m benchmarks.store [--model flash|pro] [--dir DIR] [--repeats N] [--peers PYTHON] [--long] [--json]

One run, everything interleaved: each repeat measures the raw disk, the store and every peer in turn, and ratios are
medians of each repeat's ratio, because a shared machine drifts more than these differ. Cold means that the kernel was
told to forget the files; a virtual disk's host may still have them. --peers names a Python that has rocksdict, lmdb
and diskcache. --long adds a 1M-token prefix and a store of a million small blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from antefix.block import Chain, chain_of
from antefix.store.allocator import keep_large_buffers
from antefix.store.api import Record, RecordKind
from antefix.store.client import RemoteStore
from benchmarks.store_payloads import blocks, layout_of
from benchmarks.store_peers import PEERS, drop_cache
from benchmarks.store_scale import memory_kib, reset_peak_memory, scale_figures
from kvstore.config import KvStoreConfig
from kvstore.engine import Engine

BLOCK_TOKENS = 128
NUM_BLOCKS = 1024
BATCH_BLOCKS = 128
FINGERPRINT = b"F" * 32
MIB = 1 << 20
Array = Any


def chain(num_blocks: int, salt: int = 0) -> Chain:
    tokens = np.arange(num_blocks * BLOCK_TOKENS, dtype=np.uint32) + np.uint32(salt)
    return chain_of(tokens, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS)


def records(names: Chain, payloads: Array) -> list[Record]:
    return [
        Record(
            kind=RecordKind.BLOCK,
            hash=block_hash,
            parent=names.parent(number),
            fingerprint=FINGERPRINT,
            position=(number + 1) * BLOCK_TOKENS,
            payload=payloads[number % len(payloads)].data,
        )
        for number, block_hash in enumerate(names.hashes)
    ]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- the limits ------------------------------------------------------------------------------------------------------


def raw_write(path: Path, payloads: Array) -> float:
    """Sequential write and one fdatasync a batch, as much a batch as the store's."""

    def write() -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for first in range(0, len(payloads), BATCH_BLOCKS):
            os.pwrite(fd, payloads[first : first + BATCH_BLOCKS].reshape(-1).data, first * payloads.shape[1])
            os.fdatasync(fd)
        os.close(fd)

    return seconds(write)


def direct_read(path: Path, *, depth: int, piece_bytes: int) -> float:
    """Seconds to read a file past the page cache, `depth` pieces in flight."""
    local = threading.local()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, piece_bytes)
        return os.preadv(fd, [local.buffer], offset)

    size = path.stat().st_size
    with ThreadPoolExecutor(depth) as pool:
        elapsed_s = seconds(lambda: sum(pool.map(read, range(0, size, piece_bytes))))
    os.close(fd)
    return elapsed_s


def warm_read(path: Path, into: Array, *, depth: int, num_blocks: int) -> float:
    """Seconds of preadv from the page cache into the same warm buffers, `num_blocks` a call."""
    fd = os.open(path, os.O_RDONLY)
    nbytes = into.shape[1]

    def read(first: int) -> int:
        return os.preadv(fd, list(into[first : first + num_blocks]), first * nbytes)

    with ThreadPoolExecutor(depth) as pool:
        elapsed_s = seconds(lambda: sum(pool.map(read, range(0, len(into), num_blocks))))
    os.close(fd)
    return elapsed_s


# --- peers -----------------------------------------------------------------------------------------------------------


class Peer:
    """One peer in its own process."""

    def __init__(self, python: str, name: str, directory: Path, payloads: Path, shape: Sequence[int]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.store_peers", name, str(directory), str(payloads), *map(str, shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, "batch": BATCH_BLOCKS}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["right"], f"{self.name} returned wrong bytes"
        return float(answer["s"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- the store beside them -------------------------------------------------------------------------------------------


def measure_disk(directory: Path, payloads: Array, repeats: int, python: str) -> dict[str, list[float]]:
    """Bytes a second by name, one number a repeat."""
    names, total = chain(len(payloads)), payloads.nbytes
    into = np.zeros_like(payloads)
    views = [row.data for row in into]
    source = directory / "payloads.bin"
    raw_write(source, payloads)
    found: dict[str, list[float]] = {}

    def note(name: str, elapsed_s: float) -> None:
        found.setdefault(name, []).append(total / elapsed_s)

    for repeat in range(repeats):
        place = directory / f"run-{repeat}"
        place.mkdir()
        peers = [Peer(python, name, place / name, source, payloads.shape) for name in PEERS] if python else []
        config = KvStoreConfig(dir=str(place / "store"), budget_bytes=16 << 30, compression="off", scrub_bytes_per_s=0)
        engine = Engine(config)
        restore = functools.partial(engine.reader.read_blocks, names.hashes, views, fingerprint=FINGERPRINT)
        # 1. Durable writes.
        note("raw_write", raw_write(place / "raw.bin", payloads))
        note("put", seconds(functools.partial(put_all, engine, records(names, payloads))))
        for peer in peers:
            note(f"put_{peer.name}", peer.ask("put"))
        # 2. Cold reads. Depths and sizes vary: the best raw reader is the limit.
        for depth, mib in ((1, 4), (4, 1), (16, 1), (16, 4)):
            drop_cache(place)
            direct_s = direct_read(place / "raw.bin", depth=depth, piece_bytes=mib * MIB)
            note(f"direct_depth{depth}_{mib}mib", direct_s)
        drop_cache(place / "store" / "segments")
        note("restore", seconds(restore))
        assert np.array_equal(into, payloads)
        for peer in peers:
            note(f"restore_{peer.name}", peer.ask("cold"))
        # 3. Warm reads.
        warm_read(place / "raw.bin", into, depth=2, num_blocks=1)
        for depth, count in ((1, 1), (2, 1), (2, 9)):
            note(f"pread_{depth}x{count}", warm_read(place / "raw.bin", into, depth=depth, num_blocks=count))
            note("warm", seconds(restore))
        for peer in peers:
            peer.ask("warm")
            note(f"warm_{peer.name}", peer.ask("warm"))
            peer.close()
        engine.close()
        shutil.rmtree(place)
    return found


def put_all(engine: Engine, wanted: Sequence[Record]) -> None:
    for first in range(0, len(wanted), BATCH_BLOCKS):
        engine.put(wanted[first : first + BATCH_BLOCKS])


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


def measure_remote(directory: Path, payloads: Array, repeats: int) -> dict[str, list[float]]:
    """The service in its own process on loopback, beside a bare gRPC stream of 1 MiB chunks from another."""
    bare = subprocess.Popen([sys.executable, "-c", BARE_SERVER], stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "antefix", "serve", "kvstore", "--dir", str(directory / "remote")]
    served = subprocess.Popen([*command, "--budget-bytes", "8g"], stdout=subprocess.PIPE, text=True)
    assert bare.stdout is not None
    assert served.stdout is not None
    try:
        port, address = int(bare.stdout.readline()), json.loads(served.stdout.readline())["address"]
        return asyncio.run(stream_both(port, address, payloads, repeats))
    finally:
        bare.kill()
        served.terminate()
        bare.wait()
        served.wait()


async def stream_both(port: int, address: str, payloads: Array, repeats: int) -> dict[str, list[float]]:
    store, names = RemoteStore(address), chain(len(payloads))
    start = time.perf_counter()
    await store.put(records(names, payloads))
    found = {"remote_put": [payloads.nbytes / (time.perf_counter() - start)], "bare_stream": [], "remote": []}
    into = np.zeros_like(payloads)
    views = [row.data for row in into]
    options = [("grpc.max_receive_message_length", 16 * MIB)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.unary_stream("/Bare/Stream")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            received = 0
            async for piece in call(str(payloads.nbytes // MIB).encode()):
                received += len(piece)
            found["bare_stream"].append(received / (time.perf_counter() - start))
            start = time.perf_counter()
            assert await store.get_blocks(names.hashes, views, fingerprint=FINGERPRINT) == len(payloads)
            found["remote"].append(payloads.nbytes / (time.perf_counter() - start))
    assert np.array_equal(into, payloads)
    await store.close()
    # The first round fills buffers.
    return {name: values if name == "remote_put" else values[1:] for name, values in found.items()}


def restore_long(directory: Path, payloads: Array) -> dict[str, float]:
    """Store and restore a 1M-token prefix into a ring of buffers, as a worker with a small pool would."""
    names = chain(7813, salt=9)
    config = KvStoreConfig(dir=str(directory / "long"), budget_bytes=8 << 30, compression="off", scrub_bytes_per_s=0)
    engine = Engine(config)
    wanted = records(names, payloads)
    put_s = seconds(functools.partial(put_all, engine, wanted))
    drop_cache(directory / "long" / "segments")
    ring = [row.data for row in np.zeros((128, payloads.shape[1]), np.uint8)]
    reset_peak_memory()
    before_kib = memory_kib("VmRSS")

    def restore() -> None:
        for first in range(0, len(names.hashes), 128):
            part = names.hashes[first : first + 128]
            outcome = engine.reader.read_blocks(part, ring[: len(part)], fingerprint=FINGERPRINT)
            assert outcome.num_good == len(part)

    restore_s = seconds(restore)
    grown_kib = memory_kib("VmHWM") - before_kib
    engine.close()
    shutil.rmtree(directory / "long")
    nbytes = len(names.hashes) * payloads.shape[1]
    return {
        "long_bytes": nbytes,
        "long_put_s": put_s,
        "long_restore_s": restore_s,
        "long_restore_gb_per_s": nbytes / restore_s / 1e9,
        "long_memory_growth_mib": grown_kib / 1024,
    }


# --- the report ------------------------------------------------------------------------------------------------------


def ratio(found: dict[str, list[float]], ours: str, *limits: str) -> float:
    """Median over repeats of ours over the best of the limits."""
    best = [max(values) for values in zip(*(found[name] for name in limits), strict=True)]
    step = len(found[ours]) // len(best)
    return statistics.median(statistics.median(found[ours][i * step : (i + 1) * step]) / b for i, b in enumerate(best))


def report(found: dict[str, list[float]]) -> dict[str, float]:
    direct = [name for name in found if name.startswith("direct")]
    pread = [name for name in found if name.startswith("pread")]
    out = {f"{name}_gb_per_s": statistics.median(values) / 1e9 for name, values in found.items()}
    out["restore_ratio"] = ratio(found, "restore", *direct)
    out["put_ratio"] = ratio(found, "put", "raw_write")
    out["warm_ratio"] = ratio(found, "warm", *pread)
    out["remote_ratio"] = ratio(found, "remote", "bare_stream")
    for name in PEERS:
        if f"put_{name}" in found:
            for kind in ("put", "restore", "warm"):
                out[f"{kind}_over_{name}"] = ratio(found, kind, f"{kind}_{name}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flash", "pro"), default="flash")
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory by default")
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="", metavar="PYTHON")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_large_buffers()
    payloads = blocks(layout_of(args.model), args.blocks)
    with tempfile.TemporaryDirectory(prefix="antefix-bench-", dir=args.dir) as name:
        directory = Path(name)
        found = measure_disk(directory, payloads, args.repeats, args.peers)
        found |= measure_remote(directory, payloads[:256], 3 * args.repeats)
        out = report(found)
        out |= scale_figures(directory, num_blocks=1_000_000 if args.long else 50_000)
        if args.long:
            out |= restore_long(directory, payloads)
    if args.json:
        print(json.dumps({"model": args.model, "block_bytes": int(payloads.shape[1]), **out}))
    else:
        for key, value in out.items():
            print(f"{key:40} {value:12.3f}")


if __name__ == "__main__":
    main()
