"""How much do several stores and an object tier help a rack and a fleet? Simulates the real traces.

    python -m benchmarks.simulate_stores --json benchmarks/results/simulate_stores.json

A rack has 8 prefill workers and 8 stores, one per host; a fleet has 64 of each and gets eight copies of the trace, each
with prompts of its own. Every scene is run with

one store     one store that all hosts share, as large as all stores together, which gives the result of perfect sharing
stores alone  one store per host, without an object tier
object tier   the same stores with an object tier behind them

A trace covers an hour, not the weeks that stores hold, so memory and stores are small as well (`--memory`,
`--store-bytes`). The benchmark is about blocks that are evicted and then requested again. Each row's `flags` has the
flags with which `antefix simulate` gives the same result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from antefix.byte_size import parse_byte_size
from antefix.window import parse
from antefix_console.commands.simulate_cluster import copies
from antefix_simulate.cluster import Fleet, simulate_cluster
from antefix_simulate.machine import model_sizes
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import Trace
from benchmarks.policies import COPIED_REQUESTS, SPEEDUPS, traces
from benchmarks.run_record import write

SCENES: Final = {"rack": 8, "fleet": 64}
SET_UPS: Final = ("one store", "stores alone", "object tier")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", nargs="+", default=["chat", "agents"], choices=("chat", "agents"))
    parser.add_argument("--scene", nargs="+", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--set-up", nargs="+", default=list(SET_UPS), choices=SET_UPS)
    parser.add_argument("--memory", default="4G", help="memory for KV per worker")
    parser.add_argument("--store-bytes", default="8G", help="per store")
    parser.add_argument("--object-bytes", default="4T")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep the results in the file that belong to other traces, scenes and set-ups",
    )
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.add and args.json and args.json.exists():
        rows = [row for row in json.loads(args.json.read_text())["rows"] if not _is_asked_for(args, row)]
    for name, trace in traces().items():
        for scene in [each for each in args.scene if name in args.trace]:
            for set_up in args.set_up:
                begun = time.process_time()
                rows.append({"trace": name, "scene": scene, "set_up": set_up, **run(args, name, trace, scene, set_up)})
                sys.stderr.write(f"{name}, {scene}, {set_up}: {time.process_time() - begun:.0f} s\n")
                if args.json:
                    write(args.json, {"rows": sorted(rows, key=_place_of)}, "numpy")
    return 0


def _is_asked_for(args: argparse.Namespace, row: dict[str, Any]) -> bool:
    return row["trace"] in args.trace and row["scene"] in args.scene and row["set_up"] in args.set_up


def _place_of(row: dict[str, Any]) -> tuple[bool, bool, int]:
    """The sort key of a row in the table: chat before agents, racks before fleets."""
    return row["trace"] == "agents", row["scene"] == "fleet", SET_UPS.index(row["set_up"])


def run(args: argparse.Namespace, name: str, trace: Trace, scene: str, set_up: str) -> dict[str, Any]:
    workers = SCENES[scene]
    num_copies, speedup = workers // 8, SPEEDUPS[name, True]
    if num_copies > 1 and name in COPIED_REQUESTS:
        trace = replace(trace, requests=trace.requests[: COPIED_REQUESTS[name]])
    num_stores = 1 if set_up == "one store" else workers
    store_bytes = parse_byte_size(args.store_bytes) * (workers // num_stores)
    object_bytes = parse_byte_size(args.object_bytes) if set_up == "object tier" else 0
    fleet = Fleet(
        num_prefill=workers,
        num_decode=workers,
        num_stores=num_stores,
        store=StoreLimits(store_bytes=store_bytes),
        copies_bytes=store_bytes // 4,
        object_bytes=object_bytes,
        memory_bytes=parse_byte_size(args.memory),
    )
    result = simulate_cluster(
        copies(trace, num_copies, speedup),
        total=len(trace.requests) * num_copies,
        unit_tokens=trace.unit_tokens,
        policy="least_work",
        strategy=parse("auto"),
        sizes=model_sizes("v4-flash"),
        fleet=fleet,
    )
    flags = (
        f"--workers {workers}:{workers} --stores {num_stores} --store-bytes {store_bytes} --worker-memory {args.memory}"
        f" --copies-bytes {store_bytes // 4} --object-store {object_bytes} --copies {num_copies} --speedup {speedup}"
        " --policy least_work"
    )
    return {"flags": flags, "requests": len(trace.requests) * num_copies, **asdict(result)} | {
        "object_dollars": result.object_bill.dollars
    }


if __name__ == "__main__":
    raise SystemExit(main())
