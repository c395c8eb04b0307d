"""`antefix inspect DIR`: what a store holds. Reads beside a running service as well as without one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from antefix_kvstore.describe_store import NUM_LINES_MAX, inspect, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a store directory")
    parser.add_argument(
        "--lines", type=int, default=NUM_LINES_MAX, metavar="N", help="of the prefix forest (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = inspect(args.directory, num_lines_max=args.lines)
    print(json.dumps(dataclasses.asdict(report), default=plain) if args.json else render(report))
    return 0


def plain(value: Any) -> str:
    """What JSON has no form for: hashes and ids."""
    return value.hex() if isinstance(value, bytes) else str(value)
