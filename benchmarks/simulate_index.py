"""What does the object tier's index cost with 1,000 hosts and 100 million blocks? Simulates it with the real code.

    python -m benchmarks.simulate_index --json benchmarks/results/simulate_index.json

The bucket and its clock are simulated; it counts requests and bytes. It holds 700,000 segments of 143 blocks, which
were uploaded within a week, one every 0.86 s. Uploads continue. After half of the simulated time the tier exceeds its
budget, and a twentieth of it is deleted. Each host has a worker, which reads, and a store service, which uploads,
deletes and writes tiles. All processes of a kind do the same work, so one of each is simulated, with the product's
catalog and janitor. To save memory, a segment has `--entries` records; bytes are counted as for 143.

process    what a worker or a store asks of the bucket per hour, and its processor time for that, in all and the longest
start      what a new host loads before its first look-up
tiles      by level: bytes of a tile, and how many of all stores write the same tile, because they begin before the
           first of them is done (at `--write-bytes-per-s`, an assumption). together: if all wrote a tile as soon as it
           is due
look_ups   ages of records are log-uniform from 10 s to a week. stale: the index names a segment that was deleted, so
           the read fails and the block is computed. unknown: the record is there, but the index does not name it yet.
           worst_stale: the highest share in any minute
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from antefix.objects.bucket import ObjectGone, StoredObject
from antefix.objects.catalog import Catalog
from antefix.objects.janitor import SPREAD_SHARE, Janitor, ObjectLimits
from antefix.objects.object_index import ENTRY_BYTES, INDEX_HEADER, SEGMENT_ROW, Run, pack_run
from antefix.objects.object_tier import REFRESH_S
from antefix.objects.range_source import RangeSource
from antefix.objects.segment_object import SEGMENTS, SegmentRef, pack_segment
from antefix.objects.tiles import GRACE_MS, LEVEL_MAX, Tile
from antefix.record import Buffer, RecordKind
from antefix.store_files.record_format import RECORD_HEADER_BYTES, Codec, RecordFlag
from antefix.store_files.record_header import RecordHeader
from antefix_kvstore.object_upload import TIDY_S
from benchmarks.run_record import write

SEGMENT_BYTES: Final = 64 << 20
SEGMENT_RECORDS: Final = 143
WEEK_MS: Final = 7 * 86_400_000
START_MS: Final = 1_800_000_000_000
# The first read of a segment's end, which includes its footer.
TAIL_BYTES: Final = 64 << 10
LOOK_UPS_PER_S: Final = 20
TENANT: Final = b"t" * 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--segments", type=int, default=700_000)
    parser.add_argument("--entries", type=int, default=4, help="records per segment in memory")
    parser.add_argument("--hours", type=float, default=2.0, help="simulated time")
    parser.add_argument(
        "--write-bytes-per-s",
        type=float,
        default=50e6,
        help="bytes per second at which a host makes and uploads a segment",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = asyncio.run(simulate(args))
    sys.stdout.write(f"{report}\n")
    if args.json:
        write(args.json, {"hosts": args.hosts, "segments": args.segments, **report}, "numpy")
    return 0


async def simulate(args: argparse.Namespace) -> dict[str, Any]:
    bucket = SimulatedBucket(args)
    budget = (args.segments + round(1800 * args.hours * bucket.segments_per_s)) * SEGMENT_BYTES
    worker = Process(bucket, REFRESH_S, bucket.catalog().refresh)
    janitor = Janitor(bucket.catalog(), ObjectLimits(budget_bytes=budget))
    store = Process(bucket, TIDY_S, janitor.tidy)
    start = {}
    for name, process in (("worker", worker), ("store", store)):
        await process.run_once()
        start[name] = process.spent()
    index_bytes = args.segments * (SEGMENT_RECORDS * ENTRY_BYTES + SEGMENT_ROW.size)
    looks = LookUps(bucket, worker.call.__self__)  # type: ignore[attr-defined]
    ends_ms = bucket.now_ms + round(args.hours * 3_600_000)
    while bucket.now_ms < ends_ms:
        bucket.now_ms += 1000
        bucket.upload_due()
        await worker.run_if_due()
        await store.run_if_due()
        looks.draw()
    return {
        "index_bytes_per_process": index_bytes,
        "segments_per_s": round(bucket.segments_per_s, 3),
        "start": start,
        "process": {
            name: {
                key: value if key == "longest_cpu_s" else round(value / args.hours, 3)
                for key, value in process.spent().items()
            }
            for name, process in (("worker", worker), ("store", store))
        },
        "tiles": tile_writers(args, bucket.segments_per_s),
        "look_ups": looks.report(),
    }


class SimulatedBucket:
    """A bucket whose segments have a footer and nothing else. It tells sizes of real segments and tiles."""

    url = "simulated://bucket"

    def __init__(self, args: argparse.Namespace) -> None:
        self._random = np.random.default_rng(1)
        self._entries: int = args.entries
        self.now_ms = START_MS
        self.counts: Counter[str] = Counter()
        self.segments_per_s = args.segments / (WEEK_MS / 1000)
        # Parallel lists, by name: names, when created, and the hash of one record.
        self.names: list[str] = []
        self.created_ms: list[int] = []
        self.hashes: list[bytes] = []
        self.there: set[str] = set()
        self.sizes: dict[str, int] = {}
        self._ends: dict[str, bytes] = {}
        self._tiles: dict[str, bytes] = {}
        self._next_ms = START_MS - WEEK_MS
        self._fill(args.segments)

    def catalog(self) -> Catalog:
        return Catalog(self, clock_ms=lambda: self.now_ms)

    def upload_due(self) -> None:
        while self._next_ms <= self.now_ms:
            self._upload()

    def _upload(self) -> None:
        stored_bytes = SEGMENT_BYTES // self._entries - RECORD_HEADER_BYTES
        headers = [_header(self._random.bytes(32), self._next_ms, stored_bytes) for _ in range(self._entries)]
        built = pack_segment(((each, b"") for each in headers), created_ms=self._next_ms, expires_ms=0)
        self._add(built.ref, headers[0].hash)
        # The payloads are missing, so these are the bytes of the end only: the footer and the trailer.
        self._ends[built.ref.name] = b"".join(bytes(each) for each in built.parts)[-TAIL_BYTES:].rjust(TAIL_BYTES)
        self._next_ms += round(1000 / self.segments_per_s)

    def _add(self, ref: SegmentRef, block_hash: bytes) -> None:
        self.names.append(ref.name)
        self.created_ms.append(ref.created_ms)
        self.hashes.append(block_hash)
        self.there.add(ref.name)
        self.sizes[ref.name] = ref.nbytes

    def _fill(self, count: int) -> None:
        """A week of segments in the tiles that janitors would have written; the newest have only their footers."""
        step_ms = round(1000 / self.segments_per_s)
        first_ms, stop_ms = self._next_ms, self.now_ms - self.now_ms % Tile(0, 0).width_ms - GRACE_MS
        for tile in _tiles(first_ms, stop_ms):
            refs = []
            for created_ms in range(self._next_ms, tile.stop_ms, step_ms):
                refs.append(_ref(created_ms, self._random.bytes(16)))
                self._next_ms = created_ms + step_ms
            keys = self._random.integers(0, 1 << 63, len(refs) * self._entries, dtype=np.uint64)
            for number, ref in enumerate(refs):
                self._add(ref, int(keys[number * self._entries]).to_bytes(8, "little") + bytes(24))
            numbers = np.repeat(np.arange(len(refs), dtype=np.uint32), self._entries)
            order, ones = np.argsort(keys, kind="stable"), np.ones(len(keys), np.uint32)
            run = Run(refs, keys[order], numbers[order], ones, ones)
            self._tiles[tile.name] = b"".join(bytes(part) for part in pack_run(run))
        self.upload_due()

    async def list_objects(self, under: str, *, after: str = "", num_max: int | None = None) -> list[StoredObject]:
        if not under.startswith(SEGMENTS):
            self.counts["lists"] += 1
            return [StoredObject(name, len(raw)) for name, raw in sorted(self._tiles.items())]
        found: list[StoredObject] = []
        for name in self.names[bisect.bisect_right(self.names, after) :]:
            if name in self.there:
                found.append(StoredObject(name, self.sizes[name]))
                if len(found) == num_max:
                    break
        self.counts["lists"] += max(1, -(-len(found) // 1000))
        return found

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        self.counts["gets"] += 1
        if name in self._tiles:
            raw = self._tiles[name]
            self.counts["bytes"] += round((stop - start) * _full_bytes(raw, self._entries) / len(raw))
            return raw[start:stop]
        if name not in self.there:
            raise ObjectGone(name)
        self.counts["bytes"] += TAIL_BYTES
        end = self.sizes[name] - TAIL_BYTES
        return self._ends[name][start - end : stop - end]

    @property
    def num_asked_again(self) -> int:
        return 0

    async def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._tiles[name] = b"".join(bytes(part) for part in parts)
        self.counts["puts"] += 1
        self.counts["bytes"] += _full_bytes(self._tiles[name], self._entries)

    async def delete(self, names: Sequence[str]) -> None:
        self.counts["deletes"] += -(-len(names) // 1000)
        for name in names:
            self.there.discard(name)
            self._tiles.pop(name, None)

    async def open_range(self, name: str, start: int, stop: int) -> RangeSource | None:
        return None

    async def clean(self) -> int:
        return 0

    async def close(self) -> None: ...


class Process:
    """One process's regular work: what it asks for, and its processor time."""

    def __init__(self, bucket: SimulatedBucket, every_s: float, call: Any) -> None:
        self.call = call
        self._bucket = bucket
        self._every_ms = every_s * 1000
        self._next_ms = 0.0
        self._spent: Counter[str] = Counter()
        self._cpu_s = self._longest_s = 0.0

    async def run_if_due(self) -> None:
        if self._bucket.now_ms >= self._next_ms:
            self._next_ms = self._bucket.now_ms + self._every_ms
            await self.run_once()

    async def run_once(self) -> None:
        before, begun_s = self._bucket.counts.copy(), time.process_time()
        await self.call()
        seconds = time.process_time() - begun_s
        self._cpu_s += seconds
        self._longest_s = max(self._longest_s, seconds)
        self._spent += self._bucket.counts - before

    def spent(self) -> dict[str, float]:
        """Since this was asked before."""
        found = {**dict.fromkeys(("lists", "gets", "puts", "deletes", "bytes"), 0), **self._spent}
        found["cpu_s"] = round(self._cpu_s, 3)
        found["longest_cpu_s"] = round(self._longest_s, 3)
        self._spent, self._cpu_s, self._longest_s = Counter(), 0.0, 0.0
        return found


class LookUps:
    def __init__(self, bucket: SimulatedBucket, catalog: Catalog) -> None:
        self._bucket = bucket
        self._catalog = catalog
        self._random = random.Random(2)
        self._counts: Counter[str] = Counter()
        self._by_minute: Counter[tuple[int, str]] = Counter()

    def draw(self) -> None:
        bucket = self._bucket
        ages_ms = [10_000 * (WEEK_MS / 10_000) ** self._random.random() for _ in range(LOOK_UPS_PER_S)]
        at = [min(bisect.bisect_left(bucket.created_ms, bucket.now_ms - age), len(bucket.names) - 1) for age in ages_ms]
        places = self._catalog.find(RecordKind.BLOCK, [bucket.hashes[number] for number in at])
        for number, place in zip(at, places, strict=True):
            is_there = bucket.names[number] in bucket.there
            kind = {(True, True): "found", (True, False): "stale", (False, True): "unknown", (False, False): "gone"}[
                place is not None, is_there
            ]
            self._counts[kind] += 1
            self._by_minute[bucket.now_ms // 60_000, kind] += 1

    def report(self) -> dict[str, Any]:
        total = self._counts.total()
        worst = max(self._by_minute[minute, "stale"] for minute, _ in self._by_minute)
        shares = {
            f"{kind}_share": round(self._counts[kind] / total, 6) for kind in ("found", "stale", "unknown", "gone")
        }
        return {"count": total, **shares, "worst_stale_share": round(worst / (60 * LOOK_UPS_PER_S), 6)}


def tile_writers(args: argparse.Namespace, segments_per_s: float) -> list[dict[str, float]]:
    """How many stores write the same tile, by level. Each store looks every 30 to 90 s."""
    draw = random.Random(3)
    rows = []
    for level in range(4):
        width_s = Tile(level, 0).width_ms / 1000
        nbytes = width_s * segments_per_s * (SEGMENT_ROW.size + SEGMENT_RECORDS * ENTRY_BYTES)
        write_s = nbytes / args.write_bytes_per_s

        def writers(spread_s: float, write_s: float = write_s) -> float:
            found = []
            for _ in range(50):
                begun = []
                for _ in range(args.hosts):
                    waits_s = spread_s * draw.random()
                    # The first look after that.
                    begun.append(waits_s + draw.random() * TIDY_S)
                found.append(sum(each < min(begun) + write_s for each in begun))
            return sum(found) / len(found)

        spread_s = width_s * SPREAD_SHARE if level else 0.0
        rows.append(
            {
                "level": level,
                "bytes": round(nbytes),
                "write_s": round(write_s, 2),
                "writers": round(writers(spread_s), 1),
                "together": round(writers(0.0), 1),
            }
        )
    return rows


def _tiles(first_ms: int, stop_ms: int) -> list[Tile]:
    """The largest tiles that cover this time, none of which ends after `stop_ms`."""
    found, at_ms = [], first_ms
    while at_ms < stop_ms:
        fitting = [tile for level in range(LEVEL_MAX) if (tile := Tile.at(at_ms, level)).stop_ms <= stop_ms]
        found.append(max(fitting))
        at_ms = found[-1].stop_ms
    return found


def _full_bytes(raw: bytes, entries: int) -> int:
    """The bytes of a tile with 143 records per segment."""
    num_segments = (len(raw) - INDEX_HEADER.size) // (SEGMENT_ROW.size + entries * ENTRY_BYTES)
    return INDEX_HEADER.size + num_segments * (SEGMENT_ROW.size + SEGMENT_RECORDS * ENTRY_BYTES)


def _ref(created_ms: int, segment_id: bytes) -> SegmentRef:
    return SegmentRef(
        created_ms=created_ms,
        expires_ms=0,
        kind=RecordKind.BLOCK,
        tenant=TENANT,
        id=segment_id,
        nbytes=SEGMENT_BYTES,
    )


def _header(block_hash: bytes, created_ms: int, stored_bytes: int) -> RecordHeader:
    return RecordHeader(
        payload_checksum=bytes(16),
        hash=block_hash,
        parent=bytes(32),
        fingerprint=bytes(32),
        segment=0,
        offset=0,
        stored_bytes=stored_bytes,
        payload_bytes=stored_bytes,
        position=128,
        created_ms=created_ms,
        expires_ms=0,
        cost_us=0,
        kind=RecordKind.BLOCK,
        codec=Codec.RAW,
        flags=RecordFlag.NONE,
        tenant=TENANT + bytes(8),
    )


if __name__ == "__main__":
    raise SystemExit(main())
