"""`antefix plan`: calculates how many machines a trace needs, their cost, and which resource limits them."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from antefix.errors import InvalidRequest
from antefix_console.progress_line import ProgressLine
from antefix_console.shipped import SHIPPED
from antefix_simulate.machine import model_layers, model_sizes
from antefix_simulate.plan.demand import DAY_S, Demand, demand_of
from antefix_simulate.plan.plan_text import plan_text, plot_plans
from antefix_simulate.plan.rates import Site, StoreRates, WorkerRates, load_site, store_rates, worker_rates
from antefix_simulate.plan.sizing import ASSUMPTIONS, Goal, Plan, at_rate, size
from antefix_simulate.plot import check_path
from antefix_simulate.trace import FORMATS, format_of, load

_RESULTS = SHIPPED / "benchmarks" / "results"
_SITES = SHIPPED / "deploy" / "sites"
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PLOT_TO = 1e12
_PLOT_POINTS = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="a trace (see `antefix trace`)")
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="format of the trace (default: detected from the file's content)"
    )
    parser.add_argument(
        "--spread-s",
        type=float,
        default=3600.0,
        help="number of seconds over which the conversations of a claude-code trace begin",
    )
    parser.add_argument(
        "--model", default="v4-flash", help="model to plan for: v4-flash, v4-pro, v4.1-flash or a model directory"
    )
    parser.add_argument(
        "--gpu",
        default="h200",
        help="hardware to plan with: the name of a file in deploy/sites without .toml, or a path",
    )
    parser.add_argument("--retention", default="72h", metavar="TIME", help="how long unused KV is kept, such as 72h")
    parser.add_argument(
        "--local-retention",
        metavar="TIME",
        help="how long KV stays on local disks; after that time KV is kept in an object store",
    )
    parser.add_argument(
        "--ttft-p90",
        default="2s",
        metavar="TIME",
        help="limit of the time to first token that 90 of 100 requests must meet (default 2s)",
    )
    parser.add_argument("--tpot", metavar="TIME", help="longest time per output token (default: no limit)")
    parser.add_argument(
        "--tokens-per-day",
        type=float,
        metavar="N",
        help="tokens per day to plan for, such as 1e12 (default: the rate of the trace)",
    )
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help="file with a model's measured speed, from benchmarks.weights_on_card (default: measured on an H200)",
    )
    parser.add_argument(
        "--store-rates",
        type=Path,
        metavar="FILE",
        help="file with a store's measured speed, from `antefix bench store --json`",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot the number of machines and the cost in dollars up to 1e12 tokens per day, as .svg or .png",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Returns 0.

    Raises:  InvalidRequest, ConfigError: a file or argument is invalid, or no number of machines reaches the goal.
    """
    if args.plot:
        check_path(args.plot)
    goal = _goal(args)
    sizes = model_sizes(args.model)
    # 1. The machines that are bought, and their measured speed.
    site = load_site(_site_path(args.gpu))
    workers = worker_rates(
        args.rates or _RESULTS / "weights_on_card.json", num_layers=model_layers(args.model), card_bytes=site.card_bytes
    )
    store = store_rates(args.store_rates or _RESULTS / "store.json")
    # 2. The demand of the trace.
    if not args.trace.is_file():
        raise InvalidRequest(f"there is no trace file {args.trace}")
    with ProgressLine("reading the trace"):
        trace_format = args.format or format_of(args.trace)
        trace = load(args.trace, trace_format, block_size=sizes.block_size, spread_s=args.spread_s)
        own = demand_of(trace, retention_s=goal.retention_s)
    demand = own if args.tokens_per_day is None else at_rate(own, _tokens_per_day(args.tokens_per_day))
    # 3. The number of machines.
    plan = size(demand, sizes, workers, store, site, goal)
    sources = _sources(args, own, goal, workers, store, site)
    if args.plot:
        plans = _growth(own, plan, lambda each: size(each, sizes, workers, store, site, goal))
        plot_plans(plans, args.plot, f"{trace.name}, {args.model} on {site.card}")
    if args.json:
        print(json.dumps(plan.as_dict() | {"rests_on": [*sources, *ASSUMPTIONS]}, indent=1))
    else:
        print(plan_text(plan, sources))
    return 0


def seconds_of(text: str, flag: str) -> float:
    """Seconds of a duration such as 72h, 30m, 2s, 7d or 2. Raises:  InvalidRequest: the text is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text.strip())
    if found is None or not 0 < float(found[1]) < 1e9:
        raise InvalidRequest(f"{flag} must be a time such as 2s, 30m, 72h or 7d, is {text!r}")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def _goal(args: argparse.Namespace) -> Goal:
    retention_s = seconds_of(args.retention, "--retention")
    local = args.local_retention
    return Goal(
        retention_s=retention_s,
        ttft_p90_s=seconds_of(args.ttft_p90, "--ttft-p90"),
        tpot_s=None if args.tpot is None else seconds_of(args.tpot, "--tpot"),
        local_s=None if local is None else min(retention_s, seconds_of(local, "--local-retention")),
    )


def _site_path(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".toml":
        return path
    known = sorted(each.stem for each in _SITES.glob("*.toml"))
    if name not in known:
        raise InvalidRequest(
            f"--gpu {name!r} is none of {', '.join(known)}, nor a .toml file: copy a file from deploy/sites"
        )
    return _SITES / f"{name}.toml"


def _tokens_per_day(value: float) -> float:
    if not (math.isfinite(value) and 1 <= value <= 1e15):
        raise InvalidRequest(f"--tokens-per-day must be from 1 to 1e15, is {value}")
    return value


def _sources(
    args: argparse.Namespace, own: Demand, goal: Goal, workers: WorkerRates, store: StoreRates, site: Site
) -> list[str]:
    found = [
        f"prefill {workers.prefill_tokens_per_s:,.0f} tokens/s and decode steps: {workers.source}",
        f"one disk {store.read_bytes_per_s / 1e9:.2f} GB/s read, {store.write_bytes_per_s / 1e9:.2f} written, "
        f"{store.remote_bytes_per_s / 1e9:.2f} over the network: {store.source}",
        f"{workers.cards} cards per worker for {workers.weights_bytes / 2**30:.1f} GiB of weights",
        f"prices: {site.source}",
    ]
    if site.card not in workers.source:
        found.append(f"speeds are not of {site.card}: give --rates measured there")
    if own.span_s < goal.retention_s:
        found.append(
            f"the trace is {own.span_s / 3600:.1f} h long: what is used again after longer is not in it, so the hit"
            " rate is a lower bound"
        )
    return found


def _growth(own: Demand, plan: Plan, sized: Callable[[Demand], Plan]) -> list[Plan]:
    start = (own.prompt_tokens_per_s + own.output_tokens_per_s) * DAY_S
    end = max(_PLOT_TO, plan.tokens_per_day)
    points = [start * (end / start) ** (index / (_PLOT_POINTS - 1)) for index in range(_PLOT_POINTS)]
    return [sized(at_rate(own, point)) for point in points]
