"""How many requests per second can the ledger make durable, one at a time and in groups, and what does one cost?

    python benchmarks/ledger.py [--directory DIR] [--records N] [--json benchmarks/results/ledger.json]

Each request is one OPEN and one SETTLE entry, as in the router. "concurrent" is the number of requests that wait at
once. Group commit lets these requests share an fdatasync. The program prints one JSON object with medians of --runs
runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from decimal import Decimal
from pathlib import Path

from antefix.miss_reason import MissReason
from antefix.usage import Usage
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled
from antefix_billing.progress_slots import ProgressJournal
from antefix_billing.reconcile import verify
from antefix_billing.usage_commit import LedgerWriter
from antefix_billing.usage_record import OpenEntry, Status, UsageRecord
from benchmarks.run_record import write

NOW_US = 1_790_000_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, help="directory on the disk to measure (default: the temporary directory)"
    )
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        rows = [measure(Path(scratch), args, concurrent) for concurrent in (1, 8, 64, 512)]
        result = {
            "fdatasync_ms": round(1000 * sync_s(Path(scratch)), 3),
            "requests": rows,
            "reading": reading(Path(scratch) / "512-0"),
            "encode_us": round(1e6 * encode_s(), 1),
            "progress_mark_us": round(1e6 * mark_s(Path(scratch)), 1),
        }
    print(json.dumps(result, indent=2))
    if args.json:
        write(args.json, result)


def measure(scratch: Path, args: argparse.Namespace, concurrent: int) -> dict[str, object]:
    """One row: requests per second, and CPU time and syncs per request."""
    runs = []
    num_records = max(200, args.records // (20 if concurrent == 1 else 2 if concurrent == 8 else 1))
    for number in range(args.runs):
        directory = scratch / f"{concurrent}-{number}"
        runs.append(asyncio.run(settle_all(directory, num_records, concurrent)))
    seconds = statistics.median(run[0] for run in runs)
    size = sum(path.stat().st_size for path in directory.glob("usage-*"))
    return {
        "concurrent": concurrent,
        "requests_per_s": round(num_records / seconds),
        "latency_ms": round(1000 * seconds * concurrent / num_records, 3),
        "cpu_us_per_request": round(1e6 * statistics.median(run[1] for run in runs) / num_records, 1),
        "requests_per_sync": round(statistics.median(run[2] for run in runs), 1),
        "bytes_per_request": round(size / num_records),
    }


async def settle_all(directory: Path, num_records: int, concurrent: int) -> tuple[float, float, float]:
    """(seconds, CPU seconds, requests per sync) of one run."""
    writer = LedgerWriter(Ledger(directory))
    numbers = iter(range(num_records))

    async def client() -> None:
        for number in numbers:
            await writer.open(opened(f"request-{number:024d}"))
            await writer.settle(record(f"request-{number:024d}"))

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(concurrent)))
    elapsed = time.perf_counter() - started, time.process_time() - cpu
    shared = writer.counters.entries / writer.counters.batches / 2
    await writer.close()
    return (*elapsed, shared)


def reading(directory: Path) -> dict[str, object]:
    """Measure opening, verifying and exporting the ledger that was written."""
    started = time.perf_counter()
    Ledger(directory).close()
    opened_s = time.perf_counter() - started
    started = time.perf_counter()
    verdict = verify(directory)
    verified_s = time.perf_counter() - started
    started = time.perf_counter()
    num_records = sum(1 for _ in read_settled(directory))
    read_s = time.perf_counter() - started
    assert verdict.ok
    return {
        "records": num_records,
        "open_s": round(opened_s, 3),
        "verify_records_per_s": round(num_records / verified_s),
        "export_records_per_s": round(num_records / read_s),
    }


def sync_s(directory: Path) -> float:
    """Seconds of one fdatasync after a small append; without group commit a ledger needs two per request."""
    times = []
    with (directory / "probe").open("wb") as file:
        for _ in range(200):
            started = time.perf_counter()
            file.write(bytes(1200))
            file.flush()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def encode_s() -> float:
    """Seconds to make and encode one record."""
    started = time.perf_counter()
    for number in range(2000):
        record(f"request-{number}").to_payload()
    return (time.perf_counter() - started) / 2000


def mark_s(directory: Path) -> float:
    """CPU time of recording a request's progress, which happens before each piece of output is sent."""
    journal = ProgressJournal(directory)
    started = time.process_time()
    for number in range(20_000):
        done = Usage(prompt_tokens=122_379, cache_hit_tokens=121_600, output_tokens=number, last_hit_hash="fb" * 32)
        journal.mark("acme:request-000000000000000000000001", done)
    elapsed = time.process_time() - started
    journal.close()
    return elapsed / 20_000


def opened(request_id: str) -> OpenEntry:
    return OpenEntry(
        request_id=request_id,
        attempt=1,
        tenant="acme",
        user="",
        model="deepseek-v4-flash",
        revision="a36048ab14f21df112e6c2b5691a870d",
        fingerprint="94" * 32,
        request_digest="cc" * 16,
        prompt_tokens=122_379,
        started_us=NOW_US,
    )


def record(request_id: str) -> UsageRecord:
    return UsageRecord(
        request_id=request_id,
        source="antefix/0d42ccc8ce1abebd9f20d629b54c7543",
        tenant="acme",
        model="deepseek-v4-flash",
        revision="a36048ab14f21df112e6c2b5691a870d",
        fingerprint="94" * 32,
        request_digest="cc" * 16,
        prompt_tokens=122_379,
        cache_hit_tokens=121_600,
        cache_write_tokens=640,
        hit_memory_tokens=100_000,
        output_tokens=440,
        restore_plan="checkpoint",
        last_hit_hash="fb" * 32,
        miss_reason=MissReason.FIRST_SEEN,
        status=Status.STOP,
        rate_card="deepseek-flash/2026-09-10/peak",
        currency="USD",
        price=Decimal("0.0014913"),
        saved=Decimal("0.0357504"),
        started_us=NOW_US,
        finished_us=NOW_US + 5_000_000,
        ttft_us=300_000,
    )


if __name__ == "__main__":
    main()
