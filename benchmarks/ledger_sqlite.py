"""Would SQLite (WAL, synchronous=FULL) keep the ledger as fast as our own files? SQLite and our ledger run in turn, in
one run.

    python -m benchmarks.ledger_sqlite [--directory DIR] [--records N] [--runs N] [--save]

SQLite's table has the same entries, one row each with payload and chain hash, and an index of request ids. Both ledgers
are written through the router's own group commit (`LedgerWriter`), so they differ only in how they make a batch
durable. The ratios are valid on a busy machine too, because the runs take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from antefix_billing.ledger import Item, Ledger, Written
from antefix_billing.ledger_files import Settled
from antefix_billing.ledger_format import GENESIS, EntryKind, chain_hash
from antefix_billing.progress_slots import ProgressJournal
from antefix_billing.usage_commit import LedgerWriter
from antefix_billing.usage_record import OpenEntry, UsageRecord
from benchmarks import run_record
from benchmarks.ledger import opened, record

_TABLE = """
create table entries (
    sequence integer primary key, kind integer not null, key text not null, hash blob not null, payload blob not null
);
create index settled on entries (key) where kind = 2;
"""


class SqliteLedger:
    """A ledger in SQLite with the methods that `LedgerWriter` needs. One thread writes it."""

    source_name = "antefix/sqlite"

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._db = sqlite3.connect(directory / "ledger.db", isolation_level=None, check_same_thread=False)
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = full")
        self._db.executescript(_TABLE)
        self._hash, self.sequence = GENESIS, 0
        self.progress = ProgressJournal(directory)

    def append(self, items: Sequence[Item]) -> list[Written]:
        rows, answers = [], []
        for item in items:
            assert isinstance(item, OpenEntry | UsageRecord)
            kind = EntryKind.OPEN if isinstance(item, OpenEntry) else EntryKind.SETTLE
            if kind is EntryKind.SETTLE:
                self._db.execute("select sequence from entries where kind = 2 and key = ?", (item.key,)).fetchone()
            payload, previous = item.to_payload(), self._hash
            self.sequence += 1
            self._hash = chain_hash(previous, self.sequence, kind, payload)
            rows.append((self.sequence, int(kind), item.key, self._hash, payload))
            place = {"sequence": self.sequence, "hash": self._hash, "previous_hash": previous}
            answers.append(item if isinstance(item, OpenEntry) else Settled(**place, record=item))  # type: ignore[arg-type]
        self._db.execute("begin immediate")
        self._db.executemany("insert into entries values (?, ?, ?, ?, ?)", rows)
        self._db.execute("commit")
        return answers

    def close(self) -> None:
        self._db.close()
        self.progress.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, help="directory on the disk to measure (default: the temporary directory)"
    )
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ledger_sqlite.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        rows = [compare(Path(scratch), args, concurrent) for concurrent in (1, 8, 64, 512)]
    result = {"requests": rows}
    print(json.dumps(result, indent=2))
    if args.save:
        run_record.write(Path(__file__).parent / "results" / "ledger_sqlite.json", result)


def compare(scratch: Path, args: argparse.Namespace, concurrent: int) -> dict[str, object]:
    """Medians of requests/s and CPU time per request of both, and the ratio of each pair of runs."""
    num = max(100, args.records // (20 if concurrent == 1 else 2 if concurrent == 8 else 1))
    ours, theirs = [], []
    for run in range(args.runs):
        where = scratch / f"{concurrent}-{run}"
        ours.append(asyncio.run(settle_all(Ledger(where / "files"), num, concurrent)))
        theirs.append(asyncio.run(settle_all(cast(Ledger, SqliteLedger(where / "sqlite")), num, concurrent)))
    return {
        "concurrent": concurrent,
        "requests": num,
        "files_requests_per_s": round(num / statistics.median(each[0] for each in ours)),
        "sqlite_requests_per_s": round(num / statistics.median(each[0] for each in theirs)),
        "files_cpu_us": round(1e6 * statistics.median(each[1] for each in ours) / num, 1),
        "sqlite_cpu_us": round(1e6 * statistics.median(each[1] for each in theirs) / num, 1),
        "sqlite_to_files_throughput": round(
            statistics.median(one[0] / other[0] for one, other in zip(ours, theirs, strict=True)), 3
        ),
    }


async def settle_all(ledger: Ledger, num_records: int, concurrent: int) -> tuple[float, float]:
    """(seconds, CPU seconds)."""
    writer = LedgerWriter(ledger)
    numbers = iter(range(num_records))

    async def client() -> None:
        for number in numbers:
            await writer.open(opened(f"request-{number:024d}"))
            await writer.settle(record(f"request-{number:024d}"))

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(concurrent)))
    elapsed = time.perf_counter() - started, time.process_time() - cpu
    await writer.close()
    return elapsed


if __name__ == "__main__":
    main()
