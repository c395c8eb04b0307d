"""Compares Antefix's forward pass with transformers' on a CPU, with one thread and with several, all in one run.

    python -m benchmarks.cpu_peers --out benchmarks/results/cpu_peers.json       # 5 minutes on two idle cores
    python -m benchmarks.cpu_peers --tokens 256 --prefill 256 --repeats 3        # a minute, to see that it runs
    python -m benchmarks.cpu_peers --clock cpu --threads 1                       # processor time, on a busy machine

The model is antefix-tiny in float32. Antefix's variant uses FP8 KV. The variants take turns, and the figures are
medians of wall time. The medians are wrong on a busy machine, where two threads that share one core wait for each
other. The variant of Antefix uses as many threads as a worker's step (`antefix.model.step_threads`). A decode step
computes one token of each sequence. All sequences have prompts of the same length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from antefix.layout import KVFormat
from antefix.model import Model, Sequence, WindowState, forward, load_model
from antefix.model.backend import make_backend
from antefix.model.compiled import switch
from antefix.model.compiled.check import enable
from benchmarks.run_record import write
from benchmarks.step import follow

ROOT = Path(__file__).parents[1]
CHUNK = 512

Step = Callable[[], object]


def our_steps(model: Model, num_tokens: int, num_sequences: int, room: int) -> Step:
    size = model.config.geometry.block_size
    num_blocks = -(-num_tokens // size) + num_sequences * (-(-room // size) + 1)
    pool, ops = make_backend("auto", model.layout, num_blocks, "cpu")
    sequences = follow(model, pool, ops, num_tokens, num_sequences, room)
    token = np.zeros(1, np.uint32)
    return lambda: forward(model, pool, [(sequence, token) for sequence in sequences], ops=ops)


def our_prefill(model: Model, tokens: np.ndarray) -> Step:
    num_blocks = -(-len(tokens) // model.config.geometry.block_size)

    def run() -> None:
        pool, ops = make_backend("auto", model.layout, num_blocks, "cpu")
        sequence = Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0))
        for start in range(0, len(tokens), CHUNK):
            forward(model, pool, [(sequence, tokens[start : start + CHUNK])], ops=ops)

    return run


def their_steps(model: Any, num_tokens: int, num_sequences: int) -> Step:
    ids = torch.zeros(num_sequences, num_tokens, dtype=torch.long)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, :1]

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return run


def their_prefill(model: Any, tokens: np.ndarray) -> Step:
    ids = torch.from_numpy(tokens.astype(np.int64))[None]

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def in_turns(ways: dict[tuple[str, int], Step], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each (implementation, number of threads)."""
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way, step in ways.items():
            torch.set_num_threads(way[1])
            started = clock()
            step()
            seconds[way].append(clock() - started)
    # In the first turn of each variant, the processor's caches are cold.
    return {f"{name}_{threads}": statistics.median(took[1:]) for (name, threads), took in seconds.items()}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    ours = load_model(args.model, device="cpu", kv_format=KVFormat.FP8)
    ours.threads_are_free = True
    print("compiled kernels:", enable(ours))
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    threads, rows = sorted({1, args.threads}), []
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, args.prefill).astype(np.uint32)
    ways = {("ours", count): our_prefill(ours, tokens) for count in threads}
    ways |= {("theirs", count): their_prefill(theirs, tokens) for count in threads}
    rows.append({"what": f"prefill of {args.prefill}", "tokens": args.prefill, **in_turns(ways, 2, clock)})
    for count in args.sequences:
        room = 2 * (args.repeats + 2)
        ways = {("ours", each): our_steps(ours, args.tokens, count, room) for each in threads}
        if count <= args.their_sequences:
            ways |= {("theirs", each): their_steps(theirs, args.tokens, count) for each in threads}
        rows.append({"what": f"decode of {count}", "tokens": count, **in_turns(ways, args.repeats, clock)})
    return rows


def show(rows: list[dict[str, Any]], threads: int) -> None:
    table = Table("tokens/s (higher is better)", "ours, 1 thread", f"ours, {threads}", "transformers, 1", f"{threads}",
                  "ours over theirs, best of each", f"ours, {threads} over 1")  # fmt: skip
    for row in rows:
        rates = {name: row["tokens"] / row[name] for name in row if name not in ("what", "tokens")}
        ours = [rates["ours_1"], rates[f"ours_{threads}"]]
        theirs = [rates[name] for name in rates if name.startswith("theirs")]
        cells = [f"{rate:.0f}" for rate in (*ours, *theirs)] + [""] * (2 - len(theirs))
        ratio = f"{max(ours) / max(theirs):.2f}" if theirs else ""
        table.add_row(row["what"], *cells, ratio, f"{ours[1] / ours[0]:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--their-sequences",
        type=int,
        default=8,
        help="longest prompt that transformers also computes; longer prompts are measured without transformers",
    )
    parser.add_argument(
        "--tokens", type=int, default=2048, help="number of prompt tokens before the tokens that the sequences decode"
    )
    parser.add_argument(
        "--prefill", type=int, default=2048, help="number of tokens of the prompt whose prefill is measured"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: says nothing of threads")
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows = measure(args)
    show(rows, args.threads)
    if args.out is not None:
        facts = {"tokens": args.tokens, "clock": args.clock, "compiled": switch.is_on()}
        write(args.out, {**facts, "rows": rows}, "torch", "transformers")


if __name__ == "__main__":
    main()
