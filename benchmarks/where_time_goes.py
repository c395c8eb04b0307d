"""Which steps make up a hit's time to first token, and how much of it is unavoidable (the "floor")?

Starts all roles and sends their traces to a collector in this process. Sends prompts of several lengths cold and as
hits, and adds up the spans of each part until the first token is sent. A span's time does not include the spans inside
it. The two floors are those of `benchmarks/ttft.py`. --cost measures the time of one span, with traces on and off.

    python benchmarks/where_time_goes.py --lengths 2048 8192 16384 --repeats 5
    python benchmarks/where_time_goes.py --cost
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from antefix.telemetry import span
from antefix.telemetry.context import bind_parent
from antefix.telemetry.tracing import start_tracing
from antefix.wire import Sampling
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks import run_record
from benchmarks.bare_forward import seconds_alone
from benchmarks.ttft import QUESTION_TOKENS, ROOT, direct_read_rate
from tests.telemetry.otlp_receiver import Received, receiving

NUM_SPANS = 20_000


async def ask(deployment: Deployment, prompt: np.ndarray) -> tuple[str, float]:
    """The request's trace id, and its time to first token as its client sees it."""
    trace_id = secrets.token_hex(16)
    bind_parent(f"00-{trace_id}-{secrets.token_hex(8)}-01")
    started, ttft_s = time.perf_counter(), 0.0
    async for _ in deployment.router.generate(prompt, Sampling(max_tokens=4, ignore_eos=True)):
        ttft_s = ttft_s or time.perf_counter() - started
    return trace_id, ttft_s


def hops(spans: list[Received], trace_id: str) -> dict[str, float]:
    """Seconds of each part until the first token is sent. The time of a part does not include the parts inside it."""
    own = [each for each in spans if each.trace_id == trace_id]
    (first,) = [each for each in own if each.name == "first token"]
    until = first.started_s + first.seconds
    own = [each for each in own if each.started_s < until and each is not first]
    spent: Counter[str] = Counter()
    for each in own:
        inside = sum(min(other.seconds, until - other.started_s) for other in own if other.parent_id == each.span_id)
        name = f"{each.service.removeprefix('antefix-')}: {each.name}"
        spent[name] += max(0.0, min(each.seconds, until - each.started_s) - inside)
    return dict(spent)


async def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    rng = np.random.default_rng(args.seed)
    alone_s = seconds_alone(args.model, args.lengths, QUESTION_TOKENS)
    rows = []
    for length in args.lengths:
        found: dict[str, list[tuple[str, float]]] = {"cold": [], "memory": [], "disk": []}
        with receiving() as (receiver, url):
            for repeat in range(args.repeats):
                with tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
                    config = DeploymentConfig(model=args.model, data_dir=Path(scratch), traces=url)
                    document = rng.integers(0, 256, length).astype(np.uint32)

                    def with_question(document: np.ndarray = document) -> np.ndarray:
                        return np.concatenate((document, rng.integers(0, 256, QUESTION_TOKENS).astype(np.uint32)))

                    async with Deployment(config) as deployment:
                        await ask(deployment, rng.integers(0, 256, 600).astype(np.uint32))  # warm the process up
                        found["cold"].append(await ask(deployment, with_question()))
                        found["memory"].append(await ask(deployment, with_question()))
                    async with Deployment(config) as deployment:
                        await ask(deployment, rng.integers(0, 256, 600).astype(np.uint32))
                        found["disk"].append(await ask(deployment, with_question()))
                    read_rate = direct_read_rate(config.store_dir)
                console.print(f"[dim]{length} tokens, repeat {repeat + 1} of {args.repeats}[/dim]")
        rows.append(summarise(length, found, receiver.spans, read_rate, alone_s[length]))
    return rows


def summarise(
    length: int, found: dict[str, list[tuple[str, float]]], spans: list[Received], read_rate: float, alone_s: float
) -> dict[str, Any]:
    """One row of the result.

    floor_s: reading the bytes at the disk's rate, plus computing the uncached tokens at the cold run's rate.
    floor_alone_s: the same with the time that the model alone takes for the new tokens; only of hits.
    """
    row: dict[str, Any] = {"tokens": length, "disk_bytes_per_s": read_rate, "forward_alone_s": alone_s}
    row |= {"ttft_s": {}, "hops_s": {}, "floor_s": {}, "floor_alone_s": {}}
    cold_s = statistics.median(hops(spans, trace_id)["prefill: prefill chunk"] for trace_id, _ in found["cold"])
    for kind, asked in found.items():
        parts = [hops(spans, trace_id) for trace_id, _ in asked]
        names = sorted({name for each in parts for name in each})
        row["ttft_s"][kind] = statistics.median(ttft_s for _, ttft_s in asked)
        row["hops_s"][kind] = {name: statistics.median(each.get(name, 0.0) for each in parts) for name in names}
        restores = [each for each in spans if each.trace_id == asked[-1][0] and each.name == "restore"]
        told = restores[0].attributes if restores else {"bytes_read": 0, "hit_tokens": 0, "replayed_tokens": 0}
        reading_s, token_s = told["bytes_read"] / read_rate, cold_s / (length + QUESTION_TOKENS)
        num_new = length + QUESTION_TOKENS - told["hit_tokens"]
        row["floor_s"][kind] = reading_s + (num_new + told["replayed_tokens"]) * token_s
        if num_new == QUESTION_TOKENS:
            row["floor_alone_s"][kind] = reading_s + alone_s + told["replayed_tokens"] * token_s
    return row


def cost() -> dict[str, float]:
    """Seconds that a span takes."""

    def a_span() -> float:
        started = time.perf_counter()
        for _ in range(NUM_SPANS):
            with span("a", size=1):
                pass
        return (time.perf_counter() - started) / NUM_SPANS

    off_s = min(a_span() for _ in range(3))
    with receiving() as (_, url):
        stop = start_tracing(url, role="cost")
        on_s = min(a_span() for _ in range(3))
        stop()
    return {"off_s": off_s, "on_s": on_s}


def table_of(row: dict[str, Any]) -> Table:
    table = Table(title=f"{row['tokens']} tokens: milliseconds until the first token, medians; lower is better")
    table.add_column("hop")
    for kind in row["hops_s"]:
        table.add_column(kind, justify="right")
    names = sorted({name for parts in row["hops_s"].values() for name in parts})
    for name in names:
        table.add_row(name, *(f"{1e3 * parts.get(name, 0.0):.2f}" for parts in row["hops_s"].values()))
    for title in ("ttft_s", "floor_s", "floor_alone_s"):
        found = (row[title].get(kind) for kind in row["hops_s"])
        table.add_row(title.removesuffix("_s"), *(f"{1e3 * each:.1f}" if each is not None else "" for each in found))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="measure only how long one trace span takes")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    console = Console(stderr=True)
    report: Any = cost() if args.cost else {"rows": asyncio.run(measure(args, console))}
    print(json.dumps(report, indent=2))
    if args.json:
        run_record.write(args.json, report, "torch")
    for row in report.get("rows", ()):
        console.print(table_of(row))


if __name__ == "__main__":
    main()
