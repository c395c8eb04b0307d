"""`antefix usage receipt` and `rotate-key`: issue or check a request's signed receipt; replace the signing key."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from antefix.checked_files import read_json
from antefix.errors import ConfigError
from antefix_billing.ledger_files import ledgers_of, read_settled, source_of
from antefix_billing.ratecard import load_cards
from antefix_billing.receipt import Signer, check_receipt
from antefix_console.progress_line import ProgressLine


def add_receipt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, which is the default")
    parser.add_argument(
        "--ledger",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directories of the ledgers that have the request (to issue a receipt)",
    )
    parser.add_argument("--request-id", help="id of the request that a receipt is issued for")
    parser.add_argument("--key-file", type=Path, help="file with the deployment's receipt key, which signs a receipt")
    parser.add_argument("--check", type=Path, help="receipt file to check (instead of issuing a receipt)")
    parser.add_argument("--public-key", help="published key in hex that a receipt is checked with")
    parser.add_argument(
        "--ratecards", type=Path, nargs="*", help="price files with which the price in a receipt is calculated again"
    )


def run_receipt(args: argparse.Namespace) -> int:
    """The exit status is 1 if a receipt is not valid.  Raises:  ConfigError: no such request."""
    if args.check is not None:
        return _check_receipt(args)
    if not (args.ledger and args.request_id and args.key_file):
        raise ConfigError(
            "issuing a receipt needs --ledger, --request-id and --key-file; checking a receipt needs --check "
            "and --public-key"
        )
    with ProgressLine("reading the ledger"):
        found = [
            (item, ledger)
            for ledger in ledgers_of(args.ledger)
            for item in read_settled(ledger)
            if item.record.request_id == args.request_id
        ]
    if not found:
        raise ConfigError(f"no record of request {args.request_id}")
    settled, ledger = max(found, key=lambda pair: pair[0].record.finished_us)
    receipt = Signer.from_file(args.key_file).receipt(settled, source_of(ledger))
    sys.stdout.write(json.dumps(receipt, indent=2) + "\n")
    return 0


def _check_receipt(args: argparse.Namespace) -> int:
    try:
        receipt, key = read_json(args.check, "receipt"), bytes.fromhex(args.public_key or "")
    except ValueError as err:
        raise ConfigError(f"the receipt must be JSON, and --public-key must be 64 hex digits: {err}") from err
    checked = check_receipt(receipt, key, load_cards(args.ratecards) if args.ratecards else None)
    result: dict[str, object] = {"ok": checked.ok, "signature_ok": checked.signature_ok, "hash_ok": checked.hash_ok}
    result["price_ok"] = checked.price_ok if checked.price_ok is not None else "not checked"
    sys.stdout.write(json.dumps({**result, "record": checked.record.to_dict()}, indent=2) + "\n")
    return 0 if checked.ok else 1


def add_rotate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key-file", type=Path, required=True, help="the deployment's receipt key")
    parser.add_argument("--json", action="store_true", help="print the public keys as JSON, the newest first")


def run_rotate(args: argparse.Namespace) -> int:
    """Raises:  ConfigError: no such key."""
    signer = Signer.rotate(args.key_file)
    keys = [key.hex() for key in signer.public_keys]
    sys.stdout.write(json.dumps({"public_keys": keys}) + "\n" if args.json else f"public key {keys[0]}\n")
    return 0
