"""`antefix usage adjust` and `rerate`: add entries that change a bill without changing earlier entries."""

from __future__ import annotations

import argparse
import getpass
import json
import secrets
import sys
import time
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

from antefix.errors import ConfigError
from antefix_billing.adjustment import Adjustment, AdjustmentKind
from antefix_billing.adjustment_inbox import adjust
from antefix_billing.ledger_files import ledgers_of, read_billed, read_settled, source_name_of, source_of
from antefix_billing.ratecard import load_cards
from antefix_billing.rerate import rerated
from antefix_billing.usage_record import UsageRecord
from antefix_console.commands.usage_source import add_ledgers
from antefix_console.progress_line import ProgressLine

_BY_HAND = (AdjustmentKind.CREDIT, AdjustmentKind.CORRECTION, AdjustmentKind.DISPUTE)


def add_adjust_arguments(parser: argparse.ArgumentParser) -> None:
    add_ledgers(parser)
    parser.add_argument("--kind", choices=[kind.value for kind in _BY_HAND], default=AdjustmentKind.CREDIT.value)
    parser.add_argument(
        "--amount",
        required=True,
        help="amount to add to the bill, such as --amount=-1.25 for a credit",
    )
    parser.add_argument("--reason", required=True, help="reason of the adjustment, which is shown to the customer")
    parser.add_argument("--request-id", help="request that is adjusted; without a request, give --tenant")
    parser.add_argument(
        "--tenant", help="tenant whose bill is adjusted; with --request-id, needed only if two tenants used the same id"
    )
    parser.add_argument("--currency", default="", help="three letters (default: the request's)")
    _add_common(parser)
    parser.add_argument(
        "--id", default="", help="id of the adjustment; using the same id again changes nothing (default: a new id)"
    )


def add_rerate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ratecards",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="directory or file of the prices that are in force",
    )
    parser.add_argument("--model", help="rerate only this model's records")
    parser.add_argument(
        "--reason",
        default="priced again by another rate card",
        help="reason of the adjustments, which is shown to the customer",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would change, but change nothing")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", default="", help="reference for the adjustment, such as a ticket's number")
    parser.add_argument(
        "--author", default="", help="person who decided the adjustment (default: the user who runs this command)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_adjust(args: argparse.Namespace) -> int:
    """Raises:  ConfigError: no such request, or an invalid amount."""
    kind, amount = AdjustmentKind(args.kind), _amount(args.amount)
    if kind is not AdjustmentKind.CORRECTION and amount >= 0:
        raise ConfigError(f"a {kind} lowers the bill: write the amount with a minus sign, --amount=-{abs(amount)}")
    ledgers = ledgers_of(args.ledger)
    found = _request(ledgers, args.request_id, args.tenant) if args.request_id else None
    if found is None and args.tenant is None:
        raise ConfigError("say whose bill is adjusted: give --request-id or --tenant")
    ledger, record = found if found is not None else (ledgers[0], None)
    currency = args.currency or (record.currency if record else "")
    if record is not None and record.currency and currency != record.currency:
        raise ConfigError(f"request {args.request_id} was charged in {record.currency}, not in {currency}")
    adjustment = Adjustment(
        adjustment_id=args.id or secrets.token_hex(12),
        kind=kind,
        tenant=record.tenant if record else args.tenant,
        user=record.user if record else "",
        model=record.model if record else "",
        request_id=record.request_id if record else "",
        of_event=record.event_id if record else "",
        of_source=record.source if record else "",
        amount=amount,
        currency=currency,
        reason=args.reason,
        reference=args.reference,
        author=args.author or getpass.getuser(),
        source=source_name_of(source_of(ledger)),
        created_us=time.time_ns() // 1000,
    )
    adjust(ledger, [adjustment])
    text = f"{kind} {adjustment.adjustment_id}: {amount} {currency} for {adjustment.tenant or 'default'}"
    sys.stdout.write((json.dumps(adjustment.to_dict()) if args.json else text) + "\n")
    return 0


def run_rerate(args: argparse.Namespace, chosen: Callable[[UsageRecord], bool]) -> int:
    """chosen: decides by time and tenant whether a record is meant. Raises: ConfigError: one of the rate cards has
    another currency.
    """
    cards = load_cards(args.ratecards)
    changes: list[tuple[Path, list[Adjustment]]] = []
    with ProgressLine("reading the ledger"):
        for ledger in ledgers_of(args.ledger):
            found = rerated(
                read_billed(ledger),
                cards,
                chosen=lambda record: chosen(record) and args.model in (None, record.model),
                now_us=time.time_ns() // 1000,
                reason=args.reason,
                reference=args.reference,
                author=args.author or getpass.getuser(),
            )
            changes.append((ledger, list(found)))
    if not args.dry_run:
        for ledger, adjustments in changes:
            adjust(ledger, adjustments)
    every = [each for _, adjustments in changes for each in adjustments]
    sums: dict[str, Decimal] = {}
    for each in every:
        sums[each.currency] = sums.get(each.currency, Decimal(0)) + each.amount
    amounts = {currency: format(amount, "f") for currency, amount in sums.items()}
    if args.json:
        sys.stdout.write(json.dumps({"records": len(every), "amounts": amounts, "written": not args.dry_run}) + "\n")
    else:
        said = ", ".join(f"{amount} {currency}" for currency, amount in amounts.items())
        by = f" by {said}" if said else ""
        sys.stdout.write(f"{len(every)} records {'would be' if args.dry_run else 'were'} adjusted{by}\n")
    return 0


def _request(ledgers: list[Path], request_id: str, tenant: str | None) -> tuple[Path, UsageRecord]:
    found = [
        (ledger, item.record)
        for ledger in ledgers
        for item in read_settled(ledger)
        if item.record.request_id == request_id and tenant in (None, item.record.tenant)
    ]
    if not found:
        raise ConfigError(f"no record of request {request_id}")
    if len({record.tenant for _, record in found}) > 1:
        raise ConfigError(f"several tenants have a request {request_id}: say which tenant is meant with --tenant")
    return max(found, key=lambda pair: (pair[1].price > 0, pair[1].attempt))


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation as err:
        raise ConfigError(f"--amount must be a decimal number, is {text!r}") from err
    if not amount.is_finite() or not amount:
        raise ConfigError(f"--amount must be a number other than 0, is {text}")
    return amount
