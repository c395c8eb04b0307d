"""`antefix store copy SRC DST`: copies one store's contents to another. `antefix store purge`: deletes a tenant's
records.

The exit code is 0 if everything was done, else 1; the same command then continues where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path

from antefix.byte_size import parse_byte_size
from antefix.cache_tenant import join_tenant
from antefix.config import add_flags, given_flags, require
from antefix.redis_access import RedisAccess
from antefix.secret import Keyring
from antefix.store_files.owners import Owners
from antefix.worker_settings import WorkerSettings
from antefix_console.moving import copy_between, report_text
from antefix_console.purging import Access, PurgeReport, purge_all, stores_of
from antefix_kvstore.copy_target import open_source, open_target


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `store` with its subcommands; `run` runs them."""
    add_arguments(subparsers.add_parser("store", help="copy a store, or delete all data of a tenant from stores"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="store_command", required=True)
    copy = _command(
        commands,
        "copy",
        "copy what a store holds to another; run it again to continue",
        "antefix-data/store /backup/store",
    )
    copy.add_argument(
        "source",
        metavar="SRC",
        help="store to copy from: its directory on this host (in use or not), host:port, or s3://...",
    )
    copy.add_argument(
        "target",
        metavar="DST",
        help="store to copy to: a directory that no service has open (made if missing), host:port, or s3://...",
    )
    copy.add_argument(
        "--budget-bytes", default="", metavar="SIZE", help="size limit of a newly made directory store (default: 64G)"
    )
    copy.add_argument(
        "--ttl-s",
        type=float,
        default=0.0,
        help="number of seconds after which copies in an object store are deleted (default: never)",
    )
    add_copy_arguments(copy)
    purge = _command(
        commands,
        "purge",
        "drop all of a tenant's records, pinned or not, in all tiers",
        "rediss://redis:6379/0 s3://kv-cache/prod --tenant acme --secret-file antefix-data/secret",
    )
    purge.add_argument(
        "stores",
        nargs="+",
        metavar="STORE",
        help=(
            "all stores to purge, in any order: host:port, a directory that no service has open, s3://..., or the "
            "form that services use in --stores: NAME=ADDRESS, dns:HOST:PORT, redis://... (its window pool as well)"
        ),
    )
    purge.add_argument("--tenant", required=True, help="tenant whose records are deleted, by name or as digest:HEX")
    purge.add_argument("--user", default="", help="delete only the records of this user of the tenant")
    purge.add_argument(
        "--secret-file", help="file with the deployment's secret, from which the tenant's name in stores is derived"
    )
    purge.add_argument("--json", action="store_true", help="print one JSON object")
    group = purge.add_argument_group("Redis", "where it is named, as roles have it")
    add_flags(group, WorkerSettings, ("redis_password_file", "redis_ca_file"))


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, example: str
) -> argparse.ArgumentParser:
    epilog = f"example: antefix store {name} {example}"
    return commands.add_parser(name, help=text, description=text, epilog=epilog)


def add_copy_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `store copy` and `drain` share."""
    parser.add_argument(
        "--bytes-per-s", default="0", metavar="SIZE", help="most bytes per second that are copied (default: no limit)"
    )
    parser.add_argument("--secret-file", help="file with the deployment's secret, which running store services ask for")
    parser.add_argument("--encrypt-key-file", default="", help="file with the key that encrypts the directories")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    return _copy(args) if args.store_command == "copy" else _purge(args)


def _copy(args: argparse.Namespace) -> int:
    budget_bytes = parse_byte_size(args.budget_bytes) if args.budget_bytes else 0
    with open_source(args.source, key_file=args.encrypt_key_file) as contents:
        target = open_target(
            args.target, budget_bytes=budget_bytes, key_file=args.encrypt_key_file, makes=True, ttl_s=args.ttl_s
        )
        report = asyncio.run(copy_between(contents, [target], bytes_per_s=parse_byte_size(args.bytes_per_s)))
    print(json.dumps(dataclasses.asdict(report)) if args.json else report_text(report))
    return 0 if report.complete else 1


def _purge(args: argparse.Namespace) -> int:
    require(args.tenant.startswith("digest:") or bool(args.secret_file), "--secret-file is needed to name a tenant")
    keyring = Keyring.from_file(Path(args.secret_file)) if args.secret_file else None
    name = join_tenant(args.tenant, args.user) if args.user else args.tenant
    owners = [row[1:] for row in Owners(keyring).rows(name) if row[:1] == b"o"]
    redis = WorkerSettings(**given_flags(WorkerSettings, args))
    report = asyncio.run(_purge_named(args.stores, keyring, owners, lambda url: RedisAccess.of(url, redis)))
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print("\n".join(f"{store}: {number} records dropped" for store, number in report.purged.items()))
        for store, why in report.failed.items():
            print(f"{store}: NOT purged: {why}")
    return 1 if report.failed else 0


async def _purge_named(stores: list[str], keyring: Keyring | None, owners: list[bytes], access: Access) -> PurgeReport:
    return await purge_all(await stores_of(stores, keyring, access), owners, access)
