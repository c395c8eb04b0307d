"""How near is the store to its disk, and how far from its peers, with V4-sized payloads?

    antefix bench store [--model flash|pro] [--dir DIR] [--repeats N] [--peers PYTHON] [--long] [--record FILE] [--json]

In one run, each round measures the raw disk (also with fio, if installed), the store and every peer in turn. Ratios
are medians of each round's ratio, because a shared machine's speed drifts more than these differ. Cold means that the
kernel was told to drop the files from its page cache; a virtual disk's host may still cache them. Peers are those of
LMDB, RocksDB, LMCache and diskcache that the Python of --peers has installed (`make bench-peers` makes such a Python).
--long adds a 1M-token prefix and a store of a million small blocks.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from antefix.block import Chain, chain_of
from antefix.layout import BlockLayout
from antefix.record import Record, RecordKind
from antefix.store.allocator import keep_large_buffers
from antefix.store_files import codec
from antefix.store_files.checked_copy import checked_reads, used_instead
from antefix_console.commands.bench import add_store_arguments
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from benchmarks import run_record, store_clients, store_upkeep
from benchmarks.fio_limits import READERS, WRITERS, fio_rate, has_fio
from benchmarks.spread import median_interval, over_neighbours, with_spread
from benchmarks.store_cold import measure_cold
from benchmarks.store_limits import (
    DIRECT_READERS,
    WARM_READERS,
    direct_read,
    drop_cache,
    one_pass_read,
    raw_write,
    seconds,
    warm_read,
)
from benchmarks.store_payloads import blocks, layout_of, pool_like
from benchmarks.store_peers import MODULES, PEERS
from benchmarks.store_remote import measure_remote
from benchmarks.store_scale import memory_kib, reset_peak_memory, scale_figures

BLOCK_TOKENS = 128
BATCH_BLOCKS = 128
# A remote restore of this many blocks takes about as long as a short disturbance on a shared machine lasts.
REMOTE_BLOCKS = 512
WARM_ROUNDS = 12
CLIENT_ROUNDS = 7
IN_TURN_BLOCKS = 512
IN_TURN_ROUNDS = 40
COLD_ROUNDS = 20
FINGERPRINT = b"F" * 32
MIB = 1 << 20
Array = Any


def tell(what: str) -> None:
    """Print progress to stderr; the result goes to stdout."""
    sys.stderr.write(f"bench store: {what}\n")
    sys.stderr.flush()


@dataclass
class Found:
    """Bytes per second of everything that was timed, in the order of the rounds."""

    nbytes: int
    values: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, elapsed_s: float) -> None:
        self.note_rate(name, self.nbytes / elapsed_s)

    def note_rate(self, name: str, bytes_per_s: float) -> None:
        self.values.setdefault(name, []).append(bytes_per_s)


def word_sum(row: memoryview) -> int:
    return int(np.frombuffer(row, np.uint64, len(row) // 8).sum())


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


# --- the store next to them -------------------------------------------------------------------------------------------


def measure_disk(directory: Path, payloads: Array, repeats: int, peers_of: Callable[[Path, Path], list[Peer]]) -> Found:
    """Measure the disk, the page cache, the store and the peers. Returns all measured bytes per second, by name."""
    names = chain(len(payloads))
    into = pool_like(payloads)
    views = [row.data for row in into]
    with_fio = has_fio()
    if not with_fio:
        tell("fio is not installed: durable puts and cold restores are held against Python's own writer and readers")
    # Is loaded now, and not in the middle of a measurement.
    reads = checked_reads()
    source = directory / "payloads.bin"
    raw_write(source, payloads, BATCH_BLOCKS)
    found = Found(payloads.nbytes)
    for repeat in range(repeats):
        tell(f"disk, page cache and peers: round {repeat + 1} of {repeats}")
        place = directory / f"run-{repeat}"
        place.mkdir()
        peers = peers_of(place, source)
        engine = StorageEngine(config_of(place / "store"))
        restore = functools.partial(engine.reader.read_blocks, names.hashes, views, fingerprint=FINGERPRINT)
        # 1. Durable writes.
        found.note("raw_write", raw_write(place / "raw.bin", payloads, BATCH_BLOCKS))
        found.note("put", seconds(functools.partial(put_all, engine, records(names, payloads))))
        for name in WRITERS if with_fio else ():
            found.note_rate(name, fio_rate(place, name, payloads.nbytes))
        for peer in peers:
            found.note(f"put_{peer.name}", peer.ask("put"))
        # 2. Cold reads. Ours runs after each raw reader; the best raw reader is the limit.
        for depth, mib in DIRECT_READERS:
            drop_cache(place)
            found.note(f"direct_{depth}x{mib}mib", direct_read(place / "raw.bin", depth=depth, piece_bytes=mib * MIB))
            drop_cache(place / "store" / "segments")
            found.note("restore", seconds(restore))
        for name in READERS if with_fio else ():
            found.note_rate(name, fio_rate(place, name, payloads.nbytes))
        assert np.array_equal(into, payloads)
        for peer in peers:
            found.note(f"restore_{peer.name}", peer.ask("cold"))
        # 3. Warm reads, also in turn.
        warm_read(place / "raw.bin", into, depth=2, num_blocks=1)
        for _ in range(WARM_ROUNDS):
            for depth, count in WARM_READERS:
                found.note(f"pread_{depth}x{count}", warm_read(place / "raw.bin", into, depth=depth, num_blocks=count))
                found.note("warm", seconds(restore))
            with used_instead(None):
                found.note("warm_uncompiled", seconds(restore))
            depth, count = WARM_READERS[-1]
            checked_s = warm_read(place / "raw.bin", into, depth=depth, num_blocks=count, check=xxhash.xxh3_128_digest)
            found.note(f"checked_{depth}x{count}", checked_s)
            if reads is not None:
                one_pass_s = one_pass_read(place / "raw.bin", into, reads, depth=depth, num_blocks=count)
                found.note("one_pass", one_pass_s)
            # For comparison: numpy's sum of all words in place of XXH3. It costs about as much, so it is no bound.
            found.note("summed", warm_read(place / "raw.bin", into, depth=depth, num_blocks=count, check=word_sum))
        for peer in peers:
            peer.ask("warm")
            found.note(f"warm_{peer.name}", peer.ask("warm"))
            peer.close()
        engine.close()
        shutil.rmtree(place)
    return found


def measure_coded(directory: Path, layout: BlockLayout, payloads: Array, found: Found) -> float:
    """Cold restores of blocks that are stored compressed, decoded in parallel. Returns the lossless ratio."""
    tell("cold restore of compressed blocks")
    names, into = chain(len(payloads)), np.zeros_like(payloads)
    views = [row.data for row in into]
    engine = StorageEngine(config_of(directory / "coded", compression="zstd"))
    engine.register(FINGERPRINT, BLOCK_TOKENS, {RecordKind.BLOCK: codec.plan_of_block(layout)})
    put_all(engine, records(names, payloads))
    for _ in range(3):
        drop_cache(directory / "coded" / "segments")
        found.note(
            "restore_zstd",
            seconds(lambda: engine.reader.read_blocks(names.hashes, views, fingerprint=FINGERPRINT)),
        )
    assert np.array_equal(into, payloads)
    coded_ratio = engine.counters.payload_bytes_written / engine.counters.bytes_written
    engine.close()
    shutil.rmtree(directory / "coded")
    return coded_ratio


def config_of(directory: Path, *, compression: str = "off") -> KvStoreConfig:
    return KvStoreConfig(dir=str(directory), budget_bytes=16 << 30, compression=compression, scrub_bytes_per_s=0)


def put_all(engine: StorageEngine, wanted: Sequence[Record]) -> None:
    for first in range(0, len(wanted), BATCH_BLOCKS):
        engine.put(wanted[first : first + BATCH_BLOCKS])


def restore_long(directory: Path, payloads: Array) -> dict[str, float]:
    """Store and restore a 1M-token prefix into a ring of buffers, as a worker with a small pool would."""
    names = chain(7813, salt=9)
    config = KvStoreConfig(dir=str(directory / "long"), budget_bytes=8 << 30, compression="off", scrub_bytes_per_s=0)
    engine = StorageEngine(config)
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


def restore_next_to_readers(directory: Path, payloads: Array, rounds: int) -> dict[str, float | str]:
    """Cold restores of `payloads` and every reader of the disk in turn, in short rounds."""
    place, names, into = directory / "cold-in-turn", chain(len(payloads), salt=5), pool_like(payloads)
    place.mkdir()
    tell(f"cold restores next to each reader of the disk, {rounds} short rounds in turn")
    raw_write(place / "raw.bin", payloads, BATCH_BLOCKS)
    engine = StorageEngine(config_of(place / "store"))
    put_all(engine, records(names, payloads))
    views = [row.data for row in into]

    def read_blocks() -> int:
        return engine.reader.read_blocks(names.hashes, views, fingerprint=FINGERPRINT).num_good

    found = measure_cold(
        place / "store" / "segments", read_blocks, len(payloads), place / "raw.bin", rounds, with_fio=has_fio()
    )
    assert np.array_equal(into, payloads)
    engine.close()
    shutil.rmtree(place)
    return found


def put_next_to_fio(directory: Path, payloads: Array, writer: str, rounds: int) -> dict[str, float]:
    """Durable puts and fio's `writer` in turn. Rounds are short, because a disk that is shared has slow seconds."""
    place = directory / "in-turn"
    place.mkdir()
    # All files are kept until the end, and take at most half of the room that the disk has.
    rounds = max(1, min(rounds, shutil.disk_usage(place).free // (4 * payloads.nbytes) - 1))
    tell(f"durable puts next to {writer}, {rounds} short rounds in turn")
    engine = StorageEngine(config_of(place / "store"))
    puts: list[float] = []

    def limit(number: int) -> float:
        # Puts write new files and keep them. A disk may take longer for blocks that it never held, so fio's files are
        # new too, and they are kept until the end, or the next one would get the same blocks.
        of_fio = place / f"fio-{number}"
        of_fio.mkdir()
        return fio_rate(of_fio, writer, payloads.nbytes)

    limits = [limit(0)]
    for number in range(rounds):
        wanted = records(chain(len(payloads), salt=1 + (number << 20)), payloads)
        puts.append(payloads.nbytes / seconds(functools.partial(put_all, engine, wanted)))
        limits.append(limit(number + 1))
    engine.close()
    shutil.rmtree(place)
    found = over_neighbours(puts, limits)
    low, high = median_interval(found)
    out = {"put_over_fio_rounds": len(found), "put_over_fio_from": low, "put_over_fio_to": high}
    out |= with_spread("put_over_fio", found)
    # The ratio of each round of fio to the round before shows how much the disk itself varies.
    return out | with_spread("fio_over_fio", [later / earlier for earlier, later in pairwise(limits)])


# --- the report ------------------------------------------------------------------------------------------------------


def ratios(values: dict[str, list[float]], ours: str, *limits: str) -> list[float]:
    """For each round, our figure divided by the limit of the same round. The limit is the one of `limits` with the best
    median.
    """
    limit = values[max(limits, key=lambda name: statistics.median(values[name]))]
    num_rounds = len(limit)
    ours_by_round = np.array_split(np.array(values[ours]), num_rounds)
    if len(values[ours]) < num_rounds:
        ours_by_round = [np.array([statistics.median(values[ours])])] * num_rounds
    return [float(np.median(o)) / b for o, b in zip(ours_by_round, limit, strict=True)]


def ratio(values: dict[str, list[float]], ours: str, *limits: str) -> float:
    return statistics.median(ratios(values, ours, *limits))


def report(values: dict[str, list[float]]) -> dict[str, float]:
    direct = [name for name in values if name.startswith("direct")]
    pread = [name for name in values if name.startswith("pread")]
    out = {f"{name}_gb_per_s": statistics.median(found) / 1e9 for name, found in values.items()}
    out["restore_ratio"] = ratio(values, "restore", *direct)
    out["put_ratio"] = ratio(values, "put", "raw_write")
    out |= with_spread("warm_ratio", ratios(values, "warm", *pread))
    out |= with_spread("warm_uncompiled_ratio", ratios(values, "warm_uncompiled", *pread))
    out["warm_over_one_thread"] = ratio(values, "warm", "pread_1x1")
    checked = [name for name in values if name.startswith("checked_2")]
    out |= with_spread("warm_over_checked", ratios(values, "warm", *checked))
    out |= with_spread("warm_uncompiled_over_checked", ratios(values, "warm_uncompiled", *checked))
    out |= with_spread("checked_ratio", ratios(values, checked[0], *pread))
    if "one_pass" in values:
        out |= with_spread("one_pass_ratio", ratios(values, "one_pass", *pread))
        out |= with_spread("warm_over_one_pass", ratios(values, "warm", "one_pass"))
    out |= with_spread("summed_ratio", ratios(values, "summed", *pread))
    out["remote_ratio"] = ratio(values, "remote", "bare_stream")
    out["remote_over_best_bare"] = ratio(values, "remote", "bare_stream", "bare_blocking_stream")
    out["lean_ratio"] = ratio(values, "lean_stream", "bare_stream")
    out["remote_over_lean"] = ratio(values, "remote", "lean_stream")
    out["restore_zstd_ratio"] = ratio(values, "restore_zstd", *direct)
    best_direct = max(direct, key=lambda name: statistics.median(values[name]))
    for name in PEERS:
        if f"put_{name}" in values:
            for kind in ("put", "restore", "warm"):
                out[f"{kind}_over_{name}"] = ratio(values, kind, f"{kind}_{name}")
            # The ratio that a store without any overhead would reach.
            out[f"disk_restore_over_{name}"] = ratio(values, best_direct, f"restore_{name}")
            out[f"disk_put_over_{name}"] = ratio(values, "raw_write", f"put_{name}")
    return out


def peers_in(python: str) -> list[str]:
    """The peers that a Python environment has installed. Raises: SystemExit: there is no Python interpreter at this
    path.
    """
    if not python:
        return []
    script = (
        "import importlib.util,json,sys; print(json.dumps([bool(importlib.util.find_spec(m)) for m in sys.argv[1:]]))"
    )
    try:
        done = subprocess.run([python, "-c", script, *MODULES.values()], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise SystemExit(f"--peers: {python} does not run: {err}") from err
    missing = {name for name, there in zip(MODULES, json.loads(done.stdout), strict=True) if not there}
    if missing:
        tell(f"not installed for {python}, left out: {', '.join(sorted(missing))}")
    return [name for name in PEERS if name not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_store_arguments(parser)
    args = parser.parse_args()
    keep_large_buffers()
    peers, started_s = peers_in(args.peers), time.monotonic()
    layout = layout_of(args.model)
    tell("packing blocks")
    payloads = blocks(layout, args.blocks)
    with tempfile.TemporaryDirectory(prefix="antefix-bench-", dir=args.dir) as name:
        directory = Path(name)
        out = measure(directory, layout, payloads, peers, args)
    out = {"model": args.model, "block_bytes": int(payloads.shape[1]), "repeats": args.repeats, **out}
    out["run_s"] = round(time.monotonic() - started_s)
    if args.record:
        compiler = ["llvmlite"] if find_spec("llvmlite") else []
        run_record.write(args.record, out, "lmdb", "xxhash", "grpcio", *compiler)
    if args.json:
        sys.stdout.write(json.dumps(out) + "\n")
    else:
        for key, value in out.items():
            sys.stdout.write(f"{key:40} {value if isinstance(value, str) else format(value, '12.3f')}\n")


def measure(
    directory: Path, layout: BlockLayout, payloads: Array, peers: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    found = measure_disk(
        directory,
        payloads,
        args.repeats,
        lambda place, source: [Peer(args.peers, peer, place / peer, source, payloads.shape) for peer in peers],
    )
    coded_ratio = measure_coded(directory, layout, payloads, found)
    in_turn: dict[str, Any] = {}
    if writers := [name for name in found.values if name in WRITERS]:
        best = max(writers, key=lambda name: statistics.median(found.values[name]))
        in_turn = put_next_to_fio(directory, payloads[:IN_TURN_BLOCKS], best, IN_TURN_ROUNDS)
    in_turn |= restore_next_to_readers(directory, payloads[:IN_TURN_BLOCKS], COLD_ROUNDS if args.long else 4)
    tell("remote restore")
    part = payloads[:REMOTE_BLOCKS]
    names = chain(len(part))
    remote = measure_remote(directory, names, records(names, part), part, 3 * args.repeats)
    found.values |= remote.rates
    out = report(found.values) | in_turn | {"coded_ratio": coded_ratio}
    out |= {f"{name}_cpu_us_per_mib": statistics.median(used) for name, used in remote.cpu_us.items()}
    tell("many clients at once")
    clients = store_clients.measure(1.0, max(args.repeats, CLIENT_ROUNDS), directory, tell)
    out |= {f"clients_{name}": value for name, value in (clients.pop("ratios") | clients).items()}
    tell(f"a store of {'a million' if args.long else '50,000'} small blocks")
    out |= scale_figures(directory, num_blocks=1_000_000 if args.long else 50_000)
    tell("eviction and compaction next to puts and restores")
    out |= store_upkeep.measure(directory, 2 * args.repeats)
    if args.long:
        tell("a prefix of a million tokens")
        out |= restore_long(directory, payloads)
    return out


if __name__ == "__main__":
    main()
