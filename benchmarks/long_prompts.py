"""Do many long prompts that arrive at once all get an answer, within bounded memory?

    nice -n 19 python -m benchmarks.long_prompts --out benchmarks/results/long_prompts.json     # half an hour, idle
    python -m benchmarks.long_prompts --small --out benchmarks/results/long_prompts_small.json  # ten minutes, idle
    python -m benchmarks.long_prompts --small --prompts 4 --tokens 3000                         # to see that it runs

--small uses a random model of three small layers, which needs a tenth of the computation of antefix-tiny. The services
are the same.

The benchmark runs a whole deployment with default settings, except that the router accepts any wait. Each prompt has
`--tokens` different tokens, so nothing hits. All prompts are sent at once, and each must be answered to its end. The
memory of each role is sampled as PSS, in which shared pages are divided between the processes that share them. At the
end each prompt is sent again and must hit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from antefix.clients import Tokens
from antefix.sampling import Sampling
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks import run_record
from benchmarks.role_use import use_by_role
from tests.small_worker_model import small_worker_model

ROOT = Path(__file__).parents[1]
SAMPLE_S = 5.0


async def ask(deployment: Deployment, prompt: Tokens, timeout_s: float) -> dict[str, Any]:
    started, ttft_s, tokens, told = time.perf_counter(), 0.0, 0, None
    sampling = Sampling(max_tokens=8, ignore_eos=True, temperature=0.0)
    async for message in deployment.router.generate(prompt, sampling, timeout_s=timeout_s):
        ttft_s = ttft_s or time.perf_counter() - started
        tokens += len(message.tokens)
        told = message.restore or told
    seconds = time.perf_counter() - started
    return {"ttft_s": ttft_s, "seconds": seconds, "tokens": tokens, "hit_tokens": told.hit_tokens if told else 0}


async def sample(deployment: Deployment, samples: list[dict[str, float]]) -> None:
    """Sample the memory in MB by role, every few seconds."""
    while True:
        samples.append({role: each["pss_mb"] for role, each in use_by_role(deployment).items()})
        await asyncio.sleep(SAMPLE_S)


async def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    random = np.random.default_rng(args.seed)
    prompts = [random.integers(0, 256, args.tokens).astype(np.uint32) for _ in range(args.prompts)]
    with tempfile.TemporaryDirectory(prefix="antefix-long-") as scratch:
        pool = {role: ("--pool-bytes", args.pool_bytes) for role in ("prefill", "decode") if args.pool_bytes}
        model = small_worker_model() if args.small else args.model
        # The router refuses no request, however long it predicts the wait to be.
        flags = {**pool, "router": ("--wait-s-max", "0")}
        config = DeploymentConfig(model=model, data_dir=Path(scratch), extra_flags=flags)
        samples: list[dict[str, float]] = []
        async with Deployment(config) as deployment:
            await ask(deployment, random.integers(0, 256, 600).astype(np.uint32), args.timeout_s)
            idle = use_by_role(deployment)
            sampling = asyncio.create_task(sample(deployment, samples))
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(ask(deployment, prompt, args.timeout_s) for prompt in prompts), return_exceptions=True
            )
            seconds = time.perf_counter() - started
            again = await asyncio.gather(
                *(ask(deployment, prompt, args.timeout_s) for prompt in prompts), return_exceptions=True
            )
            sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling
            after = use_by_role(deployment)
    failed = [repr(each) for each in (*answers, *again) if isinstance(each, BaseException)]
    half = len(samples) // 2
    report = {
        "model": "three small layers" if args.small else args.model.name,
        "prompts": args.prompts,
        "tokens": args.tokens,
        "seconds": seconds,
        "failed": failed,
        "answers": [each for each in answers if not isinstance(each, BaseException)],
        "again": [each for each in again if not isinstance(each, BaseException)],
        "memory_mb": {
            role: {
                "idle": idle[role]["pss_mb"],
                "peak of the first half": max(each[role] for each in samples[: half or 1]),
                "peak of the second half": max(each[role] for each in samples[half:]),
                "after": after[role]["pss_mb"],
                "cpu_s": after[role]["cpu_s"] - idle[role]["cpu_s"],
            }
            for role in after
        },
    }
    console.print(report["memory_mb"], f"{len(failed)} failed of {2 * args.prompts}; {seconds:.0f} s", failed)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument(
        "--small", action="store_true", help="serve a model that computes a tenth of the default model's work"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument(
        "--pool-bytes", default="", help="size of each worker's block pool (empty: the worker's default)"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=7200.0,
        help="time limit of one request in seconds; a request that takes longer counts as failed",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    report = asyncio.run(measure(args, Console(stderr=True)))
    if args.out is not None:
        run_record.write(args.out, report, "torch")


if __name__ == "__main__":
    main()
