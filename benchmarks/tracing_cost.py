"""What do traces cost? Sends requests in turn to two deployments: one sends every span, and the other sends none.

The two deployments run at the same time on the same machine, and each request goes to both, in an order that changes.
The figures are ratios of medians: of a whole request's time, of its time to first token, and of the processor time that
all roles of a deployment spent per request. The collector runs in this process, whose processor time is not counted.

    python benchmarks/tracing_cost.py --requests 200 --json benchmarks/results/tracing_cost.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from antefix.sampling import Sampling
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks.processor_time import cpu_s
from benchmarks.run_record import write
from benchmarks.ttft import ROOT
from tests.telemetry.otlp_receiver import receiving

NUM_WARM = 10


@dataclass
class Side:
    """One deployment and the times of its requests, in seconds."""

    deployment: Deployment
    whole_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    processor_s: float = 0.0

    async def ask(self, prompt: np.ndarray, max_tokens: int) -> None:
        before, started, first_s = self.spent_s(), time.perf_counter(), 0.0
        async for _ in self.deployment.router.generate(prompt, Sampling(max_tokens=max_tokens, ignore_eos=True)):
            first_s = first_s or time.perf_counter() - started
        self.whole_s.append(time.perf_counter() - started)
        self.ttft_s.append(first_s)
        self.processor_s += self.spent_s() - before

    def spent_s(self) -> float:
        """Processor time of all roles so far, user and system."""
        return sum(cpu_s(role.process.pid) for role in self.deployment.processes)

    def forget(self) -> None:
        self.whole_s, self.ttft_s, self.processor_s = [], [], 0.0


async def measure(args: argparse.Namespace, console: Console) -> dict[str, float]:
    rng = np.random.default_rng(args.seed)
    shared = rng.integers(0, 256, args.tokens).astype(np.uint32)
    with receiving() as (receiver, url), tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:

        def deployed(name: str, traces: str) -> Deployment:
            return Deployment(DeploymentConfig(model=args.model, data_dir=Path(scratch) / name, traces=traces))

        async with deployed("off", "") as off, deployed("on", url) as on:
            sides = [Side(off), Side(on)]
            for number in range(NUM_WARM + args.requests):
                if number == NUM_WARM:
                    sides[0].forget()
                    sides[1].forget()
                prompt = np.concatenate((shared, rng.integers(0, 256, 40).astype(np.uint32)))
                for side in sides if number % 2 else reversed(sides):
                    await side.ask(prompt, args.max_tokens)
                if number % 50 == 49:
                    console.print(f"[dim]{number + 1} of {NUM_WARM + args.requests}[/dim]")
            without, with_traces = sides
        num_spans = len(receiver.spans)
    median = statistics.median
    return {
        "requests": args.requests,
        "prompt_tokens": args.tokens + 40,
        "output_tokens": args.max_tokens,
        "spans_per_request": num_spans / (NUM_WARM + args.requests),
        "request_s_off": median(without.whole_s),
        "request_s_on": median(with_traces.whole_s),
        "request_ratio": median(with_traces.whole_s) / median(without.whole_s),
        "paired_request_ratio": median(b / a for a, b in zip(without.whole_s, with_traces.whole_s, strict=True)),
        "ttft_ratio": median(with_traces.ttft_s) / median(without.ttft_s),
        "processor_ratio": with_traces.processor_s / without.processor_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="number of tokens of the prefix that all requests share"
    )
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    report = asyncio.run(measure(args, Console(stderr=True)))
    print(json.dumps(report, indent=2))
    if args.json:
        write(args.json, report, "torch", "grpcio", "opentelemetry-sdk")


if __name__ == "__main__":
    main()
