"""How much sooner does the first token come on a hit, and how far is a hit from its floor?

Starts all roles, sends prompts of several lengths cold and as hits, and prints JSON and a table. The client measures
the times. The floor of a hit is the sum of two times: reading the hit's bytes at this disk's bandwidth (measured in
this run with direct reads), and computing the uncached tokens (at the rate of the same worker's cold run). A second
floor takes the uncached tokens at the time that the model alone needs for them (benchmarks/bare_forward.py), before any
service starts.

    python benchmarks/ttft.py --lengths 2048 8192 16384 --repeats 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from antefix.layout import BlockLayout, KVFormat
from antefix.model_dir import identify
from antefix.sampling import Sampling
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks import run_record
from benchmarks.bare_forward import seconds_alone

ROOT = Path(__file__).parents[1]
QUESTION_TOKENS = 40


async def ask(deployment: Deployment, prompt: np.ndarray) -> dict[str, float]:
    """Seconds to the first token as the client sees it, and the worker's report."""
    started = time.perf_counter()
    ttft_s = 0.0
    async for message in deployment.router.generate(prompt, Sampling(max_tokens=4, ignore_eos=True)):
        ttft_s = ttft_s or time.perf_counter() - started
        last = message
    restore = last.restore
    return {
        "ttft_s": ttft_s,
        "hit_tokens": restore.hit_tokens,
        "miss_tokens": restore.miss_tokens,
        "replayed_tokens": restore.replayed_tokens,
        "bytes_read": restore.bytes_read,
        "restore_s": restore.restore_s,
        "compute_s": restore.compute_s,
    }


async def measure(args: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    rng = np.random.default_rng(args.seed)
    alone_s = seconds_alone(args.model, args.lengths, QUESTION_TOKENS)
    rows: list[dict[str, object]] = []
    for length in args.lengths:
        cold, warm, disk = [], [], []
        for repeat in range(args.repeats):
            with tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
                config = DeploymentConfig(model=args.model, data_dir=Path(scratch), strategy=args.strategy)
                document = rng.integers(0, 256, length).astype(np.uint32)

                def with_question(document: np.ndarray = document) -> np.ndarray:
                    return np.concatenate((document, rng.integers(0, 256, QUESTION_TOKENS).astype(np.uint32)))

                async with Deployment(config) as deployment:
                    await ask(deployment, rng.integers(0, 256, 600).astype(np.uint32))  # warm the process up
                    cold.append(await ask(deployment, with_question()))
                    warm.append(await ask(deployment, with_question()))
                async with Deployment(config) as deployment:
                    await ask(deployment, rng.integers(0, 256, 600).astype(np.uint32))
                    disk.append(await ask(deployment, with_question()))
                read_rate = direct_read_rate(config.store_dir)
            console.print(f"[dim]{length} tokens, repeat {repeat + 1} of {args.repeats}[/dim]")
        rows.append(summarise(length, cold, warm, disk, read_rate, alone_s[length]))
    return rows


def summarise(length, cold, warm, disk, read_rate, alone_s) -> dict[str, object]:
    def median(samples, name):
        return statistics.median(sample[name] for sample in samples)

    prefill_rate = length / median(cold, "compute_s")
    work = median(disk, "miss_tokens") + median(disk, "replayed_tokens")
    reading_s = median(disk, "bytes_read") / read_rate
    floor_s = reading_s + work / prefill_rate
    floor_alone_s = reading_s + alone_s + median(disk, "replayed_tokens") / prefill_rate
    return {
        "tokens": length,
        "cold_ttft_s": median(cold, "ttft_s"),
        "memory_hit_ttft_s": median(warm, "ttft_s"),
        "disk_hit_ttft_s": median(disk, "ttft_s"),
        "memory_speedup": median(cold, "ttft_s") / median(warm, "ttft_s"),
        "disk_speedup": median(cold, "ttft_s") / median(disk, "ttft_s"),
        "hit_tokens": median(disk, "hit_tokens"),
        "miss_tokens": median(disk, "miss_tokens"),
        "replayed_tokens": median(disk, "replayed_tokens"),
        "bytes_read": median(disk, "bytes_read"),
        "disk_bytes_per_s": read_rate,
        "prefill_tokens_per_s": prefill_rate,
        "restore_s": median(disk, "restore_s"),
        "floor_s": floor_s,
        "ttft_over_floor": median(disk, "ttft_s") / floor_s,
        "forward_alone_s": alone_s,
        "floor_alone_s": floor_alone_s,
        "ttft_over_floor_alone": median(disk, "ttft_s") / floor_alone_s,
    }


def direct_read_rate(store_dir: Path) -> float:
    """Bytes per second of direct 1 MiB reads, without the page cache, of a new file on the store's disk."""
    path, nbytes = store_dir / "probe.tmp", 64 << 20
    path.write_bytes(os.urandom(nbytes))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    buffer = mmap.mmap(-1, 1 << 20)
    started = time.perf_counter()
    for offset in range(0, nbytes, 1 << 20):
        os.preadv(descriptor, [buffer], offset)
    seconds = time.perf_counter() - started
    os.close(descriptor)
    path.unlink()
    return nbytes / seconds


def sizes(model: Path) -> dict[str, float]:
    """Sizes in bytes by the layout's formulas, for comparison with the bytes that the store counted."""
    layout = BlockLayout(geometry=identify(model, revision="sizes").geometry, kv_format=KVFormat.FP8)
    return {
        "global_kv_bytes_per_token": layout.bytes_per_token,
        "checkpoint_bytes": layout.checkpoint_bytes,
        "window_bytes": layout.window_bytes,
        "overlap_bytes": layout.overlap_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    console = Console(stderr=True)
    report = {"strategy": args.strategy, "sizes": sizes(args.model), "rows": asyncio.run(measure(args, console))}
    print(json.dumps(report, indent=2))
    if args.json:
        run_record.write(args.json, report, "torch")
    table = Table(title=f"Time to first token, medians of {args.repeats}, strategy {args.strategy}")
    for name in ("tokens", "cold", "hit, memory", "hit, disk", "speed-up", "floor", "over floor", "floor, model alone"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(
            str(row["tokens"]),
            f"{row['cold_ttft_s']:.3f} s",
            f"{row['memory_hit_ttft_s'] * 1e3:.0f} ms",
            f"{row['disk_hit_ttft_s'] * 1e3:.0f} ms",
            f"{row['memory_speedup']:.0f}x / {row['disk_speedup']:.0f}x",
            f"{row['floor_s'] * 1e3:.0f} ms",
            f"{row['ttft_over_floor']:.1f}x",
            f"{row['floor_alone_s'] * 1e3:.0f} ms",
        )
    console.print(table)


if __name__ == "__main__":
    main()
