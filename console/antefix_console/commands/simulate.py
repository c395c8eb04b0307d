"""`antefix simulate`: replays traces through the real strategies, planner and eviction, on a model of a machine."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from antefix.byte_size import parse_byte_size
from antefix.errors import InvalidRequest
from antefix.window import Strategy, parse
from antefix_console.commands import simulate_cluster as cluster_cli
from antefix_console.progress_line import ProgressLine
from antefix_simulate.breakeven import break_even, break_even_text
from antefix_simulate.breakeven_plot import plot_break_even
from antefix_simulate.generated_traces import SHAPES, generate
from antefix_simulate.machine import RATE_CARDS, Machine, TokenPrices, model_sizes
from antefix_simulate.plot import check_path, plot
from antefix_simulate.replay_result import Simulation
from antefix_simulate.result_table import LEGEND, as_text
from antefix_simulate.savings import Savings, savings_of, savings_text
from antefix_simulate.savings_plot import plot_savings
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import FORMATS, Trace, format_of, load
from antefix_simulate.trace_replay import ReplaySetup, ideal_hit_tokens, simulate, store_hit_tokens

# The strategies that `--strategy all` compares: every kind, and a short and a long period of periodic checkpoints.
ALL_STRATEGIES = ("auto", "boundary", "periodic(2048)", "periodic(8192)", "full", "zero")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `simulate` command to an argparse subparsers object; `run` runs it."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "simulate",
        help="compare window-state strategies on a recorded or generated request trace",
        description="Replay a trace through the real window strategies, restore planner and eviction policy, under a "
        "cost model of a machine. No model runs and nothing is stored.",
    )
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `simulate`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="a trace file, plain or .gz (see `antefix trace`)")
    source.add_argument("--generate", choices=sorted(SHAPES), help="use a generated trace instead of a file")
    source.add_argument(
        "--break-even",
        action="store_true",
        help="print the best strategy for each prefix length, disk speed and reuse age",
    )
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="format of the trace file (default: detected from the file's content)"
    )
    parser.add_argument(
        "--strategy",
        action="append",
        metavar="NAME",
        help=(
            "window strategy to simulate: full, periodic(TOKENS), boundary, auto, auto(budget=SIZE, "
            "ends=disk|pool), zero, or all (default: all; may be repeated)"
        ),
    )
    parser.add_argument(
        "--store-bytes",
        action="append",
        metavar="SIZE",
        help="size limit of the store, such as 64GB (default: no limit; may be repeated, to simulate each size)",
    )
    parser.add_argument("--pool-bytes", metavar="SIZE", help="size limit of the window pool (default: no limit)")
    parser.add_argument(
        "--no-replay", action="store_true", help="do not recompute window state; resume only at stored checkpoints"
    )
    parser.add_argument(
        "--model", default="v4-flash", help="model to simulate: v4-flash, v4-pro, v4.1-flash or a model directory"
    )
    machine = Machine()
    _add_number(parser, "--prefill-tokens-per-s", machine.prefill_tokens_per_s, "prefill speed without context")
    _add_number(parser, "--disk-gb-per-s", machine.disk_bytes_per_s / 1e9, "read speed of the store")
    _add_number(parser, "--pool-gb-per-s", machine.pool_bytes_per_s / 1e9, "read speed of the window pool")
    _add_number(parser, "--peer-gb-per-s", machine.peer_bytes_per_s / 1e9, "read speed of another host's store")
    _add_number(parser, "--object-gb-per-s", machine.object_bytes_per_s / 1e9, "read speed of the object tier")
    _add_number(parser, "--hit-price", None, "dollars per million hit tokens (default: the model's rate card)")
    _add_number(parser, "--miss-price", None, "dollars per million other input tokens (default: the same)")
    _add_number(parser, "--output-price", None, "dollars per million output tokens (default: the same)")
    _add_number(parser, "--spread-s", 3600.0, "seconds over which a claude-code trace's conversations start")
    parser.add_argument(
        "--requests", type=int, default=2000, help="number of requests of a generated trace (default 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of a generated trace (default 0)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also write a plot, as .svg or .png; needs matplotlib"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    cluster_cli.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the parsed command; results go to standard output, progress to standard error. Returns the exit status.

    Raises:  InvalidRequest, ConfigError: the arguments or the trace are invalid.
    """
    if args.plot:
        check_path(args.plot)
    sizes, machine = model_sizes(args.model), _machine(args)
    if args.break_even:
        rows = break_even(sizes, machine)
        _emit(json.dumps([row.as_dict() for row in rows], indent=1) if args.json else break_even_text(rows))
        if args.plot:
            plot_break_even(rows, args.plot)
        return 0
    if args.workers:
        unit_tokens = cluster_cli.unit_tokens(args, sizes)
        return cluster_cli.run(args, _trace(args, unit_tokens), sizes, machine, _card(args))
    # 1. The trace, the model and the machine.
    trace = _trace(args, sizes.block_size)
    own = trace if args.generate else _trace(args, 1)
    setup = ReplaySetup(sizes=sizes, machine=machine, card=_card(args), limits=StoreLimits(), replay=not args.no_replay)
    strategies = _strategies(args.strategy or ["all"])
    # 2. Replay for each store size and each strategy.
    pool_bytes = parse_byte_size(args.pool_bytes) if args.pool_bytes else None
    simulations = []
    for text in args.store_bytes or [None]:
        limits = StoreLimits(store_bytes=parse_byte_size(text) if text else None, pool_bytes=pool_bytes)
        simulation = _compare(trace, strategies, replace(setup, limits=limits), args.model)
        simulations.append(replace(simulation, savings=_savings(simulation, trace, own, setup.card)))
    # 3. Print the results.
    if args.json:
        shown = [simulation.as_dict() for simulation in simulations]
        _emit(json.dumps(shown[0] if len(shown) == 1 else shown, indent=1))
    else:
        # The most important figures are printed last, where they stay visible in a terminal.
        saved = [savings_text(simulation.savings) for simulation in simulations[:1] if simulation.savings]
        _emit("\n\n".join([*map(as_text, simulations), LEGEND, *saved]))
    if args.plot and len(simulations) == len(strategies) == 1 and simulations[0].savings:
        plot_savings(simulations[0].savings, own, args.plot, model=args.model)
    elif args.plot:
        plot(simulations, args.plot)
    return 0


def _compare(trace: Trace, strategies: Sequence[Strategy], setup: ReplaySetup, model: str) -> Simulation:
    results = []
    for strategy in strategies:
        with ProgressLine(f"{strategy}: requests") as progress:
            results.append(simulate(trace, strategy, setup, progress.count))
    return Simulation(
        trace=trace.name,
        num_requests=len(trace.requests),
        prompt_tokens=trace.num_tokens,
        unit_tokens=trace.unit_tokens,
        model=model,
        store_bytes=setup.limits.store_bytes,
        store_ideal_token_hit_rate=store_hit_tokens(trace, setup) / max(trace.num_tokens, 1),
        results=tuple(results),
    )


def _savings(simulation: Simulation, trace: Trace, own: Trace, prices: TokenPrices) -> Savings:
    """The savings under the strategy `auto`, which services use, or else under the first strategy that was
    requested.
    """
    results = {result.strategy: result for result in simulation.results}
    result = results.get("auto", simulation.results[0])
    return savings_of(
        trace,
        own,
        own_hit_tokens=ideal_hit_tokens(own),
        hit_rate=result.work_hit_rate,
        strategy=result.strategy,
        prices=prices,
    )


def _trace(args: argparse.Namespace, unit_tokens: int) -> Trace:
    if args.generate:
        return generate(args.generate, num_requests=args.requests, unit_tokens=unit_tokens, seed=args.seed)
    if not args.trace.is_file():
        raise InvalidRequest(f"there is no trace file {args.trace}")
    if not math.isfinite(args.spread_s) or args.spread_s < 0:
        raise InvalidRequest(f"--spread-s must be a number of seconds, is {args.spread_s}")
    trace_format = args.format or format_of(args.trace)
    return load(args.trace, trace_format, block_size=unit_tokens, spread_s=args.spread_s)


def _strategies(texts: Sequence[str]) -> list[Strategy]:
    names = [name for text in texts for name in (ALL_STRATEGIES if text == "all" else (text,))]
    return [parse(name) for name in dict.fromkeys(names)]


def _machine(args: argparse.Namespace) -> Machine:
    return Machine(
        prefill_tokens_per_s=args.prefill_tokens_per_s,
        disk_bytes_per_s=args.disk_gb_per_s * 1e9,
        pool_bytes_per_s=args.pool_gb_per_s * 1e9,
        peer_bytes_per_s=args.peer_gb_per_s * 1e9,
        object_bytes_per_s=args.object_gb_per_s * 1e9,
    )


def _card(args: argparse.Namespace) -> TokenPrices:
    card = RATE_CARDS.get(args.model, RATE_CARDS["v4-flash"])
    hit, miss, output = args.hit_price, args.miss_price, args.output_price
    return TokenPrices(
        hit=card.hit if hit is None else hit,
        miss=card.miss if miss is None else miss,
        output=card.output if output is None else output,
    )


def _add_number(parser: argparse.ArgumentParser, flag: str, default: float | None, text: str) -> None:
    shown = "" if default is None else f" (default {default:g})"
    parser.add_argument(flag, type=float, default=default, metavar="N", help=text + shown)


def _emit(text: str) -> None:
    sys.stdout.write(text + "\n")
