"""`antefix certs`: a private CA, a certificate for each process, and what a certificate says."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest
from antefix.security.certificates import CA, CA_DAYS, CERTIFICATE, DAYS, Issued, describe, issue, make_ca
from antefix.security.identity import ISSUED, Role
from antefix.text_table import text_table


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("certs", help="make and show the certificates of a deployment")
    actions = parser.add_subparsers(dest="action", required=True, metavar="init|issue|show")
    init = actions.add_parser(
        "init", help="make a private CA, and the key that signs grants", epilog="example: antefix certs init ca"
    )
    init.add_argument(
        "directory", type=Path, metavar="CA_DIR", help="of the person who issues; on no host of a service"
    )
    init.add_argument("--days", type=int, default=CA_DAYS, help=f"how long it holds (default: {CA_DAYS})")
    made = actions.add_parser(
        "issue",
        help="make a certificate for one process",
        epilog="example: antefix certs issue prefill p1 --ca ca --out credentials/p1 --host worker1.example",
    )
    made.add_argument("role", choices=[role.value for role in ISSUED])
    made.add_argument("name", help="of this process among those of its role; for a tenant: the tenant's")
    made.add_argument("--ca", type=Path, required=True, metavar="CA_DIR", help="as `antefix certs init` made it")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="what the process gets as --credentials")
    made.add_argument(
        "--host", action="append", default=[], metavar="HOST", help="host name or IP address of it; may repeat"
    )
    made.add_argument("--days", type=int, default=DAYS, help=f"how long it holds (default: {DAYS})")
    show = actions.add_parser(
        "show",
        help="what certificates say, and how long they hold",
        epilog="example: antefix certs show credentials/p1 --json",
    )
    show.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a certificate, or a --credentials directory")
    for each in (init, made, show):
        each.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.action != "show" and args.days < 1:
        raise InvalidRequest(f"--days must be at least 1, is {args.days}")
    if args.action == "init":
        make_ca(args.directory, days=args.days)
        found = {args.directory / CA: describe((args.directory / CA).read_bytes())}
    elif args.action == "issue":
        issued = issue(args.ca, args.out, Role(args.role), args.name, hosts=args.host, days=args.days)
        found = {args.out / CERTIFICATE: issued}
    else:
        found = {path: describe(path.read_bytes()) for given in args.paths for path in _files(given)}
    if args.json:
        print(json.dumps({"certificates": [{"file": str(path), **_plain(each)} for path, each in found.items()]}))
    else:
        rows = [
            (str(path), ", ".join(each.sans) or each.subject, f"{each.days_left:.0f}") for path, each in found.items()
        ]
        print(text_table(("file", "for", "days left"), rows, num_left=2))
    return 1 if any(each.days_left <= 0 for each in found.values()) else 0


def _files(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    found = [given / name for name in (CERTIFICATE, CA) if (given / name).exists()]
    if not found:
        raise InvalidRequest(f"{given} has neither {CERTIFICATE} nor {CA}")
    return found


def _plain(issued: Issued) -> dict[str, Any]:
    return {
        **asdict(issued),
        "serial": f"{issued.serial:x}",
        "not_before": issued.not_before.isoformat(),
        "not_after": issued.not_after.isoformat(),
        "days_left": round(issued.days_left, 2),
    }
