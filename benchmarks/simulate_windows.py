"""What hit rate does each window strategy give on real traces, and at what cost, by store size?

    python benchmarks/simulate_windows.py --traces ../shared/traces --out /tmp/windows --stores endless \
        --json benchmarks/results/simulate_windows.json
    python benchmarks/simulate_windows.py --traces ../shared/traces --out /tmp/windows --stores limited \
        --json benchmarks/results/simulate_windows_limited.json

Replays the agent, chat and document traces through the real strategies, planner and eviction (package `simulate`), with
an endless store and with bounded ones, and without replay. Writes JSON and SVGs for each trace; --json writes the
record of docs/results/window_state.md, break-even included. Two processes need about ten minutes,
one of them for endless stores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from antefix.window import parse
from antefix_simulate.breakeven import BreakEven, break_even, break_even_text
from antefix_simulate.machine import RATE_CARDS, Machine, model_sizes
from antefix_simulate.plot import plot
from antefix_simulate.replay_result import Simulation
from antefix_simulate.result_table import as_text
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import load
from antefix_simulate.trace_replay import ReplaySetup, simulate, store_hit_tokens
from benchmarks import run_record

# What the record keeps of each strategy.
KEPT = (
    "token_hit_rate",
    "ideal_token_hit_rate",
    "share_of_ideal",
    "work_share_of_ideal",
    "checkpoints_per_request",
    "bytes_kept_max",
    "bytes_written",
    "recomputed_tokens",
    "ttft_p50_s",
    "ttft_p90_s",
    "dollars",
)
# The points of the break-even table whose times and bytes the record keeps.
SHOWN_PREFIXES, SHOWN_DISK, SHOWN_AGES = (4_096, 16_384, 65_536), 1.5e9, (60.0, 6 * 3600.0)
STRATEGIES = ("auto", "boundary", "periodic(2048)", "periodic(8192)", "full", "zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A trace and bounded store sizes for it, from a tenth of the bytes that it writes up to nearly all."""

    label: str
    file: str
    trace_format: str
    store_gb: tuple[int, ...]


SOURCES = (
    Source(label="agents", file="claude_code_80.jsonl.gz", trace_format="claude-code", store_gb=(8, 16, 32, 64)),
    Source(label="chat", file="mooncake_conversation.jsonl.gz", trace_format="mooncake", store_gb=(32, 64, 128, 256)),
    Source(label="documents", file="mooncake_synthetic.jsonl.gz", trace_format="mooncake", store_gb=(8, 16, 32, 64)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    source: Source
    directory: Path
    store_bytes: int | None
    replay: bool
    model: str


def carry_out(job: Job) -> Simulation:
    """Simulate one trace with one store size under all strategies."""
    sizes = model_sizes(job.model)
    trace = load(job.directory / job.source.file, job.source.trace_format, block_size=sizes.block_size)
    setup = ReplaySetup(
        sizes=sizes,
        machine=Machine(),
        card=RATE_CARDS[job.model],
        limits=StoreLimits(store_bytes=job.store_bytes),
        replay=job.replay,
    )
    return Simulation(
        trace=job.source.label if job.replay else f"{job.source.label}, no replay",
        num_requests=len(trace.requests),
        prompt_tokens=trace.num_tokens,
        unit_tokens=trace.unit_tokens,
        model=job.model,
        store_bytes=job.store_bytes,
        store_ideal_token_hit_rate=store_hit_tokens(trace, setup) / trace.num_tokens,
        results=tuple(simulate(trace, parse(name), setup) for name in STRATEGIES),
    )


def jobs(directory: Path, *, model: str, stores: Sequence[str], traces: Sequence[str]) -> list[Job]:
    found = [source for source in SOURCES if source.label in traces and (directory / source.file).is_file()]
    endless = [
        Job(source=source, directory=directory, store_bytes=None, replay=replay, model=model)
        for source in found
        for replay in (True, False)
    ]
    bounded = [
        Job(source=source, directory=directory, store_bytes=size * 10**9, replay=True, model=model)
        for source in found
        for size in source.store_gb
    ]
    return [*(endless if "endless" in stores else ()), *(bounded if "limited" in stores else ())]


def write(simulations: Sequence[Simulation], out: Path, label: str) -> None:
    """Write one JSON file with all results, a plot of the endless store, and a plot over the store sizes."""
    (out / f"{label}.json").write_text(json.dumps([s.as_dict() for s in simulations], indent=1))
    replayed = [s for s in simulations if "no replay" not in s.trace]
    if endless := [s for s in replayed if s.store_bytes is None]:
        plot(endless, out / f"{label}_endless.svg")
    bounded = [s for s in replayed if s.store_bytes is not None]
    if len(bounded) > 1:
        plot(bounded, out / f"{label}_stores.svg")


def recorded(simulation: Simulation) -> dict[str, object]:
    found = simulation.as_dict()
    found["strategies"] = {name: {key: result[key] for key in KEPT} for name, result in found["strategies"].items()}
    return found


def point(row: BreakEven) -> dict[str, object]:
    """A row of the break-even table, with the strategies' figures only where the record keeps them."""
    found = row.as_dict()
    if row.prefix_tokens not in SHOWN_PREFIXES or row.disk_bytes_per_s != SHOWN_DISK or row.age_s not in SHOWN_AGES:
        del found["outcomes"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="directory of the trace files")
    parser.add_argument("--out", type=Path, required=True, help="directory for JSON and plots")
    parser.add_argument(
        "--model",
        default="v4-flash",
        choices=sorted(RATE_CARDS),
        help="model whose KV sizes and compute costs are used",
    )
    labels = [source.label for source in SOURCES]
    parser.add_argument("--trace", nargs="+", choices=labels, default=labels, help="traces to simulate")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument(
        "--stores", nargs="+", choices=("endless", "limited"), default=("endless", "limited"), help="sizes to simulate"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    todo = jobs(args.traces, model=args.model, stores=args.stores, traces=args.trace)
    if not todo:
        sys.stderr.write(f"no trace found in {args.traces}\n")
        return 2
    done: list[tuple[Job, Simulation]] = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for job, simulation in zip(todo, pool.map(carry_out, todo), strict=True):
            done.append((job, simulation))
            print(as_text(simulation), end="\n\n", flush=True)
    for label in dict.fromkeys(job.source.label for job in todo):
        write([simulation for job, simulation in done if job.source.label == label], args.out, label)
    points = break_even(model_sizes(args.model), Machine())
    print(break_even_text(points))
    if args.json:
        record = {"simulations": [recorded(each) for _, each in done], "break_even": [point(row) for row in points]}
        run_record.write(args.json, record, "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
