"""How fast is the model path on this machine, and how near to the limit that its matrix products set?

Prints prefill and decode tokens per second by context length, and compares them with the rate of a large matrix product
on the same threads in the same run. Times are CPU seconds, not wall seconds, so that other load does not count.

    python benchmarks/model.py --lengths 2048 8192 16384 --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from antefix.layout import KVFormat
from antefix.model import BlockPool, Sequence, WindowState, forward, load_model

ROOT = Path(__file__).parents[1]
DECODE_STEPS = 12


def matmul_flops_per_s(size: int = 1024, repeats: int = 8) -> float:
    """Floating-point operations per CPU second of a float32 product of two square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    started = time.process_time()
    for _ in range(repeats):
        a @ b
    return 2 * size**3 * repeats / (time.process_time() - started)


def measure(model_path: Path, kv_format: KVFormat, lengths: list[int], chunk: int) -> list[dict[str, float]]:
    """Measure one growing sequence: at each length, decode a few steps and then discard them."""
    model = load_model(model_path, kv_format=kv_format)
    total = max(lengths) + DECODE_STEPS
    num_blocks = -(-total // model.layout.geometry.block_size)
    pool = BlockPool(model.layout, num_blocks)
    sequence = Sequence(block_table=pool.allocate(num_blocks), window=WindowState.zeros(model.layout, 0))
    tokens = np.random.default_rng(0).integers(0, 256, total).astype(np.uint32)
    rows: list[dict[str, float]] = []
    prefill_s = 0.0
    for length in sorted(lengths):
        while sequence.position < length:
            prefill_s += timed(model, pool, sequence, tokens, min(chunk, length - sequence.position))
        window = sequence.window.clone()
        steps = [timed(model, pool, sequence, tokens, 1) for _ in range(DECODE_STEPS)]
        sequence.window = window
        rows.append(
            {
                "tokens": length,
                "prefill_tokens_per_s": length / prefill_s,
                "decode_tokens_per_s": 1 / statistics.median(steps[2:]),
            }
        )
    return rows


def timed(model, pool, sequence, tokens, count: int) -> float:
    started = time.process_time()
    forward(model, pool, [(sequence, tokens[sequence.position : sequence.position + count])])
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--kv-format", choices=("fp8", "float32"), default="fp8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.model, KVFormat(args.kv_format), args.lengths, args.chunk)
    report = {"threads": args.threads, "matmul_flops_per_s": matmul_flops_per_s(), "rows": rows}
    print(json.dumps(report, indent=2))
    peak = report["matmul_flops_per_s"] / 1e9
    table = Table(title=f"Model speed per CPU second, {args.threads} thread(s), matmul {peak:.0f} GFLOP/s")
    for name in ("context", "prefill tokens/s", "decode tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["tokens"]), f"{row['prefill_tokens_per_s']:.0f}", f"{row['decode_tokens_per_s']:.0f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
