"""Without a shared store, what does a higher hit rate cost? Sweeps a placement weight.

    python benchmarks/copy_weight.py --workers 8 64 --json benchmarks/results/copy_weight.json

The weight penalises computing blocks that another worker already holds. Each row is the policy least_work with
a different weight, or a baseline policy, over a fleet whose workers have only their own memory. Each policy runs on the
whole trace, and on its first and second half separately, so that a weight chosen on one half can be checked on the
other.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from antefix_router.placement.policy import LeastWork
from antefix_simulate.baselines import ALL_POLICIES
from antefix_simulate.cluster_result import PolicyResult
from antefix_simulate.trace import Trace
from benchmarks.policies import run, traces
from benchmarks.run_record import write

WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
BASELINES = ("lmetric", "dynamo_linear", "sglang_threshold", "rendezvous")
# Speed-ups of the trace that benchmarks/policies.py found for a moderate load without a store.
SPEEDUPS = {"chat": 2.7, "agents": 10.42}


def parts_of(trace: Trace) -> dict[str, Trace]:
    """The trace, and its two halves by number of requests. The times of each half start at 0."""
    middle = len(trace.requests) // 2
    second = trace.requests[middle:]
    later = tuple(replace(request, at_s=request.at_s - second[0].at_s) for request in second)
    return {
        "all": trace,
        "first half": replace(trace, requests=trace.requests[:middle]),
        "second half": replace(trace, requests=later),
    }


def sweep(name: str, trace: Trace, workers: int) -> dict[str, PolicyResult]:
    found = {}
    for weight in WEIGHTS:
        label = f"least_work, weight {weight:g}"
        ALL_POLICIES[label] = lambda seed, weight=weight: LeastWork(seed, compute_weight=weight)  # type: ignore[misc]
        found[label] = run(name, trace, label, workers, SPEEDUPS[name], shared_store=False)
        del ALL_POLICIES[label]
    for policy in BASELINES:
        found[policy] = run(name, trace, policy, workers, SPEEDUPS[name], shared_store=False)
    return found


def scene(name: str, part: str, requests: Trace, workers: int) -> dict[str, Any]:
    results = sweep(name, requests, workers)
    for label, result in results.items():
        sys.stdout.write(
            f"| {name}, {part}, {workers} | {label} | {result.token_hit_rate:.2%} | "
            f"{result.ttft_p50_s:.3g} | {result.ttft_p90_s:.3g} | {result.ttft_p99_s:.3g} |\n"
        )
        sys.stdout.flush()
    rows = {label: asdict(result) for label, result in results.items()}
    return {"trace": name, "part": part, "workers": workers, "policies": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--trace", nargs="*", choices=tuple(SPEEDUPS), default=list(SPEEDUPS))
    parser.add_argument("--part", nargs="*", choices=("all", "first half", "second half"), help="default: each")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name, trace in traces().items():
        if name not in args.trace:
            continue
        for part, requests in parts_of(trace).items():
            if args.part and part not in args.part:
                continue
            for workers in args.workers:
                found.append(scene(name, part, requests, workers))
    if args.json:
        write(args.json, {"scenes": found}, "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
