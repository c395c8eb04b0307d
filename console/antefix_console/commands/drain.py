"""`antefix drain STORE --to STORE...`: before a store is removed, copies its valuable records to stores that stay.

STORE is a directory on this host, or the address of a service, which continues to serve during the copy. Records that
one of the other stores has already are left out. The copy is repeated until nothing new has come; then the store can be
stopped.

The exit code is 0 if all records that should be copied are there, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json

from antefix.byte_size import parse_byte_size
from antefix_console.commands.store import add_copy_arguments
from antefix_console.moving import copy_between, report_text
from antefix_kvstore.copy_target import open_source, open_target

# Each round has less to copy. If records come faster than they can be copied, the writers must be stopped by hand.
_ROUNDS_MAX = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="STORE", help="store to empty, as host:port or as its directory on this host")
    parser.add_argument(
        "--to", nargs="+", required=True, metavar="STORE", help="host:port of the stores that receive the records"
    )
    parser.add_argument(
        "--bytes-max",
        default="",
        metavar="SIZE",
        help="most bytes to move; pinned and recently used records are moved first (default: no limit)",
    )
    add_copy_arguments(parser)


def run(args: argparse.Namespace) -> int:
    bytes_max = parse_byte_size(args.bytes_max) if args.bytes_max else None
    for _ in range(_ROUNDS_MAX):
        with open_source(args.source, key_file=args.encrypt_key_file) as contents:
            targets = [open_target(text) for text in args.to]
            report = asyncio.run(
                copy_between(contents, targets, bytes_per_s=parse_byte_size(args.bytes_per_s), bytes_max=bytes_max)
            )
        print(json.dumps(dataclasses.asdict(report)) if args.json else report_text(report))
        if not report.num_copied or not report.complete or bytes_max is not None:
            break
    return 0 if report.complete else 1
