"""How much later does a decode step end when its worker computes a long cold prompt at the same time?

    python -m benchmarks.steps_next_to_chunks --sequences 8 32 --tokens 262144 --out results

The model has V4-Flash's width, bfloat16 and random weights (`card_restore.random_model`). Sequences of `--behind`
tokens decode step after step, as the scheduler of a decode worker runs them, and a prompt of `--tokens` tokens is
computed in the same compute thread. A step's delay is its time, from asking for it until its tokens are on the host,
less the median time of steps without the prompt. "whole chunks" runs the same code, but no steps between a chunk's
layers, and cuts no chunk. Its host still stays at most one layer ahead of the GPU; earlier versions had no such limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.model import Sequence, WindowState
from antefix.sampling import Sampling
from antefix.window import PlanKind
from antefix_console.verify.stores import EmptyStore
from antefix_decode.step import run_and_choose
from antefix_decode.token_choice import Sampler
from antefix_prefill.run_prompt import grow
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from benchmarks import run_record
from benchmarks.card_restore import Bench, random_model

NUM_ALONE = 64
WAYS = ("between layers", "whole chunks")


class WholeChunks(ComputeThread):
    """A compute thread that runs chunks as wholes."""

    def _pause(self) -> bool:
        return False

    def chunk_tokens_max(self, num_tokens: int) -> int:
        return num_tokens


class Steps:
    """Decode steps of sequences behind random KV. ms: each step's milliseconds."""

    def __init__(self, engine: Engine, num_sequences: int, behind: int) -> None:
        self.engine = engine
        self.ms: list[float] = []
        self.items: list[tuple[Sequence, int, bool]] = []
        self.stopped = False
        self.random = np.random.default_rng(1)
        for _ in range(num_sequences):
            window = WindowState.zeros(engine.layout, behind, engine.device)
            sequence = Sequence(engine.blocks.allocate(-(-behind // engine.block_size)), window)
            self.items.append((sequence, 0, False))
        self.choosers = [(Sampler(Sampling(max_tokens=1 << 20)), None) for _ in range(num_sequences)]

    async def step(self) -> None:
        for sequence, _, _ in self.items:
            grow(self.engine, sequence, sequence.position + 1)
        # Different tokens, because equal ones would all be computed by the same experts.
        drawn = self.random.integers(self.engine.identity.vocab_size, size=len(self.items))
        self.items = [(sequence, int(token), False) for (sequence, _, _), token in zip(self.items, drawn, strict=True)]
        started = time.perf_counter()
        compute = self.engine.compute
        compute.stepping_for({"": 1})
        await compute.run_step(None, run_and_choose, self.engine, self.items, self.choosers)
        self.ms.append(1e3 * (time.perf_counter() - started))
        await asyncio.sleep(0)

    async def run(self) -> None:
        while not self.stopped:
            await self.step()


async def measure(bench: Bench, way: str, num_sequences: int, args: argparse.Namespace) -> dict[str, Any]:
    bench.compute = (WholeChunks if way == "whole chunks" else ComputeThread)("bench")
    behind = 2 * num_sequences * (args.behind + 4096)
    engine = bench.worker(EmptyStore(), args.tokens + behind, PlanKind.COLD)
    steps = Steps(engine, num_sequences, args.behind)
    for _ in range(8 + NUM_ALONE):
        await steps.step()
    alone_ms = float(np.median(steps.ms[8:]))
    engine.compute.stepping_for({})
    # Compiles what the prompt's first chunks need.
    short, _ = await bench.prompt(engine, bench.tokens(min(2 * args.chunk, args.tokens // 2)))
    engine.blocks.release(short.sequence.block_table)
    steps.ms.clear()
    running, started = asyncio.create_task(steps.run()), time.perf_counter()
    prompt, _ = await bench.prompt(engine, bench.tokens(args.tokens))
    prompt_s = time.perf_counter() - started
    steps.stopped = True
    await running
    engine.blocks.release(prompt.sequence.block_table)
    delays = np.array(steps.ms[1:-1]) - alone_ms
    row = {
        "way": way,
        "sequences": num_sequences,
        "step_alone_ms": alone_ms,
        "num_steps": len(delays),
        "delay_p50_ms": float(np.percentile(delays, 50)),
        "delay_p99_ms": float(np.percentile(delays, 99)),
        "delay_max_ms": float(delays.max()),
        "prompt_s": prompt_s,
    }
    bench.compute.close()
    return row


async def prompt_alone(bench: Bench, args: argparse.Namespace) -> float:
    bench.compute = ComputeThread("bench")
    engine = bench.worker(EmptyStore(), args.tokens + args.chunk, PlanKind.COLD)
    _, seconds = await bench.prompt(engine, bench.tokens(args.tokens))
    bench.compute.close()
    return seconds


async def run(args: argparse.Namespace) -> dict[str, Any]:
    subject = random_model(args.layers, getattr(torch, args.dtype), args.device, args.small)
    bench = Bench(subject, EmptyStore(), Path(), args)
    await prompt_alone(bench, args)  # compiles kernels
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "layers": args.layers,
        "tokens": args.tokens,
        "chunk": args.chunk,
        "behind": args.behind,
        "prompt_alone_s": await prompt_alone(bench, args),
        "rows": [],
    }
    for way in args.ways:
        for num_sequences in args.sequences:
            row = await measure(bench, way, num_sequences, args)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--behind", type=int, default=4096, help="tokens before each decoding sequence's next one")
    parser.add_argument("--tokens", type=int, default=262144, help="tokens of the prompt")
    parser.add_argument("--layers", default="WCHC", help="the model's layers, as in card_restore")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="very small tensors, to see whether the benchmark runs")
    parser.add_argument("--out", type=Path, help="directory for steps_next_to_chunks.json")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print(json.dumps(result))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        run_record.write(args.out / "steps_next_to_chunks.json", result, "torch", "triton")


if __name__ == "__main__":
    main()
