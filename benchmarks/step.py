"""What does a decode step cost by number of sequences, and what would it cost with one sequence at a time?

    python -m benchmarks.step --sequences 1 8 32 --tokens 2048
    python -m benchmarks.step --sequences 32 --profile      # the operations that take most of it
    python -m benchmarks.step --device cuda                 # with the kernels; there is no one-by-one to compare with

All sequences continue one prompt, whose blocks they share. Times are CPU seconds on a CPU, so that other load on the
machine does not count, and wall seconds on a GPU. The variants take turns, and each figure is the median of `--steps`.
"ratio" is the time one by one divided by the time together; higher is better. "sequence" is the time that one more
sequence adds, computed from the first row. "torch alone" runs all sequences together without the compiled kernels, if
those are in use.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model
from antefix.model.backend import make_backend
from antefix.model.compiled import switch
from antefix.model.compiled.check import enable
from antefix.model.ops import Ops, TorchOps
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]
CHUNK = 1024


class OneByOne(TorchOps):
    """Operations that run a step sequence by sequence."""

    steps_together = False


def follow(model: Model, pool: BlockPool, ops: Ops, num_tokens: int, num_sequences: int, room: int) -> list[Sequence]:
    """Sequences that continue one prompt, each with its own blocks for `room` more tokens."""
    size = model.config.geometry.block_size
    num_tokens -= num_tokens % size
    prompt = Sequence(pool.allocate(num_tokens // size), WindowState.zeros(model.layout, 0, model.device))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens).astype(np.uint32)
    for start in range(0, num_tokens, CHUNK):
        forward(model, pool, [(prompt, tokens[start : start + CHUNK])], ops=ops)
    more = -(-room // size)
    return [Sequence([*prompt.block_table, *pool.allocate(more)], prompt.window.clone()) for _ in range(num_sequences)]


def step_s(model: Model, pool: BlockPool, ops: Ops, sequences: list[Sequence], tokens: np.ndarray) -> float:
    on_card = model.device.type == "cuda"
    clock = time.perf_counter if on_card else time.process_time
    if on_card:
        torch.cuda.synchronize()
    started = clock()
    batch = list(zip(sequences, tokens, strict=True))
    forward(model, pool, batch, ops=ops).float().cpu()
    return clock() - started


def measure(model: Model, num_tokens: int, num_sequences: int, num_steps: int, num_new: int = 1) -> dict[str, Any]:
    """Median seconds of a step of `num_new` tokens of each sequence, together and one by one."""
    size = model.config.geometry.block_size
    room = (3 * num_steps + 4) * num_new
    num_blocks = -(-num_tokens // size) + num_sequences * -(-room // size)
    pool, ops = make_backend("auto", model.layout, num_blocks, model.device)
    sequences = follow(model, pool, ops, num_tokens, num_sequences, room)
    random = np.random.default_rng(1)
    ways: dict[str, Ops] = {"together": ops}
    if ops.steps_together:
        ways["one by one"] = OneByOne()
    compiled = switch.is_on()
    if compiled:
        ways["torch alone"] = ops
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_steps):
        for name, way in ways.items():
            switch.use(compiled and name != "torch alone")
            tokens = random.integers(0, model.config.vocab_size, (num_sequences, num_new)).astype(np.uint32)
            seconds[name].append(step_s(model, pool, way, sequences, tokens))
    switch.use(compiled)
    # The first step of each variant is left out, because the processor's caches are cold.
    return {"sequences": num_sequences} | {name: statistics.median(took[1:]) for name, took in seconds.items()}


def profile(model: Model, num_tokens: int, num_sequences: int) -> str:
    size = model.config.geometry.block_size
    pool, ops = make_backend("auto", model.layout, -(-num_tokens // size) + num_sequences, model.device)
    sequences = follow(model, pool, ops, num_tokens, num_sequences, size)
    tokens = np.zeros((num_sequences, 1), np.uint32)
    step_s(model, pool, ops, sequences, tokens)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if model.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=kinds) as seen:
        step_s(model, pool, ops, sequences, tokens)
    averages = seen.key_averages()
    found: str = averages.table(sort_by=order, row_limit=25)
    return f"{found}\n{counts({each.key: each.count for each in averages})}"


# Names in a profile of calls that launch a kernel, and of calls that wait for the GPU or would wait on a GPU.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
         "aten::_local_scalar_dense", "aten::nonzero")  # fmt: skip


def counts(calls: dict[str, int]) -> str:
    """calls: how often each name of a profile was called."""
    launches = sum(count for name, count in calls.items() if name.startswith(LAUNCHES))
    waits = {name: count for name, count in calls.items() if name.startswith(WAITS)}
    operations = sum(count for name, count in calls.items() if name.startswith("aten::"))
    listed = ", ".join(f"{name} {count}" for name, count in sorted(waits.items())) or "none"
    return f"torch operations {operations:,}; kernel launches {launches:,}; calls that wait for a card: {listed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--tokens", type=int, default=2048, help="number of prompt tokens before the tokens of the sequences"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=1,
        help=(
            "number of tokens that a step computes for each sequence (40: as for a prompt with a short uncached end)"
        ),
    )
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--kernels",
        choices=("auto", "torch"),
        default="auto",
        help="kernels to compute with, as in a worker's setting of the same name",
    )
    parser.add_argument(
        "--profile", action="store_true", help="list the operations of one step instead of measuring steps"
    )
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, device=args.device, kv_format=KVFormat.FP8)
    # A worker sets this after it has measured that threads are free.
    model.threads_are_free = True
    if args.kernels == "auto":
        enable(model)
    if args.profile:
        print(profile(model, args.tokens, args.sequences[-1]))
        return
    rows = [measure(model, args.tokens, count, args.steps, args.new_tokens) for count in args.sequences]
    if args.json:
        shape = {"tokens": args.tokens, "new_tokens": args.new_tokens, "threads": args.threads, "device": args.device}
        write(args.json, {**shape, "compiled": switch.is_on(), "rows": rows}, "torch")
    table = Table("sequences", "together, ms", "one by one, ms", "torch alone, ms", "ratio", "sequence, ms", "tokens/s")
    first = rows[0]
    for row in rows:
        alone = row.get("one by one")
        more = row["sequences"] - first["sequences"]
        table.add_row(
            str(row["sequences"]),
            f"{row['together'] * 1e3:.1f}",
            f"{alone * 1e3:.1f}" if alone else "",
            f"{row['torch alone'] * 1e3:.1f}" if "torch alone" in row else "",
            f"{alone / row['together']:.2f}" if alone else "",
            f"{(row['together'] - first['together']) / more * 1e3:.2f}" if more else "",
            f"{row['sequences'] / row['together']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
