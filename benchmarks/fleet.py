"""How large a fleet can the simulator handle? Measures time and memory for 1,000 workers and 100 million blocks.

    python benchmarks/fleet.py --workers 1000 --blocks 100_000_000 --json benchmarks/results/fleet.json

The benchmark generates about three questions on each of many documents of 200,000 tokens. The workers share a store,
and least_work places the requests with the router's own directory. The simulation works in units of 2,048 tokens, which
are 16 blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from antefix.window import parse
from antefix_console.commands.simulate_cluster import copies
from antefix_simulate.cluster import Fleet, simulate_cluster
from antefix_simulate.generated_traces import SHAPES, generate
from antefix_simulate.machine import model_sizes
from benchmarks.run_record import write

UNIT_TOKENS = 2048
DOCUMENT_TOKENS = 200_000
# The share of the fleet's capacity that is used, if a worker prefills 18,000 tokens per second.
BUSY = 0.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=100_000_000)
    parser.add_argument("--policy", default="least_work")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    figures = measure(args)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    if args.json:
        write(args.json, figures, "numpy")
    return 0


def measure(args: argparse.Namespace) -> dict[str, float]:
    sizes = model_sizes("v4-flash")
    SHAPES["archive"] = replace(SHAPES["documents"], first_tokens=DOCUMENT_TOKENS, turns=2)
    # Each document gets 1 + 1.6 questions on average, and has this many blocks.
    num_requests = round(args.blocks * sizes.block_size / DOCUMENT_TOKENS * 2.6)
    begun = time.monotonic()
    trace = generate("archive", num_requests=num_requests, unit_tokens=UNIT_TOKENS)
    num_new = len({int(request.names[0]) for request in trace.requests if len(request.names)})
    names = 1 + max(int(request.names.max()) for request in trace.requests if len(request.names))
    span_s = trace.requests[-1].at_s
    speedup = BUSY * args.workers * 18_000 / (names * UNIT_TOKENS / span_s)
    generated_s = time.monotonic() - begun
    begun, cpu = time.monotonic(), time.process_time()
    result = simulate_cluster(
        copies(trace, 1, speedup),
        total=num_requests,
        unit_tokens=UNIT_TOKENS,
        policy=args.policy,
        strategy=parse("boundary"),
        sizes=sizes,
        fleet=Fleet(num_prefill=args.workers, num_decode=args.workers),
    )
    return {
        "workers": args.workers,
        "requests": num_requests,
        "documents": num_new,
        "blocks": names * UNIT_TOKENS // sizes.block_size,
        "generated_s": round(generated_s, 1),
        "simulated_s": round(time.monotonic() - begun, 1),
        "simulated_cpu_s": round(time.process_time() - cpu, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "token_hit_rate": round(result.token_hit_rate, 4),
        "ttft_p50_s": round(result.ttft_p50_s, 3),
        "ttft_p90_s": round(result.ttft_p90_s, 3),
        "ttft_p99_s": round(result.ttft_p99_s, 3),
        "load_max_over_mean": round(result.load_max_over_mean, 3),
        "utilisation": round(result.utilisation, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
