"""`antefix bench`: runs a checkout's benchmarks, each of which answers one question. Installed packages lack them."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest
from antefix_console.shipped import CHECKOUT

# A Python environment next to the checkout's own; `make bench-peers` makes it.
_PEERS_PYTHON = CHECKOUT / ".venv-peers" / "bin" / "python"
# A folder with an S3 server and boto3; `make test-s3` makes it.
_S3 = CHECKOUT / ".s3"
_ABOUT_TIER = "how near the object tier is to its own client, and what it costs"
_ABOUT_STORE = "how near the store is to its disk, and how far from its peers"


def add_parser(subparsers: Any) -> None:
    bench = subparsers.add_parser("bench", help="compare storage with the machine's limits and with peers")
    which = bench.add_subparsers(dest="bench", required=True, metavar="store|tier")
    store = which.add_parser(
        "store",
        help=_ABOUT_STORE,
        description=f"{_ABOUT_STORE}, measured in one interleaved run that takes some minutes",
        epilog="example: antefix bench store --json > store.json",
    )
    add_store_arguments(store)
    tier = which.add_parser(
        "tier",
        help=_ABOUT_TIER,
        description=f"{_ABOUT_TIER}: restores with range reads, seconds per tier, uploads during restores, the index",
        epilog="example: antefix bench tier --json > tier.json",
    )
    add_tier_arguments(tier)


def add_tier_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks/tier.py."""
    parser.add_argument(
        "--blocks",
        type=int,
        default=1024,
        help="number of 128-token blocks to store and restore (default: 1024, a prefix of 128K tokens)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of everything (default: 5)")
    parser.add_argument(
        "--object-store",
        default="",
        metavar="URL",
        help="object store to measure (default: an S3 server that the benchmark starts)",
    )
    parser.add_argument(
        "--s3",
        type=Path,
        default=_S3,
        metavar="DIR",
        help="Python environment with an S3 server and boto3 (`make test-s3` makes one)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object to standard output, and the progress to standard error",
    )


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks/store.py."""
    parser.add_argument(
        "--model", choices=("flash", "pro"), default="flash", help="model whose block sizes are used (default: flash)"
    )
    parser.add_argument("--dir", type=Path, help="directory to write about 4 GB to (default: a temporary directory)")
    parser.add_argument(
        "--blocks",
        type=int,
        default=1024,
        help="number of 128-token blocks to store and restore (default: 1024, a prefix of 128K tokens)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of everything (default: 3)")
    parser.add_argument(
        "--peers",
        default=str(_PEERS_PYTHON) if _PEERS_PYTHON.exists() else "",
        metavar="PYTHON",
        help=(
            "Python interpreter that has the other caches installed (default: the one that `make bench-peers` "
            "made, if any)"
        ),
    )
    parser.add_argument(
        "--long", action="store_true", help="also measure a 1M-token prefix, and a store of a million blocks"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="also write the figures to this file, with commit, date, machine and load",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object to standard output, and the progress to standard error",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 if everything was measured, else 1.

    Raises:  InvalidRequest: this is not a checkout, or an option is invalid.
    """
    if not (CHECKOUT / "benchmarks" / "store.py").exists():
        raise InvalidRequest(
            "benchmarks are part of a checkout of Antefix's sources, not of the package installed in "
            f"{CHECKOUT}; run them in a checkout"
        )
    if args.blocks < 1 or args.repeats < 1:
        raise InvalidRequest("--blocks and --repeats must be at least 1")
    if args.bench == "tier":
        return _run_tier(args)
    if args.peers and shutil.which(args.peers) is None:
        raise InvalidRequest(f"--peers: there is no Python at {args.peers}")
    command = [
        *(sys.executable, "-m", "benchmarks.store", "--model", args.model, "--peers", args.peers),
        *("--blocks", str(args.blocks), "--repeats", str(args.repeats)),
        *(["--dir", str(args.dir.resolve())] if args.dir else []),
        *(["--long"] if args.long else []),
        *(["--record", str(args.record.resolve())] if args.record else []),
        *(["--json"] if args.json else []),
    ]
    return 0 if subprocess.run(command, cwd=CHECKOUT, check=False).returncode == 0 else 1


def _run_tier(args: argparse.Namespace) -> int:
    if not args.object_store and not (args.s3 / "bin" / "weed").exists():
        raise InvalidRequest(
            f"there is no S3 server in {args.s3}: make one with `make test-s3`, or give --object-store"
        )
    command = [
        *(sys.executable, "-m", "benchmarks.tier", "--s3", str(args.s3.resolve())),
        *("--blocks", str(args.blocks), "--rounds", str(args.repeats)),
        *(["--object-store", args.object_store] if args.object_store else []),
        *(["--json"] if args.json else []),
    ]
    return 0 if subprocess.run(command, cwd=CHECKOUT, check=False).returncode == 0 else 1
