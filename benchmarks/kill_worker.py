"""What does losing one of eight prefill workers cost? Compares five minutes that begin a minute after the loss.

    python benchmarks/kill_worker.py --json benchmarks/results/kill_worker.json

Simulates the chat trace under least_work, with and without the shared store. In one run a worker dies for good at
300 s, and in the other no worker dies. The two runs are compared over the same five minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from antefix.window import parse
from antefix_console.commands.simulate_cluster import copies
from antefix_simulate.cluster import Fleet, simulate_cluster
from antefix_simulate.cluster_result import PolicyResult
from antefix_simulate.machine import model_sizes
from antefix_simulate.trace import Trace
from benchmarks.policies import traces
from benchmarks.run_record import write

NUM_WORKERS = 8
KILL_S = 300.0
# With this speed-up the workers are about 60% busy.
SPEEDUPS = {True: 3.2, False: 2.7}


def run(trace: Trace, *, shared_store: bool, kill: bool) -> PolicyResult:
    return simulate_cluster(
        copies(trace, 1, SPEEDUPS[shared_store]),
        total=len(trace.requests),
        unit_tokens=trace.unit_tokens,
        policy="least_work",
        strategy=parse("auto"),
        sizes=model_sizes("v4-flash"),
        fleet=Fleet(
            num_prefill=NUM_WORKERS,
            num_decode=NUM_WORKERS,
            shared_store=shared_store,
            kills=((KILL_S, 0.0),) if kill else (),
            look_s=KILL_S,
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    trace = traces()["chat"]
    figures: dict[str, Any] = {}
    for shared_store in (True, False):
        for kill in (True, False):
            result = run(trace, shared_store=shared_store, kill=kill)
            name = f"{'store' if shared_store else 'no_store'}_{'killed' if kill else 'undisturbed'}"
            figures[f"{name}_hit_rate"] = result.after_hit_rate
            figures[f"{name}_ttft_p90_s"] = result.after_ttft_p90_s
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    if args.json:
        write(args.json, figures, "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
