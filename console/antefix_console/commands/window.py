"""`antefix window`: shows or switches the strategy in force without a restart; compares predicted with real
restores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from antefix.clients import RouterClient, WindowClient, WindowStatus
from antefix.errors import InvalidRequest
from antefix.window import parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--router", metavar="HOST:PORT", help="ask all workers that the router at this address has")
    parser.add_argument(
        "--worker",
        metavar="HOST:PORT",
        action="append",
        default=[],
        help="ask the worker at this address; may be repeated",
    )
    parser.add_argument(
        "--strategy",
        help=(
            "window strategy that workers use from the next request on: full, periodic(TOKENS), boundary, auto or zero"
        ),
    )
    parser.add_argument("--plans", type=int, default=0, metavar="N", help="show the latest N restores of each worker")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="data directory of `antefix up`, for its secret (default: antefix-data)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    if not args.router and not args.worker:
        raise InvalidRequest("say which workers are meant: give --router HOST:PORT or --worker HOST:PORT")
    if args.strategy:
        parse(args.strategy)
    if args.plans < 0:
        raise InvalidRequest(f"--plans must not be negative, is {args.plans}")
    statuses = asyncio.run(_ask(args))
    if args.json:
        print(json.dumps({"workers": {address: dataclasses.asdict(status) for address, status in statuses.items()}}))
    else:
        _print(statuses)
    return 0


async def _ask(args: argparse.Namespace) -> dict[str, WindowStatus]:
    """If a switch is requested, it is made first, so that the answer shows the strategy in force afterwards."""
    addresses = list(args.worker)
    if args.router:
        async with RouterClient(args.router) as router:
            status = await router.status()
        addresses += [worker.address for worker in status.workers if worker.address not in addresses]
    statuses = {}
    for address in addresses:
        async with WindowClient(address) as client:
            if args.strategy:
                await client.set_strategy(args.strategy)
            statuses[address] = await client.status(num_plans_max=args.plans)
    return statuses


def _print(statuses: dict[str, WindowStatus]) -> None:
    console = Console()
    for address, status in statuses.items():
        exactness = f"bounded({status.bounded_windows})" if status.bounded_windows else "exact"
        console.print(
            f"{address}: namespace {status.namespace}, strategy {status.strategy}, {exactness},"
            f" {status.checkpoint_bytes / 1e6:.1f} MB of checkpoints",
            markup=False,
        )
        console.print(_kinds(status))
        if status.plans:
            console.print(_plans(status))


def _kinds(status: WindowStatus) -> Table:
    table = Table("plan", *_right("chosen", "predicted", "took", "mean error", "stated error"))
    for kind in status.kinds:
        if kind.num_plans:
            table.add_row(
                kind.kind,
                str(kind.num_plans),
                f"{kind.predicted_s:.3f} s",
                f"{kind.actual_s:.3f} s",
                f"{kind.mean_error:.0%}",
                f"{kind.stated_error:.0%}",
            )
    return table


def _plans(status: WindowStatus) -> Table:
    table = Table("taken", *_right("prompt", "hit", "replayed", "predicted", "took", "cold was predicted"))
    for plan in status.plans:
        cold = next((way.predicted_s for way in plan.weighed if way.kind == "cold"), 0.0)
        table.add_row(
            plan.taken.kind,
            str(plan.prompt_tokens),
            str(plan.taken.resume_tokens),
            str(plan.taken.replay_tokens),
            f"{plan.taken.predicted_s:.4f} s",
            f"{plan.actual_s:.4f} s",
            f"{cold:.4f} s",
        )
    return table


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
