"""Do 32 agents' conversations at once get ten times one conversation's tokens per second, and how evenly?

    python -m benchmarks.agents --out benchmarks/results/agents.json        # 4 minutes on two idle cores
    python -m benchmarks.agents --at-once 1 4 --turns 2                     # a minute, to see that it runs

The benchmark starts a whole deployment (store, one prefill and one decode worker, a router); the clients run in this
process. All conversations share a system prompt, whose KV is in the worker's memory. Each turn sends the whole
conversation so far with `--new` more tokens and gets `--output` tokens. In the result, "one" is a single conversation
that runs alone. Tokens per second count output tokens, from the first request until the last answer. Clients measure
the times between tokens. Tokens that arrive in one message arrive at the same time, and the wait before the message
counts once. "CPU" is the processor time of all services per output token. Other processes on the machine change it
little, so its ratios are reliable on a busy machine, where ratios of wall time are not.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from antefix.clients import Tokens
from antefix.sampling import Sampling
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks import run_record
from benchmarks.role_use import use_by_role

ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Seen:
    """What the clients of one run saw, in seconds and tokens."""

    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_output: int = 0
    num_prompt: int = 0
    num_hit: int = 0


async def converse(deployment: Deployment, prompt: Tokens, args: argparse.Namespace, seed: int, seen: Seen) -> None:
    """One conversation, turn after turn."""
    random = np.random.default_rng(seed)
    for turn in range(args.turns):
        prompt = np.concatenate((prompt, random.integers(0, 256, args.new).astype(np.uint32)))
        sampling = Sampling(max_tokens=args.output, ignore_eos=True, temperature=0.0)
        last = time.perf_counter()
        answer: list[Tokens] = []
        async for message in deployment.router.generate(prompt, sampling, session=f"{seed}"):
            now = time.perf_counter()
            if len(message.tokens):
                (seen.gaps_s if answer else seen.ttft_s).append(now - last)
                answer.append(message.tokens)
                last = now
            if message.usage is not None and message.restore is not None:
                seen.num_prompt += len(prompt)
                seen.num_hit += message.restore.hit_tokens
        prompt = np.concatenate((prompt, *answer))
        seen.num_output += args.output
        if turn + 1 < args.turns and args.pause:
            await asyncio.sleep(args.pause)


async def measure_one(deployment: Deployment, shared: Tokens, args: argparse.Namespace, count: int) -> dict[str, Any]:
    seen, before, started = Seen(), use_by_role(deployment), time.perf_counter()
    async with asyncio.TaskGroup() as all_of_them:
        for number in range(count):
            seed = args.seed + 1000 * count + number
            all_of_them.create_task(converse(deployment, shared, args, seed, seen))
    seconds = time.perf_counter() - started
    after = use_by_role(deployment)
    cpu_s = {role: after[role]["cpu_s"] - before[role]["cpu_s"] for role in after}
    gaps = np.percentile(seen.gaps_s, (50, 99))
    return {
        "conversations": count,
        "seconds": seconds,
        "output_tokens": seen.num_output,
        "tokens_per_s": seen.num_output / seconds,
        "hit_rate": seen.num_hit / seen.num_prompt,
        "ttft_p50_s": float(np.median(seen.ttft_s)),
        "ttft_p99_s": float(np.percentile(seen.ttft_s, 99)),
        "gap_p50_s": float(gaps[0]),
        "gap_p99_s": float(gaps[1]),
        "cpu_s": cpu_s,
        "cpu_ms_per_token": 1e3 * sum(cpu_s.values()) / seen.num_output,
        "pss_mb": {role: each["pss_mb"] for role, each in after.items()},
    }


async def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="antefix-agents-") as scratch:
        config = DeploymentConfig(
            model=args.model, data_dir=Path(scratch), num_prefill=args.num_prefill, num_decode=args.num_decode
        )
        shared = np.random.default_rng(args.seed).integers(0, 256, args.shared).astype(np.uint32)
        rows = []
        async with Deployment(config) as deployment:
            # This puts the shared prompt into memory, and every process does its one-time work.
            for seed in (1, 2):
                await converse(deployment, shared, args, seed, Seen())
            for count in args.at_once:
                found = await measure_one(deployment, shared, args, count)
                console.print(f"[dim]{count} at once: {found['tokens_per_s']:.0f} tokens/s[/dim]")
                rows.append(found)
        return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("conversations", "tokens/s", "over one (10 wanted of 32)", "first token p50, ms", "p99",
                  "between tokens p50, ms", "p99", "p99 over p50 (3 or less)", "hit rate", "CPU ms per token",
                  "of it decode", "prefill")  # fmt: skip
    for row in rows:
        each = {role: 1e3 * row["cpu_s"].get(role, 0.0) / row["output_tokens"] for role in ("decode", "prefill")}
        table.add_row(
            str(row["conversations"]), f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.1f}", f"{1e3 * row['ttft_p50_s']:.0f}",
            f"{1e3 * row['ttft_p99_s']:.0f}", f"{1e3 * row['gap_p50_s']:.1f}", f"{1e3 * row['gap_p99_s']:.0f}",
            f"{row['gap_p99_s'] / row['gap_p50_s']:.1f}", f"{row['hit_rate']:.3f}", f"{row['cpu_ms_per_token']:.1f}",
            f"{each['decode']:.1f}", f"{each['prefill']:.1f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32], help="conversations; the first is 'one'")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--shared", type=int, default=4096, help="tokens of the system prompt")
    parser.add_argument("--new", type=int, default=192, help="number of tokens that each turn adds to the prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a conversation's turns")
    parser.add_argument("--num-prefill", type=int, default=1)
    parser.add_argument("--num-decode", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    console = Console(stderr=True)
    rows = asyncio.run(measure(args, console))
    console.print(table_of(rows))
    if args.out is not None:
        fields = ("turns", "shared", "new", "output", "pause", "num_prefill", "num_decode")
        run_record.write(args.out, {**{name: getattr(args, name) for name in fields}, "rows": rows}, "torch")


if __name__ == "__main__":
    main()
