"""`antefix simulate --workers P:D`: compares placement policies on a simulated fleet. Flags, trace copies, table,
plot.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from antefix.byte_size import parse_byte_size
from antefix.errors import InvalidRequest
from antefix.whole_number import whole_number
from antefix.window import Sizes, Strategy, parse
from antefix_console.progress_line import ProgressLine
from antefix_simulate.baselines import ALL_POLICIES
from antefix_simulate.cluster import EngineHits, Fleet, simulate_cluster
from antefix_simulate.cluster_result import ClusterSimulation, PolicyResult, cluster_text
from antefix_simulate.machine import Machine, TokenPrices
from antefix_simulate.plot import SUFFIXES, load_pyplot
from antefix_simulate.simulated_objects import ObjectPrices
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import Trace, TraceRequest

WORKERS_MAX = 1000
UNIT_TOKENS = 512
# The names of one copy of a trace are below this number; a Claude Code trace numbers its conversations from 2^32 on.
_COPY_NAMES = 1 << 50
# Copies start within this time of each other. Each copy stands for other users at the same time of day.
_COPY_SHIFT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags for a fleet."""
    fleet = parser.add_argument_group("a fleet", "many workers under a placement policy, with queues; needs --workers")
    fleet.add_argument(
        "--workers",
        metavar="P:D",
        help=f"number of prefill and decode workers, up to {WORKERS_MAX} each (one number N with --engines)",
    )
    fleet.add_argument(
        "--engines",
        choices=[each.value for each in EngineHits],
        help=(
            "workers of other engines, without a store: full resumes after any block in memory, window only where "
            "the strategy left window state"
        ),
    )
    fleet.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"placement policy to simulate: {', '.join(ALL_POLICIES)}, or all (default: all; may be repeated)",
    )
    _add_store_arguments(fleet)
    fleet.add_argument(
        "--no-coalesce",
        action="store_true",
        help="allow two running requests to compute the same prefix at the same time",
    )
    fleet.add_argument(
        "--worker-memory", default="64GB", metavar="SIZE", help="memory for KV of each prefill worker (default: 64GB)"
    )
    fleet.add_argument("--unit-tokens", type=int, default=UNIT_TOKENS, metavar="N", help="resolution (default 512)")
    fleet.add_argument(
        "--copies",
        type=int,
        default=1,
        metavar="N",
        help="number of copies of the trace that run at once, each with prompts of its own",
    )
    fleet.add_argument("--speedup", type=float, default=1.0, metavar="N", help="factor by which the trace runs faster")
    fleet.add_argument(
        "--kill",
        action="append",
        metavar="S[:BACK]",
        help="stop a prefill worker at second S, and start it again at second BACK",
    )
    fleet.add_argument("--join", action="append", type=float, metavar="S", help="one more prefill worker joins")
    fleet.add_argument(
        "--ttft-limit",
        type=float,
        default=2.0,
        metavar="S",
        help="a request counts as good up to this many seconds to the first token (default 2)",
    )


def _add_store_arguments(fleet: argparse._ArgumentGroup) -> None:
    fleet.add_argument(
        "--stores",
        type=int,
        default=1,
        metavar="N",
        help="number of stores, one per host, of --store-bytes each; the workers are distributed over them in turn",
    )
    fleet.add_argument(
        "--copies-bytes",
        default="64GB",
        metavar="SIZE",
        help="most bytes that each store uses for copies of other stores' popular records (default: 64GB)",
    )
    fleet.add_argument(
        "--object-store",
        default="0",
        metavar="SIZE",
        help="size of an object store behind the stores (default: no object store)",
    )
    fleet.add_argument(
        "--object-prices",
        default="",
        metavar="NAME=DOLLARS,...",
        help="the object store's prices: put and get per 1,000 requests (lists cost as puts), month per GB stored, read"
        " per GB read (default: those of S3 Standard, put=0.005,get=0.0004,month=0.023,read=0)",
    )
    fleet.add_argument(
        "--no-store", action="store_true", help="simulate without a shared store: each worker has only its own memory"
    )


def unit_tokens(args: argparse.Namespace, sizes: Sizes) -> int:
    """The requested resolution in tokens.

    Raises:  InvalidRequest: it is not a multiple of the block size.
    """
    tokens = int(args.unit_tokens)
    if tokens < 1 or tokens % sizes.block_size:
        raise InvalidRequest(
            f"--unit-tokens must be a multiple of the block size of {sizes.block_size} tokens, is {tokens}"
        )
    return tokens


def run(args: argparse.Namespace, trace: Trace, sizes: Sizes, machine: Machine, prices: TokenPrices) -> int:
    """Run the parsed command. Returns the exit status.

    Raises:  InvalidRequest: the arguments are invalid.
    """
    num_prefill, num_decode = _engines(args) if args.engines else _workers(args.workers)
    if args.copies < 1 or args.speedup <= 0:
        raise InvalidRequest("--copies and --speedup must be positive")
    strategies = [parse(name) for name in args.strategy or ["auto"] if name != "all"]
    if len(strategies) != 1:
        raise InvalidRequest("a fleet is simulated with one --strategy (default auto)")
    store_bytes = [parse_byte_size(text) for text in args.store_bytes or []]
    if len(store_bytes) > 1:
        raise InvalidRequest("a fleet is simulated with one --store-bytes")
    if args.stores < 1 or (args.stores > 1 and (args.no_store or args.engines)):
        raise InvalidRequest("--stores must be at least 1, and cannot be used with --no-store or --engines")
    object_bytes = parse_byte_size(args.object_store)
    if object_bytes and (args.no_store or args.engines):
        raise InvalidRequest("--object-store cannot be used with --no-store or --engines")
    fleet = Fleet(
        num_stores=args.stores,
        copies_bytes=parse_byte_size(args.copies_bytes),
        object_bytes=object_bytes,
        object_prices=ObjectPrices.parse(args.object_prices),
        prices=prices,
        num_prefill=num_prefill,
        num_decode=num_decode,
        machine=machine,
        shared_store=not args.no_store and not args.engines,
        engines=EngineHits(args.engines) if args.engines else None,
        store=StoreLimits(
            store_bytes=store_bytes[0] if store_bytes else None,
            pool_bytes=parse_byte_size(args.pool_bytes) if args.pool_bytes else None,
        ),
        memory_bytes=parse_byte_size(args.worker_memory),
        coalesce=not args.no_coalesce,
        kills=tuple(_kill(text) for text in args.kill or ()),
        joins=tuple(args.join or ()),
        ttft_limit_s=args.ttft_limit,
    )
    if len(fleet.kills) >= num_prefill + len(fleet.joins):
        raise InvalidRequest("--kill leaves no prefill worker")
    results = []
    for name in _policies(args.policy or ["all"]):
        results.append(_simulate(name, args, trace, sizes, fleet, strategies[0]))
    simulation = ClusterSimulation(
        trace=trace.name,
        num_requests=len(trace.requests) * args.copies,
        prompt_tokens=trace.num_tokens * args.copies,
        unit_tokens=trace.unit_tokens,
        num_prefill=num_prefill,
        num_decode=num_decode,
        shared_store=fleet.shared_store,
        num_stores=fleet.num_stores,
        object_bytes=fleet.object_bytes,
        engines=args.engines or "",
        results=tuple(results),
    )
    sys.stdout.write((json.dumps(simulation.as_dict(), indent=1) if args.json else cluster_text(simulation)) + "\n")
    if args.plot:
        plot_cluster(simulation, args.plot)
    return 0


def copies(trace: Trace, num_copies: int, speedup: float) -> Iterator[tuple[TraceRequest, int]]:
    """The requests of all copies of the trace in order of arrival, each with the number that its copy adds to names."""
    rng = random.Random(0)
    shifts = [0.0, *(rng.uniform(0, _COPY_SHIFT_S) for _ in range(num_copies - 1))]
    order = sorted(
        (request.at_s / speedup + shift, copy, index)
        for copy, shift in enumerate(shifts)
        for index, request in enumerate(trace.requests)
    )
    for at_s, copy, index in order:
        yield replace(trace.requests[index], at_s=at_s), copy * _COPY_NAMES


def plot_cluster(simulation: ClusterSimulation, path: Path) -> None:
    """Plot times to first token and balance, one bar per policy, to an .svg or .png file.

    Raises:  InvalidRequest: matplotlib is not installed, or the file has another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidRequest(f"cannot plot to {path.name}: use one of {', '.join(SUFFIXES)}")
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.5), layout="constrained", sharey=True)
    try:
        names = [result.policy for result in simulation.results]
        for shift, (label, share) in enumerate((("p99", "ttft_p99_s"), ("p90", "ttft_p90_s"), ("p50", "ttft_p50_s"))):
            values = [getattr(result, share) for result in simulation.results]
            axes[0].barh(names, values, label=label, color=("tab:gray", "tab:orange", "tab:blue")[shift])
        axes[0].set_xlabel("time to first token, s")
        axes[0].set_xscale("log")
        axes[0].legend()
        axes[1].barh(names, [100 * result.token_hit_rate for result in simulation.results], label="not run again")
        axes[1].barh(
            names, [100 * result.fetched_share for result in simulation.results], label="loaded from the store"
        )
        axes[1].set_xlabel("prompt tokens, %")
        axes[1].legend()
        axes[2].barh(names, [result.load_max_over_mean for result in simulation.results])
        axes[2].set_xlabel("busiest prefill worker over mean")
        axes[0].invert_yaxis()
        figure.suptitle(f"{simulation.trace}: {simulation.num_prefill} prefill, {simulation.num_decode} decode workers")
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def _simulate(
    name: str, args: argparse.Namespace, trace: Trace, sizes: Sizes, fleet: Fleet, strategy: Strategy
) -> PolicyResult:
    with ProgressLine(f"{name}: requests") as progress:
        return simulate_cluster(
            copies(trace, args.copies, args.speedup),
            total=len(trace.requests) * args.copies,
            unit_tokens=trace.unit_tokens,
            policy=name,
            strategy=strategy,
            sizes=sizes,
            fleet=fleet,
            progress=progress.count,
        )


def _policies(names: list[str]) -> list[str]:
    wanted = list(dict.fromkeys(each for name in names for each in (ALL_POLICIES if name == "all" else (name,))))
    if unknown := [name for name in wanted if name not in ALL_POLICIES]:
        raise InvalidRequest(f"unknown policy {unknown[0]!r}: use one of {', '.join(ALL_POLICIES)} or all")
    return wanted


def _workers(text: str) -> tuple[int, int]:
    numbers = [whole_number(part, WORKERS_MAX) or 0 for part in text.split(":")]
    if len(numbers) != 2 or not all(numbers):
        raise InvalidRequest(
            f"--workers must be P:D, prefill and decode workers, 1 to {WORKERS_MAX} each: {text!r} is not"
        )
    return numbers[0], numbers[1]


def _engines(args: argparse.Namespace) -> tuple[int, int]:
    """Numbers of workers in a fleet where each engine does both prefill and decode."""
    text: str = args.workers
    if not (number := whole_number(text, WORKERS_MAX)):
        raise InvalidRequest(f"--workers of --engines must be a number from 1 to {WORKERS_MAX}, is {text!r}")
    if args.store_bytes or args.pool_bytes:
        raise InvalidRequest("with --engines there is no store to simulate: leave --store-bytes and --pool-bytes out")
    return number, number


def _kill(text: str) -> tuple[float, float]:
    try:
        at_s, _, back_s = text.partition(":")
        kill = (float(at_s), float(back_s or 0))
    except ValueError as err:
        raise InvalidRequest(f"--kill must be SECOND or SECOND:SECOND, is {text!r}") from err
    if kill[0] < 0 or (kill[1] and kill[1] <= kill[0]):
        raise InvalidRequest(
            f"--kill {text}: the second at which a worker comes back must be after the second at which it dies"
        )
    return kill
