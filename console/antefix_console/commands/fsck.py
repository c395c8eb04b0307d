"""`antefix fsck DIR`: is a store sound? With --repair, make it so. The service must be stopped.

Exit code 0 if it is sound, or was made so; 1 if it is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from antefix_console.commands.inspect import plain
from antefix_console.progress_line import ProgressLine
from antefix_kvstore.check_store import fsck, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a store directory that no service has open")
    parser.add_argument("--repair", action="store_true", help="rebuild what is damaged; drops what cannot be saved")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    with ProgressLine("checking records") as progress:
        report = fsck(args.directory, repair=args.repair, progress=progress.count)
    if args.json:
        print(json.dumps({**dataclasses.asdict(report), "sound": report.sound}, default=plain))
    else:
        print(render(report))
    return 0 if report.sound or args.repair else 1
