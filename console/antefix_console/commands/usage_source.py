"""Selects the ledgers and records that a command of `antefix usage` works on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from antefix.errors import ConfigError
from antefix_billing.adjustment import Adjusted, Adjustment
from antefix_billing.ledger_files import Settled, ledgers_of, read_billed
from antefix_billing.pruned import check_cursor
from antefix_billing.usage_record import UsageRecord


def add_ledgers(parser: argparse.ArgumentParser) -> None:
    """Add `--ledger`."""
    parser.add_argument(
        "--ledger",
        type=Path,
        required=True,
        nargs="+",
        metavar="DIR",
        help="ledger directories, one per router, or a directory that contains ledgers",
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add `--ledger`, and the flags that select records."""
    add_ledgers(parser)
    parser.add_argument(
        "--after", type=int, default=0, metavar="CURSOR", help="export only entries after this sequence number"
    )
    parser.add_argument("--since", help="select only requests that started at or after this UTC date or time")
    parser.add_argument("--until", help="select only requests that started before this UTC date or time")
    parser.add_argument("--tenant", help="only this tenant's")


def billed(args: argparse.Namespace) -> Iterator[tuple[Path, Settled | Adjusted]]:
    """Selected records and their adjustments, with the ledger of each."""
    chosen, chosen_adjustment = chooser(args), _adjustment_chooser(args)
    ledgers = ledgers_of(args.ledger)
    if args.after and len(ledgers) > 1:
        raise ConfigError(
            "--after is a position in one ledger; to continue from a position in several ledgers, export each "
            "ledger on its own"
        )
    for ledger in ledgers:
        check_cursor(ledger, args.after)
        for item in read_billed(ledger, after=args.after):
            if chosen(item.record) if isinstance(item, Settled) else chosen_adjustment(item.adjustment):
                yield ledger, item


def chooser(args: argparse.Namespace) -> Callable[[UsageRecord], bool]:
    """A function that tells whether --since, --until and --tenant select a record."""
    since_us, until_us, tenant = time_us_of(args.since), time_us_of(args.until), args.tenant

    def chosen(record: UsageRecord) -> bool:
        is_early = since_us is not None and record.started_us < since_us
        is_late = until_us is not None and record.started_us >= until_us
        return tenant in (None, record.tenant) and not is_early and not is_late

    return chosen


def _adjustment_chooser(args: argparse.Namespace) -> Callable[[Adjustment], bool]:
    """Selects adjustments by the time at which they were made; records are selected by their start."""
    since_us, until_us, tenant = time_us_of(args.since), time_us_of(args.until), args.tenant

    def chosen(made: Adjustment) -> bool:
        is_early = since_us is not None and made.created_us < since_us
        is_late = until_us is not None and made.created_us >= until_us
        return tenant in (None, made.tenant) and not is_early and not is_late

    return chosen


def time_us_of(text: str | None) -> int | None:
    """Unix microseconds; None for None.  Raises:  ConfigError: the text is neither a date nor a time."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise ConfigError(f"{text!r} is not a date or time like 2026-09-10 or 2026-09-10T06:00:00Z") from err
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return int(moment.timestamp() * 1_000_000)
    except (OverflowError, ValueError) as err:
        raise ConfigError(
            f"the time {text!r} cannot be converted to UTC, because it is before or after all times there"
        ) from err
