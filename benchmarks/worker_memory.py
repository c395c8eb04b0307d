"""How much memory do a deployment's processes hold when they are idle after they served requests?

    python -m benchmarks.worker_memory --out benchmarks/results/worker_memory.json      # a minute on two idle cores

The benchmark runs a whole deployment with default settings, as `antefix up` starts it. Memory is PSS, in which pages
that processes share are divided between them. The result also has RSS, which counts shared pages for each process. A
worker's limit is 450 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from antefix.sampling import Sampling
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks import run_record
from benchmarks.role_use import use_by_role

ROOT = Path(__file__).parents[1]
# Work that continues after an answer, such as storing the answer, has ended after this time.
SETTLE_S = 5.0


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    random = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="antefix-memory-") as scratch:
        config = DeploymentConfig(model=args.model, data_dir=Path(scratch))
        async with Deployment(config) as deployment:
            started = use_by_role(deployment)
            sampling = Sampling(max_tokens=args.output, ignore_eos=True, temperature=0.0)
            for first in range(0, args.requests, args.at_once):
                many = min(args.at_once, args.requests - first)
                prompts = [random.integers(0, 256, args.tokens).astype(np.uint32) for _ in range(many)]
                async with asyncio.TaskGroup() as asked:
                    for prompt in prompts:
                        asked.create_task(_ask(deployment, prompt, sampling))
            await asyncio.sleep(SETTLE_S)
            return {
                "requests": args.requests,
                "tokens": args.tokens,
                "output": args.output,
                "compiled": importlib.util.find_spec("numba") is not None,
                "started": started,
                "idle": use_by_role(deployment),
            }


async def _ask(deployment: Deployment, prompt: Any, sampling: Sampling) -> None:
    async for _ in deployment.router.generate(prompt, sampling):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/antefix-tiny")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=400, help="of each prompt")
    parser.add_argument("--output", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    report = asyncio.run(measure(args))
    table = Table("MB, lower is better", "PSS when started", f"after {args.requests} requests", "RSS")
    for role, use in report["idle"].items():
        before = report["started"][role]["pss_mb"]
        table.add_row(role, f"{before:.0f}", f"{use['pss_mb']:.0f}", f"{use['rss_mb']:.0f}")
    Console().print(table)
    if args.out is not None:
        run_record.write(args.out, report, "torch")


if __name__ == "__main__":
    main()
