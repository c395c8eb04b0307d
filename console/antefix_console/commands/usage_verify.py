"""`antefix usage verify`: checks that the ledger is whole, and that the store's own log supports every hit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from antefix.errors import ConfigError
from antefix.whole_number import whole_number
from antefix_billing.anchor import read_anchors
from antefix_billing.ledger_files import ledgers_of, source_of
from antefix_billing.reconcile import verify_all
from antefix_console.commands.usage_source import add_ledgers
from antefix_console.progress_line import ProgressLine


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    add_ledgers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, which is the default")
    parser.add_argument(
        "--store-log",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directories of the stores' logs, which record hits and writes",
    )
    parser.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="[SOURCE:]SEQUENCE:HASH",
        help=(
            "last entry of a ledger as an earlier run reported it; the check fails if the entry is gone; with "
            "several ledgers, put the source before it"
        ),
    )
    parser.add_argument(
        "--anchors",
        nargs="+",
        default=[],
        metavar="PLACE",
        help=(
            "files, directories or object stores that keep signed hashes of ledgers (--anchors of routers) or receipts"
        ),
    )
    parser.add_argument(
        "--public-key",
        nargs="+",
        default=[],
        metavar="HEX",
        help="published keys that may have signed the hashes of ledgers, or the summaries of removed entries",
    )
    parser.add_argument(
        "--archive",
        default="",
        metavar="PLACE",
        help="archive of removed ledger entries, which the summaries are checked against",
    )


def run_verify(args: argparse.Namespace) -> int:
    """The exit status is 1 if a check failed.  Raises:  ConfigError."""
    ledgers = ledgers_of(args.ledger)
    anchors = dict(_anchor(text, ledgers) for text in args.anchor)
    for store_log in args.store_log or ():
        if not store_log.is_dir():
            raise ConfigError(f"--store-log {store_log} is not a directory")
    with ProgressLine("reading the ledger"):
        verdict = verify_all(
            ledgers,
            store_log=args.store_log,
            anchors=anchors,
            signed=read_anchors(args.anchors),
            public_keys=[_public_key(text) for text in args.public_key],
            # A directory that contains several ledgers stands for all of them.
            are_all=not any((path / "source").is_file() for path in args.ledger),
            archive=args.archive,
        )
    sys.stdout.write(verdict.to_json() + "\n")
    return 0 if verdict.ok else 1


def _public_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"--public-key must be 64 hex digits, is {text!r}")
    return key


def _anchor(text: str, ledgers: Sequence[Path]) -> tuple[bytes, tuple[int, str]]:
    """(source, (sequence, hash)). Raises:  ConfigError: the text has another form, or names none of these ledgers."""
    *source, sequence, hash = text.lower().split(":") if text.count(":") in (1, 2) else ("", "", "")
    number = whole_number(sequence)
    if number is None or len(hash) != 64:
        raise ConfigError(f"--anchor must be SEQUENCE:HASH or SOURCE:SEQUENCE:HASH, is {text!r}")
    if not source and len(ledgers) > 1:
        raise ConfigError("with several ledgers, --anchor must also name the ledger's source: SOURCE:SEQUENCE:HASH")
    known = {source_of(ledger).hex(): source_of(ledger) for ledger in ledgers}
    name = source[0] if source else next(iter(known))
    if name not in known:
        raise ConfigError(f"--anchor names ledger {name}, which is not one of the given ledgers")
    return known[name], (number, hash)
