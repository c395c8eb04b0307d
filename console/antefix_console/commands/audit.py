"""`antefix audit`: finds out how an endpoint's prefix cache behaves, and whether the endpoint keeps its promises."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import secrets
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from antefix import __version__
from antefix.errors import InvalidRequest
from antefix_console.audit.audit import PROBES, Plan, run_audit
from antefix_console.audit.audit_report import AuditReport
from antefix_console.audit.probing import Probing
from antefix_console.audit.promises import PROVIDERS, Promises, promises_of
from antefix_console.audit.sender import Budget, Scope, Sender
from antefix_console.commands.endpoint_flags import add_endpoint_flags, endpoint_of
from antefix_console.endpoint.client import EndpointClient
from antefix_console.progress_line import ProgressLine

_EXIT_OK, _EXIT_FOUND = 0, 1
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_endpoint_flags(parser)
    parser.add_argument(
        "--provider",
        choices=sorted(PROVIDERS),
        default="any",
        help="provider whose documented cache rules the endpoint must follow (default: any)",
    )
    parser.add_argument(
        "--other-key-file",
        type=Path,
        metavar="FILE",
        help="file with a second account's key, to test whether accounts share a cache",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="length of an ordinary prompt in tokens (default 2048)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=250,
        metavar="N",
        help="number of samples per test (default 250, as in published audits; 30 for a quick look)",
    )
    parser.add_argument(
        "--probe",
        action="append",
        choices=PROBES,
        help="run only the probe with this name; may be repeated (default: all probes)",
    )
    parser.add_argument(
        "--wait",
        action="append",
        default=[],
        metavar="TIME",
        help="test whether prompts still hit after this time, such as 30s, 5m or 1h; may be repeated",
    )
    parser.add_argument(
        "--promised-lifetime",
        metavar="TIME",
        help="time to live that the cache promises, if it differs from the provider's",
    )
    parser.add_argument("--rate", type=float, default=2.0, metavar="N", help="requests per second (default 2)")
    parser.add_argument(
        "--max-requests",
        type=int,
        metavar="N",
        help="stop after this many requests (default: as many as the plan needs)",
    )
    parser.add_argument(
        "--max-total-tokens",
        type=int,
        metavar="N",
        help="stop after this many input tokens (default: as many as the plan needs)",
    )
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS", help="price per million input tokens, used to show the audit's cost"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before starting")
    parser.add_argument("--dry-run", action="store_true", help="show which requests would be sent, but send nothing")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the report to this file, as Markdown")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")


def run(args: argparse.Namespace) -> int:
    """The exit status is 1 if a promise is broken.

    Raises:  InvalidRequest: arguments make no sense, or the user did not confirm.  Unavailable: the endpoint does not
    answer.
    """
    plan = Plan(
        prompt_tokens=args.prompt_tokens,
        samples=args.samples,
        waits_s=tuple(_seconds(each) for each in args.wait),
        probes=tuple(args.probe or PROBES),
    )
    lifetime_s = _seconds(args.promised_lifetime) if args.promised_lifetime else None
    promises = promises_of(args.provider, lifetime_s=lifetime_s)
    budget = _budget(args, plan)
    print(_stated(args, plan, budget), file=sys.stderr)
    if args.dry_run:
        return _EXIT_OK
    if not args.yes and not _agreed():
        raise InvalidRequest("nothing was sent: to start without a question, give --yes")
    report = asyncio.run(_audit(args, plan, promises, budget))
    text = report.as_markdown()
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    print(json.dumps(report.as_dict(), indent=1) if args.json else text, end="\n" if args.json else "")
    return _EXIT_FOUND if report.violations else _EXIT_OK


async def _audit(args: argparse.Namespace, plan: Plan, promises: Promises, budget: Budget) -> AuditReport:
    at = datetime.datetime.now(datetime.UTC)
    sender = Sender(budget, promises)
    async with AsyncExitStack() as open_clients:
        client = await open_clients.enter_async_context(EndpointClient(endpoint_of(args)))
        model = await client.choose_model()
        other = None
        if args.other_key_file:
            second = await open_clients.enter_async_context(EndpointClient(endpoint_of(args, args.other_key_file)))
            second.model = model
            other = Scope("second account", second.ask)
        probing = Probing(
            sender=sender,
            scope=Scope("first account", client.ask),
            other_key=other,
            prompt_words=plan.prompt_tokens,
            samples=plan.samples,
            seed=secrets.token_hex(8),
        )
        with ProgressLine("auditing", lines=True) as progress:
            findings = await run_audit(probing, plan, progress.step)
    return AuditReport(
        endpoint=args.url,
        model=model,
        api=args.api,
        at=at,
        version=__version__,
        promises=promises,
        requests=sender.num_requests,
        tokens=sender.num_tokens,
        samples=plan.samples,
        dollars=None if args.price is None else args.price * sender.num_tokens / 1e6,
        findings=findings,
    )


def _budget(args: argparse.Namespace, plan: Plan) -> Budget:
    if not (math.isfinite(args.rate) and args.rate > 0):
        raise InvalidRequest("--rate must be above 0")
    for name, value in (("--max-requests", args.max_requests), ("--max-total-tokens", args.max_total_tokens)):
        if value is not None and value < 1:
            raise InvalidRequest(f"{name} must be 1 or more")
    # A fifth more than planned, because refused requests are sent again.
    return Budget(
        requests=args.max_requests or plan.num_requests * 6 // 5,
        tokens=args.max_total_tokens or plan.num_tokens * 6 // 5,
        per_s=args.rate,
    )


def _stated(args: argparse.Namespace, plan: Plan, budget: Budget) -> str:
    cost = "" if args.price is None else f", {args.price * plan.num_tokens / 1e6:.2f} dollars without discounts"
    seconds = plan.num_requests / budget.per_s + max(plan.waits_s, default=0.0)
    by_probe = ", ".join(f"{name} {number}" for name, number in plan.requests().items())
    return (
        f"This audit sends about {plan.num_requests} requests ({by_probe})\n"
        f"with {plan.num_tokens:,} tokens{cost}, to {args.url}; it takes {seconds / 60:.0f} minutes or more.\n"
        f"It stops after {budget.requests} requests or {budget.tokens:,} tokens."
    )


def _agreed() -> bool:
    return sys.stdin.isatty() and input("Start? [y/N] ").strip().lower() in ("y", "yes")


def _seconds(text: str) -> float:
    """Seconds of a duration such as 30s, 5m or 1.5h; a number without a unit is seconds."""
    number, unit = (text[:-1], _UNITS[text[-1]]) if text and text[-1] in _UNITS else (text, 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 0 <= value <= 86_400 * 7):
        raise InvalidRequest(f"{text!r} is not a valid time: write a time such as 30s, 5m or 1h, up to a week")
    return value
