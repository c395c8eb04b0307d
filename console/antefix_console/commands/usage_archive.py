"""`antefix usage archive`, `prune`, `restore` and `compact-log`: keep years of bills with few local files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from antefix.errors import ConfigError
from antefix_billing.archive import archive, prune, restore
from antefix_billing.compact_log import compact
from antefix_billing.ledger_files import ledgers_of, source_of
from antefix_billing.pruned import Pruned
from antefix_billing.push.pusher import sent_to
from antefix_billing.receipt import Signer
from antefix_console.commands.usage_source import add_ledgers, time_us_of
from antefix_console.progress_line import ProgressLine

_PLACE = "a directory, or an object store's URL such as s3://BUCKET/PREFIX"
_JSON = "print JSON"


def add_archive_arguments(parser: argparse.ArgumentParser) -> None:
    add_ledgers(parser)
    parser.add_argument("--to", required=True, metavar="PLACE", help=_PLACE)
    parser.add_argument("--json", action="store_true", help=_JSON)


def run_archive(args: argparse.Namespace) -> int:
    """Raises:  ConfigError, LedgerCorrupt, Unavailable."""
    with ProgressLine(f"copying to {args.to}"):
        copied = {str(ledger): archive(ledger, args.to) for ledger in ledgers_of(args.ledger)}
    lines = [f"{ledger}: {len(names)} segments copied" for ledger, names in copied.items()]
    sys.stdout.write((json.dumps(copied) if args.json else "\n".join(lines)) + "\n")
    return 0


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    add_ledgers(parser)
    parser.add_argument("--before", required=True, help="remove ledger entries from before this UTC date or time")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--archive", default="", metavar="PLACE", help=f"place in which archived entries are kept: {_PLACE}"
    )
    where.add_argument(
        "--without-archive", action="store_true", help="do not archive the removed entries; keep only their summary"
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        required=True,
        help="file with the deployment's receipt key, which signs the summary of the removed entries",
    )
    parser.add_argument(
        "--push-state",
        type=Path,
        metavar="DIR",
        help="state directory of `antefix usage push`; entries that were not sent yet are not removed",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show which entries would be removed, but change nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON")


def run_prune(args: argparse.Namespace) -> int:
    """Raises:  ConfigError, LedgerCorrupt, Unavailable."""
    before_us, signer = time_us_of(args.before), Signer.from_file(args.key_file)
    assert before_us is not None
    found: dict[str, Pruned | None] = {}
    with ProgressLine("reading the ledger"):
        for ledger in ledgers_of(args.ledger):
            found[str(ledger)] = prune(
                ledger,
                before_us=before_us,
                place=args.archive,
                signer=signer,
                now_us=time.time_ns() // 1000,
                sent_to=sent_to(args.push_state, source_of(ledger)) if args.push_state else None,
                dry_run=args.dry_run,
            )
    if args.json:
        sys.stdout.write(json.dumps({name: each and each.to_dict() for name, each in found.items()}, indent=2) + "\n")
        return 0
    done = "would be pruned" if args.dry_run else "were pruned"
    for name, each in found.items():
        said = f"entries {each.first} to {each.last} {done}" if each else "nothing is old enough"
        sys.stdout.write(f"{name}: {said}\n")
    return 0


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ledger",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of the ledger from which entries were removed",
    )
    parser.add_argument("--from", dest="place", required=True, metavar="PLACE", help=_PLACE)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="empty directory to write the complete ledger to"
    )
    parser.add_argument("--json", action="store_true", help=_JSON)


def run_restore(args: argparse.Namespace) -> int:
    """Raises:  ConfigError, Unavailable."""
    with ProgressLine(f"copying from {args.place}"):
        number = restore(args.place, source_of(args.ledger), args.to, ledger=args.ledger)
    said = json.dumps({"segments": number}) if args.json else f"{number} segments in {args.to}, for readers"
    sys.stdout.write(said + "\n")
    return 0


def add_compact_arguments(parser: argparse.ArgumentParser) -> None:
    add_ledgers(parser)
    parser.add_argument("--store-log", type=Path, nargs="+", required=True, metavar="DIR", help="the stores' logs")
    parser.add_argument(
        "--before", required=True, help="restore lines of files that ended before this UTC date or time"
    )
    parser.add_argument("--json", action="store_true", help=_JSON)


def run_compact(args: argparse.Namespace) -> int:
    """Raises:  ConfigError: a log is not a directory, or is being written to."""
    before_us = time_us_of(args.before)
    assert before_us is not None
    for log in args.store_log:
        if not log.is_dir():
            raise ConfigError(f"--store-log {log} is not a directory")
    with ProgressLine("reading the logs"):
        found = compact(args.store_log, ledgers_of(args.ledger), before_us=before_us)
    said = f"{found.num_files} files: {found.bytes_before} bytes before, {found.bytes_after} after"
    sys.stdout.write((json.dumps(found.to_dict()) if args.json else said) + "\n")
    return 0
