"""`antefix certs`: makes a private CA, a certificate per process and an engine's grant; shows what they contain."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest
from antefix.secret import Keyring
from antefix.security.certificates import (
    CA,
    CA_DAYS,
    CERTIFICATE,
    DAYS,
    TENANT_GRANT,
    Issued,
    describe,
    issue,
    make_ca,
    write_lasting_grant,
)
from antefix.security.grants import unchecked
from antefix.security.identity import ISSUED, Role
from antefix.text_table import text_table


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("certs", help="make and show the TLS certificates of a deployment")
    actions = parser.add_subparsers(dest="action", required=True, metavar="init|issue|grant|show")
    init = actions.add_parser(
        "init",
        help="make a private CA, and the key that signs grants (permissions to use the store)",
        epilog="example: antefix certs init ca",
    )
    init.add_argument(
        "directory",
        type=Path,
        metavar="CA_DIR",
        help="directory of the CA; keep it with the person who issues certificates, not on a service's host",
    )
    init.add_argument(
        "--days", type=int, default=CA_DAYS, help=f"days until the CA's certificate expires (default: {CA_DAYS})"
    )
    made = actions.add_parser(
        "issue",
        help="make a certificate for one process",
        epilog="example: antefix certs issue prefill p1 --ca ca --out credentials/p1 --host worker1.example",
    )
    made.add_argument("role", choices=[role.value for role in ISSUED])
    made.add_argument("name", help="name of this process among those with the same role, or name of the tenant")
    made.add_argument(
        "--ca", type=Path, required=True, metavar="CA_DIR", help="directory that `antefix certs init` made"
    )
    made.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory to write the certificate to; the process takes this directory as --credentials",
    )
    made.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="HOST",
        help="host name or IP address of the process; may be repeated",
    )
    made.add_argument(
        "--days", type=int, default=DAYS, help=f"number of days until the certificate expires (default: {DAYS})"
    )
    granted = _add_grant(actions)
    show = actions.add_parser(
        "show",
        help="show what certificates contain, and how long they are valid",
        epilog="example: antefix certs show credentials/p1 --json",
    )
    show.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="a certificate file, or a --credentials directory"
    )
    for each in (init, made, granted, show):
        each.add_argument("--json", action="store_true", help="print one JSON object")


def _add_grant(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    granted = actions.add_parser(
        "grant",
        help=(
            "sign a grant that lets an engine use the store for one tenant, and write it next to the engine's "
            "certificate"
        ),
        epilog="example: antefix certs grant acme --ca ca --secret-file antefix-data/secret --out credentials/e1",
    )
    granted.add_argument("tenant", help="tenant whose records the engine may read, write, pin and evict")
    granted.add_argument(
        "--ca", type=Path, required=True, metavar="CA_DIR", help="directory that `antefix certs init` made"
    )
    granted.add_argument(
        "--secret-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="file with the deployment's secret; grants must be signed again when the secret changes",
    )
    granted.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory that the engine uses as --credentials"
    )
    granted.add_argument("--days", type=int, default=DAYS, help=f"days until the grant expires (default: {DAYS})")
    return granted


# A hundred years.
_DAYS_MAX = 36_500


def run(args: argparse.Namespace) -> int:
    if args.action != "show" and not 1 <= args.days <= _DAYS_MAX:
        raise InvalidRequest(f"--days must be from 1 to {_DAYS_MAX}, is {args.days}")
    if args.action == "init":
        make_ca(args.directory, days=args.days)
        found = {args.directory / CA: describe((args.directory / CA).read_bytes())}
    elif args.action == "issue":
        issued = issue(args.ca, args.out, Role(args.role), args.name, hosts=args.host, days=args.days)
        found = {args.out / CERTIFICATE: issued}
    elif args.action == "grant":
        write_lasting_grant(args.ca, args.out, Keyring.from_file(args.secret_file), args.tenant, days=args.days)
        found = {}
    else:
        found = {path: describe(path.read_bytes()) for given in args.paths for path in _files(given)}
    directories: list[Path] = args.paths if args.action == "show" else [args.out] if args.action == "grant" else []
    grants = {path: _grant_days_left(path) for given in directories if (path := given / TENANT_GRANT).exists()}
    return _show(found, grants, as_json=args.json)


def _show(found: dict[Path, Issued], grants: dict[Path, float], *, as_json: bool) -> int:
    """Print what certificates contain, and how many days grants are still valid. The exit status is 1 if a certificate
    or grant has expired.
    """
    if as_json:
        certificates = [{"file": str(path), **_plain(each)} for path, each in found.items()]
        held = [{"file": str(path), "days_left": round(days, 2)} for path, days in grants.items()]
        print(json.dumps({"certificates": certificates, "grants": held}))
    else:
        rows = [
            (str(path), ", ".join(each.sans) or each.subject, f"{each.days_left:.0f}") for path, each in found.items()
        ]
        rows += [(str(path), "a tenant's records in the store", f"{days:.0f}") for path, days in grants.items()]
        print(text_table(("file", "for", "days left"), rows, num_left=2))
    return 1 if any(days <= 0 for days in [*(each.days_left for each in found.values()), *grants.values()]) else 0


def _grant_days_left(path: Path) -> float:
    return (unchecked(path.read_bytes()).expires_ms / 1000 - time.time()) / 86400


def _files(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    found = [given / name for name in (CERTIFICATE, CA) if (given / name).exists()]
    if not found:
        raise InvalidRequest(f"the directory {given} has neither {CERTIFICATE} nor {CA}")
    return found


def _plain(issued: Issued) -> dict[str, Any]:
    return {
        **asdict(issued),
        "serial": f"{issued.serial:x}",
        "not_before": issued.not_before.isoformat(),
        "not_after": issued.not_after.isoformat(),
        "days_left": round(issued.days_left, 2),
    }
