"""How much longer does a short prefill after a hit take in a worker that also computes long cold prompts?

    python -m benchmarks.short_next_to_long --long 16384 --num-long 2 [--json FILE]

A worker has a prompt of `--hit` tokens in memory. The benchmark times this prompt with `--new` more tokens, alone and
while `--num-long` cold prompts are computed. "one queue" is an earlier design, which ran chunks and small jobs in order
of arrival. Figures are wall seconds: the median of the best round. A ratio is the time divided by the time alone;
lower is better. The model runs in this process, with a store in memory and without a prefill worker's admission queue.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from antefix.clients import Tokens
from antefix.layout import KVFormat
from antefix.window import PlanKind
from antefix_console.verify.models import load_subject
from antefix_console.verify.paired_runs import WorkerPair, prompt_of
from antefix_console.verify.stores import MemoryStore
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]


class OneQueue(ComputeThread):
    """A compute queue that does work in order of arrival."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._numbers = itertools.count()

    async def _submit(self, job):  # type: ignore[no-untyped-def]
        job.remaining, job.began = 0, float(next(self._numbers))
        return await super()._submit(job)


async def run(engine: Engine, tokens: Tokens) -> float:
    started = time.perf_counter()
    computed = await run_prompt(engine, prompt_of(engine, tokens))
    engine.blocks.release(computed.sequence.block_table)
    return time.perf_counter() - started


async def measure(compute: ComputeThread, args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds alone, and next to the long prompts."""
    subject = load_subject(args.model, KVFormat.FP8)
    workers = WorkerPair(subject, compute, args.chunk)
    engine = workers.new(
        MemoryStore(), args.hit + args.num_long * args.long + 8 * args.new, strategy="full", kind=PlanKind.CHECKPOINT
    )
    random = np.random.default_rng(0)

    def draw(num_tokens: int) -> Tokens:
        return random.integers(0, subject.identity.vocab_size, num_tokens).astype(np.uint32)

    shared = draw(args.hit)
    await run(engine, shared)
    alone = [await run(engine, np.concatenate((shared, draw(args.new)))) for _ in range(args.repeats)]
    longs = [asyncio.create_task(run(engine, draw(args.long))) for _ in range(args.num_long)]
    await asyncio.sleep(0.3)
    loaded: list[float] = []
    while len(loaded) < args.repeats and not all(task.done() for task in longs):
        loaded.append(await run(engine, np.concatenate((shared, draw(args.new)))))
    await asyncio.gather(*longs)
    compute.close()
    return statistics.median(alone), statistics.median(loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--hit", type=int, default=2048)
    parser.add_argument("--new", type=int, default=50)
    parser.add_argument("--long", type=int, default=16384)
    parser.add_argument("--num-long", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="number of rounds, each with both orders in turn; the best round of each order counts",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("order", "alone, ms", f"next to {args.num_long} of {args.long} tokens, ms", "ratio")
    orders = {"least left first": ComputeThread, "one queue": OneQueue}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in orders}
    for _ in range(args.rounds):
        for name, order in orders.items():
            found[name].append(asyncio.run(measure(order("model"), args)))
    rows = []
    for name, rounds in found.items():
        alone, loaded = (min(each) for each in zip(*rounds, strict=True))
        rows.append({"order": name, "alone_s": alone, "next_to_long_s": loaded})
        table.add_row(name, f"{alone * 1e3:.0f}", f"{loaded * 1e3:.0f}", f"{loaded / alone:.1f}")
    Console().print(table)
    if args.json:
        shape = {"hit": args.hit, "new": args.new, "long": args.long, "num_long": args.num_long}
        write(args.json, {**shape, "rows": rows}, "torch")


if __name__ == "__main__":
    main()
