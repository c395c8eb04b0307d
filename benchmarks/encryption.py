"""What does encrypting a store cost? Writes and reads the same blocks in two stores, one encrypted and one not.

Each round writes new blocks to both stores and reads them back from the page cache. The order in which the two stores
are measured changes from round to round. The figures are medians: GB/s of payload for writes and reads, processor time
per GiB, and the ratio of encrypted to plain.

    python benchmarks/encryption.py --json benchmarks/results/encryption.json
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from antefix.block import Chain
from antefix.record import Record, RecordKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from benchmarks.run_record import write

FINGERPRINT = b"f" * 32
BLOCK = 128
OWNER = bytes(24)


class Side:
    """One store, and the seconds and processor seconds per round that its writes and its reads took."""

    def __init__(self, directory: Path, *, encrypted: bool) -> None:
        key = directory.with_suffix(".key")
        key.write_text(secrets.token_hex(32))
        key.chmod(0o600)
        self.engine = StorageEngine(
            KvStoreConfig(
                dir=str(directory),
                budget_bytes=8 << 30,
                compression="off",
                durable=False,
                encrypt_key_file=str(key) if encrypted else "",
            )
        )
        self.took: dict[str, list[tuple[float, float]]] = {"write": [], "read": []}

    def time(self, direction: str, work: Callable[[], object]) -> None:
        wall, spent = time.perf_counter(), time.process_time()
        work()
        self.took[direction].append((time.perf_counter() - wall, time.process_time() - spent))


def records(number: int, num_blocks: int, payload: bytes) -> list[Record]:
    """Records of a chain that no earlier round used."""
    chain = Chain(FINGERPRINT, b"k" * 32, BLOCK)
    hashes = chain.extend([(number * 7919 + at) % 60_000 for at in range(num_blocks * BLOCK)])
    return [
        Record(
            kind=RecordKind.BLOCK,
            hash=name,
            parent=chain.parent(index),
            fingerprint=FINGERPRINT,
            position=(index + 1) * BLOCK,
            payload=payload,
            tenant=OWNER,
        )
        for index, name in enumerate(hashes)
    ]


def read(engine: StorageEngine, chain: list[Record], nbytes: int) -> None:
    into = [memoryview(bytearray(nbytes)) for _ in chain]
    found = engine.reader.read_blocks([each.hash for each in chain], into, fingerprint=FINGERPRINT, tenant=OWNER)
    if found.num_good != len(chain):
        raise SystemExit(f"only {found.num_good} of {len(chain)} blocks came back")


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        sides = {name: Side(Path(directory) / name, encrypted=name == "encrypted") for name in ("plain", "encrypted")}
        for number in range(args.rounds + 1):
            # Random bytes cost AES as much as real KV. Compression is off, so the codec's time is not measured too.
            chain = records(number, args.blocks, os.urandom(args.block_bytes))
            for name in sorted(sides, reverse=bool(number % 2)):
                side = sides[name]
                side.time("write", lambda side=side, chain=chain: side.engine.put(chain))  # type: ignore[misc]
                side.time("read", lambda side=side, chain=chain: read(side.engine, chain, args.block_bytes))  # type: ignore[misc]
        figures: dict[str, dict[str, float]] = {}
        gib = args.blocks * args.block_bytes / (1 << 30)
        for direction in ("write", "read"):
            row: dict[str, float] = {}
            for name, side in sides.items():
                walls, spent = zip(*side.took[direction][1:], strict=True)  # the first round warms up
                row[f"{name}_gb_per_s"] = gib * 1.0737 / statistics.median(walls)
                row[f"{name}_processor_s_per_gib"] = statistics.median(spent) / gib
            row["speed_ratio"] = row["encrypted_gb_per_s"] / row["plain_gb_per_s"]
            row["processor_ratio"] = row["encrypted_processor_s_per_gib"] / row["plain_processor_s_per_gib"]
            figures[direction] = row
        for side in sides.values():
            side.engine.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=256, help="blocks per round (default: 256)")
    parser.add_argument(
        "--block-bytes", type=int, default=449_792, help="bytes of a block (default: V4-Flash's, 449792)"
    )
    parser.add_argument("--dir", help="directory for the stores (default: the temporary directory)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    figures = measure(args)
    for direction, row in figures.items():
        print(
            f"{direction}: plain {row['plain_gb_per_s']:.2f} GB/s, encrypted {row['encrypted_gb_per_s']:.2f} GB/s"
            f" ({row['speed_ratio']:.2f} of plain); processor {row['plain_processor_s_per_gib']:.2f} and"
            f" {row['encrypted_processor_s_per_gib']:.2f} s per GiB ({row['processor_ratio']:.2f} of plain)"
        )
    if args.json:
        write(args.json, {"rounds": args.rounds, "figures": figures}, "cryptography")


if __name__ == "__main__":
    main()
