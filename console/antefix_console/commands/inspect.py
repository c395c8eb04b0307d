"""`antefix inspect DIR...` or `s3://...`: shows what stores hold. The command works whether a service has the store
open or not.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

from antefix.checked_files import read_toml
from antefix.checked_table import Table
from antefix.config import require
from antefix.objects.bucket import is_object_url
from antefix.secret import Keyring
from antefix.store_files.owners import KnownNames, Owners
from antefix_console.progress_line import ProgressLine
from antefix_kvstore.describe_objects import ObjectReport, inspect_objects, render_objects
from antefix_kvstore.describe_store import NUM_LINES_MAX, StoreReport, inspect, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="directories of stores, or URLs of object stores (s3://...)"
    )
    parser.add_argument(
        "--lines",
        type=int,
        default=NUM_LINES_MAX,
        metavar="N",
        help="number of levels of the prefix tree to show (default: %(default)s)",
    )
    parser.add_argument(
        "--secret-file",
        metavar="FILE",
        help="file with the deployment's secret, to find tenants by name (default: the file `secret` next to DIR, if "
        "there is one)",
    )
    parser.add_argument(
        "--tenant", action="append", default=[], metavar="NAME", help="show this tenant with its name; may be repeated"
    )
    parser.add_argument("--tenants-file", metavar="FILE", help="show all tenants of this file with their names")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    known = _known(args)
    reports: dict[str, StoreReport | ObjectReport] = {}
    for text in args.directories:
        if is_object_url(text):
            with ProgressLine("reading footers"):
                reports[text] = asyncio.run(inspect_objects(text, known=known))
            continue
        with ProgressLine("reading the index") as progress:
            reports[text] = inspect(Path(text), num_lines_max=args.lines, known=known, progress=progress.count)
    if args.json:
        shown = {text: dataclasses.asdict(report) for text, report in reports.items()}
        print(json.dumps(shown if len(shown) > 1 else next(iter(shown.values())), default=plain))
        return 0
    for text, report in reports.items():
        lines = render_objects(report) if isinstance(report, ObjectReport) else render(report)
        print(f"{text}\n{lines}" if len(reports) > 1 else lines)
    return 0


def _known(args: argparse.Namespace) -> KnownNames:
    """Raises:  ConfigError: tenants are named without a secret to compute their digests, or a file cannot be read."""
    tenants = [*args.tenant, *(_named_in(args.tenants_file) if args.tenants_file else ())]
    at_hand = Path(args.directories[0]).resolve().parent / "secret"
    if args.secret_file is None and not at_hand.is_file():
        require(not tenants, "--secret-file is needed: a store has digests of tenants' names, which only it can make")
        return KnownNames()
    return KnownNames(tuple(tenants), Owners(Keyring.from_file(args.secret_file or at_hand)))


def _named_in(path: str) -> list[str]:
    """The tenants in a tenants file. The limits of the tenants in the file are not checked here."""
    file = Table(read_toml(path, "tenants file"), f"tenants file {path}")
    return [table.text("name", empty=True) for table in file.children("tenant")]


def plain(value: Any) -> str:
    """A JSON form for values that have none: hashes and ids."""
    return value.hex() if isinstance(value, bytes) else str(value)
