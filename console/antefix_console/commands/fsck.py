"""`antefix fsck DIR...`: checks whether stores are sound; --repair repairs them. A store's service must be stopped; an
object store (`antefix fsck s3://...`) may be in use.

Exit code 0 if all stores are sound or were repaired, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path

from antefix.objects.bucket import is_object_url
from antefix_console.commands.inspect import plain
from antefix_console.progress_line import ProgressLine
from antefix_kvstore.check_objects import fsck_objects
from antefix_kvstore.check_store import fsck, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        nargs="+",
        metavar="DIR",
        help="directories of stores that no service has open, or URLs (s3://...) of object stores, which may be in use",
    )
    parser.add_argument(
        "--repair", action="store_true", help="rebuild damaged parts, and delete what cannot be repaired"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    reports = {}
    for text in args.directories:
        with ProgressLine("checking records") as progress:
            if is_object_url(text):
                report = asyncio.run(fsck_objects(text, repair=args.repair, progress=progress.count))
            else:
                report = fsck(Path(text), repair=args.repair, progress=progress.count)
        reports[text] = report
        if not args.json:
            print(f"{text}: {render(report)}" if len(args.directories) > 1 else render(report))
    if args.json:
        shown = {text: {**dataclasses.asdict(report), "sound": report.sound} for text, report in reports.items()}
        print(json.dumps(shown if len(shown) > 1 else next(iter(shown.values())), default=plain))
    return 0 if args.repair or all(report.sound for report in reports.values()) else 1
