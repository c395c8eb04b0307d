"""`antefix usage`: shows usage and bills. The commands read ledger directories, and need neither a running service nor
torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from antefix.errors import AntefixError, ConfigError
from antefix_billing import usage_plot
from antefix_billing import usage_report as report
from antefix_billing.adjustment import Adjusted
from antefix_billing.export import ExportFormat, write_export, write_text
from antefix_billing.ledger_files import Settled, ledgers_of, read_entries, source_of
from antefix_billing.pruned import Total, pruned_of
from antefix_billing.ratecard import load_cards
from antefix_console.commands.usage_adjust import add_adjust_arguments, add_rerate_arguments, run_adjust, run_rerate
from antefix_console.commands.usage_archive import (
    add_archive_arguments,
    add_compact_arguments,
    add_prune_arguments,
    add_restore_arguments,
    run_archive,
    run_compact,
    run_prune,
    run_restore,
)
from antefix_console.commands.usage_push import add_push_arguments, run_push
from antefix_console.commands.usage_receipt import (
    add_receipt_arguments,
    add_rotate_arguments,
    run_receipt,
    run_rotate,
)
from antefix_console.commands.usage_source import add_source, billed, chooser
from antefix_console.commands.usage_verify import add_verify_arguments, run_verify
from antefix_console.progress_line import ProgressLine

_LEDGER = "--ledger antefix-data/ledger"
_KEY = "--key-file antefix-data/ledger/receipts.key"


class _Command(NamedTuple):
    """help: a description of the subcommand in one line. example: arguments that show its use."""

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `usage` with its subcommands; `run` runs them."""
    add_arguments(subparsers.add_parser("usage", help="export, verify and report recorded usage and charges"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `antefix usage`."""
    commands = parser.add_subparsers(dest="usage_command", required=True)
    for name, command in _COMMANDS.items():
        epilog = f"example: antefix usage {name} {command.example}"
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.help, epilog=epilog))


def run(args: argparse.Namespace) -> int:
    """The exit status is 0; 1 if a check failed; 2 if the command cannot be run."""
    try:
        return _COMMANDS[args.usage_command].run(args)
    except BrokenPipeError:
        raise  # the reader of our output ended; that is no error
    except (AntefixError, OSError) as err:
        sys.stderr.write(f"antefix usage {args.usage_command}: {err}\n")
        return 2


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the number of written records as JSON on standard error"
    )
    parser.add_argument("--format", choices=[kind.value for kind in ExportFormat], default="cloudevents")
    parser.add_argument("--output", type=Path, help="file to write to (default: standard output; parquet needs a file)")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    by_default = ",".join(report.GROUPS_BY_DEFAULT)
    parser.add_argument(
        "--by",
        default=by_default,
        help=f"what to group the report by, comma-separated, out of {', '.join(report.GROUPS)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--ratecards",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="price files; with them, the report shows what the misses cost",
    )
    parser.add_argument(
        "--savings",
        action="store_true",
        help="report how much a longer time to live or a larger store could have saved at most",
    )
    parser.add_argument(
        "--plot", type=Path, help="also plot tokens, charges and misses by reason over time (SVG, PNG or PDF)"
    )


def _add_rerate_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_rerate_arguments(parser)


def _export(args: argparse.Namespace) -> int:
    kind = ExportFormat(args.format)
    if kind is ExportFormat.PARQUET and args.output is None:
        raise ConfigError("--format parquet needs --output FILE")
    ledgers, _ = ledgers_of(args.ledger), chooser(args)
    # Export up to the entries that are there now, so that the cursor tells where the next export begins.
    ends = {ledger: _last_of(ledger) for ledger in ledgers}
    items = (item for ledger, item in billed(args) if item.sequence <= ends[ledger])
    if args.output is not None:
        with ProgressLine(f"writing {args.output}"):
            num_records = write_export(items, kind, args.output)
    else:
        num_records = write_text(items, kind, sys.stdout)
    cursors = {source_of(ledger).hex(): max(end, args.after) for ledger, end in ends.items()}
    said: dict[str, object] = {"records": num_records, "cursors": cursors}
    if len(cursors) == 1:
        said["cursor"] = next(iter(cursors.values()))
    sys.stderr.write(json.dumps(said) + "\n" if args.json else f"{num_records} records\n")
    return 0


def _last_of(ledger: Path) -> int:
    """The last entry's number. The whole ledger is read first, so that a damaged ledger fails before anything is
    written.
    """
    return max((entry.sequence for _, entry in read_entries(ledger)), default=0)


def _report(args: argparse.Namespace) -> int:
    by = tuple(name.strip() for name in args.by.split(",") if name.strip())
    cards = load_cards(args.ratecards) if args.ratecards else None
    with ProgressLine("reading the ledger"):
        items = [item for _, item in billed(args)]
        records = [item.record for item in items if isinstance(item, Settled)]
        adjustments = [item.adjustment for item in items if isinstance(item, Adjusted)]
        lines = report.summarize(records, by, cards=cards, adjustments=adjustments, totals=_pruned_totals(args, by))
    if args.savings:
        rows = report.remedies(records, cards)
        sys.stdout.write(
            (json.dumps(rows, indent=2) if args.json else report.remedies_text(rows, has_prices=cards is not None))
            + "\n"
        )
        return 0
    sys.stdout.write((report.as_json(lines, by) if args.json else report.as_text(lines, by)) + "\n")
    if args.plot is not None:
        usage_plot.plot(records, args.plot, cards=cards)
    return 0


def _pruned_totals(args: argparse.Namespace, by: Sequence[str]) -> list[Total]:
    """Totals from the summaries of pruned entries, if these have the requested fields; otherwise a note that they lack
    them.
    """
    found = [(ledger, each) for ledger in ledgers_of(args.ledger) for each in pruned_of(ledger)]
    if found and (args.since or args.until or args.after or args.savings or not report.GROUPS_OF_PRUNED.issuperset(by)):
        for ledger, each in found:
            sys.stderr.write(f"{ledger}: entries {each.first} to {each.last} were pruned, and are not in this report\n")
        return []
    return [total for _, each in found for total in each.totals if args.tenant in (None, total.tenant)]


def _rerate(args: argparse.Namespace) -> int:
    if args.after:
        raise ConfigError(
            "the rerate command needs all of a ledger; choose records with --since, --until, --tenant and --model"
        )
    return run_rerate(args, chooser(args))


_COMMANDS = {
    "export": _Command(
        "write records for a billing back-end",
        f"{_LEDGER} --format parquet --output usage.parquet",
        _add_export_arguments,
        _export,
    ),
    "verify": _Command(
        "check the hash chain, and each billed hit against the store's log; exit status 1 if something does not hold",
        f"{_LEDGER} --store-log antefix-data/usage-log",
        add_verify_arguments,
        run_verify,
    ),
    "report": _Command(
        "tokens, money and savings by tenant, model and day",
        f"{_LEDGER} --by tenant,day --json",
        _add_report_arguments,
        _report,
    ),
    "receipt": _Command(
        "issue a request's signed receipt, or check one",
        "--check receipt.json --public-key HEX --ratecards deploy/ratecards/deepseek.toml",
        add_receipt_arguments,
        run_receipt,
    ),
    "adjust": _Command(
        "credit, correct or contest a charge: a new entry, nothing that was written changes",
        f"{_LEDGER} --kind credit --amount=-0.25 --request-id ID --reason 'late answer' --reference T-17",
        add_adjust_arguments,
        run_adjust,
    ),
    "push": _Command(
        "send usage to OpenMeter, Lago, Stripe or a webhook as it comes",
        f"{_LEDGER} --config push.toml --state antefix-data/push",
        add_push_arguments,
        run_push,
    ),
    "rerate": _Command(
        "price records again: an adjustment for each that costs something else",
        f"{_LEDGER} --ratecards deploy/ratecards/deepseek.toml --since 2026-09-01 --dry-run",
        _add_rerate_arguments,
        _rerate,
    ),
    "archive": _Command(
        "copy a ledger's sealed segments to a directory or an object store",
        f"{_LEDGER} --to s3://bucket/bill",
        add_archive_arguments,
        run_archive,
    ),
    "prune": _Command(
        "put a signed summary in place of old segments, once the archive has them",
        f"{_LEDGER} --before 2026-01-01 --archive s3://bucket/bill {_KEY}",
        add_prune_arguments,
        run_prune,
    ),
    "restore": _Command(
        "bring a pruned ledger back from its archive, for readers",
        f"{_LEDGER} --from s3://bucket/bill --to whole-ledger",
        add_restore_arguments,
        run_restore,
    ),
    "compact-log": _Command(
        "shrink the stores' logs: drop the lines that no billed hit needs",
        f"{_LEDGER} --store-log antefix-data/usage-log --before 2026-01-01",
        add_compact_arguments,
        run_compact,
    ),
    "rotate-key": _Command(
        "make a new receipt key; receipts signed with earlier keys stay valid, and routers load the new key at a"
        " SIGHUP",
        _KEY,
        add_rotate_arguments,
        run_rotate,
    ),
}
