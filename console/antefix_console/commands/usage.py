"""`antefix usage`: export, verify, report, receipt. Reads ledger directories; needs no running service and no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from antefix.checked_files import read_json
from antefix.errors import AntefixError, ConfigError
from antefix_billing import usage_report as report
from antefix_billing.adjustment import Adjusted, Adjustment
from antefix_billing.anchor import read_anchors
from antefix_billing.export import ExportFormat, write_export, write_text
from antefix_billing.ledger_files import Settled, ledgers_of, read_billed, read_entries, read_settled, source_of
from antefix_billing.ratecard import load_cards
from antefix_billing.receipt import Signer, check_receipt
from antefix_billing.reconcile import verify_all
from antefix_billing.usage_record import UsageRecord
from antefix_console.commands.usage_adjust import add_adjust_arguments, add_rerate_arguments, run_adjust, run_rerate
from antefix_console.commands.usage_push import add_push_arguments, run_push
from antefix_console.progress_line import ProgressLine


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `usage` with its own commands; `run` carries them out."""
    add_arguments(subparsers.add_parser("usage", help="export, verify and report what was used and billed"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands under `antefix usage`."""
    commands = parser.add_subparsers(dest="usage_command", required=True)

    ledger = "--ledger antefix-data/ledger"
    export = _command(
        commands, "export", "write records for a billing back-end", f"{ledger} --format parquet --output usage.parquet"
    )
    _add_source(export)
    export.add_argument("--json", action="store_true", help="say on standard error as JSON how many were written")
    export.add_argument("--format", choices=[kind.value for kind in ExportFormat], default="cloudevents")
    export.add_argument("--output", type=Path, help="file to write (default: standard output; parquet needs a file)")

    check = _command(
        commands,
        "verify",
        "check the hash chain, and each billed hit against the store's log; exit status 1 if something does not hold",
        f"{ledger} --store-log antefix-data/usage-log",
    )
    _add_ledgers(check)
    check.add_argument("--json", action="store_true", help="print JSON, as it does without this as well")
    check.add_argument(
        "--store-log", type=Path, nargs="+", metavar="DIR", help="directories of the stores' logs of hits and writes"
    )
    check.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="[SOURCE:]SEQUENCE:HASH",
        help="a head that an earlier run reported and that must still be there; of several ledgers with its source",
    )
    check.add_argument(
        "--anchors",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="where heads were anchored (--anchors of routers), and receipts: files, directories, file:// URLs",
    )
    check.add_argument(
        "--public-key", nargs="+", default=[], metavar="HEX", help="published keys that may have signed the anchors"
    )

    sums = _command(
        commands, "report", "tokens, money and savings by tenant, model and day", f"{ledger} --by tenant,day --json"
    )
    _add_source(sums)
    by_default = ",".join(report.GROUPS_BY_DEFAULT)
    sums.add_argument("--by", default=by_default, help=f"comma-separated, of {', '.join(report.GROUPS)}")
    sums.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sums.add_argument(
        "--ratecards", type=Path, nargs="*", metavar="FILE", help="rate cards, to tell what misses cost (column missed)"
    )
    sums.add_argument(
        "--savings",
        action="store_true",
        help="say instead what a longer time to live and a larger store would have saved at most",
    )
    sums.add_argument("--plot", type=Path, help="also draw tokens and money by day (SVG, PNG or PDF)")

    receipt = _command(
        commands,
        "receipt",
        "issue a request's signed receipt, or check one",
        "--check receipt.json --public-key HEX --ratecards deploy/ratecards/deepseek.toml",
    )
    receipt.add_argument("--json", action="store_true", help="print JSON, as it does without this as well")
    receipt.add_argument("--ledger", type=Path, nargs="+", metavar="DIR", help="ledger directories, to issue")
    receipt.add_argument("--request-id", help="the request, to issue")
    receipt.add_argument("--key-file", type=Path, help="the deployment's receipt key, to issue")
    receipt.add_argument("--check", type=Path, help="receipt file to check instead")
    receipt.add_argument("--public-key", help="the published key, hex, to check")
    receipt.add_argument("--ratecards", type=Path, nargs="*", help="rate cards to recompute the price with")

    change = _command(
        commands,
        "adjust",
        "credit, correct or contest a charge: a new entry, nothing that was written changes",
        f"{ledger} --kind credit --amount=-0.25 --request-id ID --reason 'late answer' --reference T-17",
    )
    _add_ledgers(change)
    add_adjust_arguments(change)

    push = _command(
        commands,
        "push",
        "send usage to OpenMeter, Lago, Stripe or a webhook as it comes",
        f"{ledger} --config push.toml --state antefix-data/push",
    )
    _add_ledgers(push)
    add_push_arguments(push)

    again = _command(
        commands,
        "rerate",
        "price records again: an adjustment for each that costs something else",
        f"{ledger} --ratecards deploy/ratecards/deepseek.toml --since 2026-09-01 --dry-run",
    )
    _add_source(again)
    add_rerate_arguments(again)

    rotate = _command(
        commands,
        "rotate-key",
        "make a new receipt key; receipts of the keys before it stay good, and routers take it at a SIGHUP",
        "--key-file antefix-data/ledger/receipts.key",
    )
    rotate.add_argument("--key-file", type=Path, required=True, help="the deployment's receipt key")
    rotate.add_argument("--json", action="store_true", help="print the public keys as JSON, the newest first")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    epilog = f"example: antefix usage {name} {example}"
    return commands.add_parser(name, help=help_text, description=help_text, epilog=epilog)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 where something does not hold, or 2 where the command cannot be carried out."""
    commands = {
        "export": _export,
        "verify": _verify,
        "report": _report,
        "receipt": _receipt,
        "rotate-key": _rotate_key,
        "adjust": run_adjust,
        "push": run_push,
        "rerate": _rerate,
    }
    try:
        return commands[args.usage_command](args)
    except BrokenPipeError:
        raise  # the reader of our output has enough; nothing is wrong
    except (AntefixError, OSError) as err:
        sys.stderr.write(f"antefix usage {args.usage_command}: {err}\n")
        return 2


def _add_ledgers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ledger",
        type=Path,
        required=True,
        nargs="+",
        metavar="DIR",
        help="ledger directories, one for each router, or a directory that holds them",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    _add_ledgers(parser)
    parser.add_argument(
        "--after", type=int, default=0, metavar="CURSOR", help="only entries after this sequence number"
    )
    parser.add_argument("--since", help="only requests that started at or after this date or time (UTC)")
    parser.add_argument("--until", help="only requests that started before this date or time (UTC)")
    parser.add_argument("--tenant", help="only this tenant's")


def _settled(args: argparse.Namespace) -> Iterator[Settled]:
    return (item for _, item in _billed(args) if isinstance(item, Settled))


def _billed(args: argparse.Namespace) -> Iterator[tuple[Path, Settled | Adjusted]]:
    """Chosen records, and adjustments of them, with their ledgers."""
    chosen, chosen_adjustment = _chooser(args), _adjustment_chooser(args)
    ledgers = ledgers_of(args.ledger)
    if args.after and len(ledgers) > 1:
        raise ConfigError("--after is a place in one ledger; export each of several on its own to go on from a cursor")
    for ledger in ledgers:
        for item in read_billed(ledger, after=args.after):
            if chosen(item.record) if isinstance(item, Settled) else chosen_adjustment(item.adjustment):
                yield ledger, item


def _adjustment_chooser(args: argparse.Namespace) -> Callable[[Adjustment], bool]:
    """By when it was made, where records go by when they started."""
    since_us, until_us, tenant = _time_us(args.since), _time_us(args.until), args.tenant

    def chosen(made: Adjustment) -> bool:
        is_early = since_us is not None and made.created_us < since_us
        is_late = until_us is not None and made.created_us >= until_us
        return tenant in (None, made.tenant) and not is_early and not is_late

    return chosen


def _chooser(args: argparse.Namespace) -> Callable[[UsageRecord], bool]:
    """Which records --since, --until and --tenant mean."""
    since_us, until_us, tenant = _time_us(args.since), _time_us(args.until), args.tenant

    def chosen(record: UsageRecord) -> bool:
        is_early = since_us is not None and record.started_us < since_us
        is_late = until_us is not None and record.started_us >= until_us
        return tenant in (None, record.tenant) and not is_early and not is_late

    return chosen


def _export(args: argparse.Namespace) -> int:
    kind = ExportFormat(args.format)
    if kind is ExportFormat.PARQUET and args.output is None:
        raise ConfigError("--format parquet needs --output FILE")
    ledgers, _ = ledgers_of(args.ledger), _chooser(args)
    # Read up to what is there now, so that the cursor says what the next one goes on from.
    ends = {ledger: _last_of(ledger) for ledger in ledgers}
    items = (item for ledger, item in _billed(args) if item.sequence <= ends[ledger])
    if args.output is not None:
        with ProgressLine(f"writing {args.output}"):
            num_records = write_export(items, kind, args.output)
    else:
        num_records = write_text(items, kind, sys.stdout)
    cursors = {source_of(ledger).hex(): max(end, args.after) for ledger, end in ends.items()}
    said: dict[str, object] = {"records": num_records, "cursors": cursors}
    if len(cursors) == 1:
        said["cursor"] = next(iter(cursors.values()))
    sys.stderr.write(json.dumps(said) + "\n" if args.json else f"{num_records} records\n")
    return 0


def _last_of(ledger: Path) -> int:
    """The last entry's number. Reads the whole ledger, so a broken one fails before anything is written."""
    return max((entry.sequence for _, entry in read_entries(ledger)), default=0)


def _verify(args: argparse.Namespace) -> int:
    ledgers = ledgers_of(args.ledger)
    anchors = dict(_anchor(text, ledgers) for text in args.anchor)
    for store_log in args.store_log or ():
        if not store_log.is_dir():
            raise ConfigError(f"--store-log {store_log} is not a directory")
    with ProgressLine("reading the ledger"):
        verdict = verify_all(
            ledgers,
            store_log=args.store_log,
            anchors=anchors,
            signed=read_anchors(args.anchors),
            public_keys=[_public_key(text) for text in args.public_key],
            # The directory that holds them stands for all of them.
            are_all=not any((path / "source").is_file() for path in args.ledger),
        )
    sys.stdout.write(verdict.to_json() + "\n")
    return 0 if verdict.ok else 1


def _public_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"--public-key must be 64 hex digits, is {text!r}")
    return key


def _anchor(text: str, ledgers: Sequence[Path]) -> tuple[bytes, tuple[int, str]]:
    """(source, (sequence, hash)). Raises:  ConfigError: not of that form, or of none of these ledgers."""
    *source, sequence, hash = text.lower().split(":") if text.count(":") in (1, 2) else ("", "", "")
    if not sequence.isdigit() or len(hash) != 64:
        raise ConfigError(f"--anchor must be SEQUENCE:HASH or SOURCE:SEQUENCE:HASH, is {text!r}")
    if not source and len(ledgers) > 1:
        raise ConfigError("with several ledgers --anchor needs the source: SOURCE:SEQUENCE:HASH")
    known = {source_of(ledger).hex(): source_of(ledger) for ledger in ledgers}
    name = source[0] if source else next(iter(known))
    if name not in known:
        raise ConfigError(f"--anchor names ledger {name}, which is not among these")
    return known[name], (int(sequence), hash)


def _report(args: argparse.Namespace) -> int:
    by = tuple(name.strip() for name in args.by.split(",") if name.strip())
    cards = load_cards(args.ratecards) if args.ratecards else None
    with ProgressLine("reading the ledger"):
        items = [item for _, item in _billed(args)]
        records = [item.record for item in items if isinstance(item, Settled)]
        adjustments = [item.adjustment for item in items if isinstance(item, Adjusted)]
        lines = report.summarize(records, by, cards=cards, adjustments=adjustments)
    if args.savings:
        rows = report.remedies(records, cards)
        sys.stdout.write(
            (json.dumps(rows, indent=2) if args.json else report.remedies_text(rows, has_prices=cards is not None))
            + "\n"
        )
        return 0
    sys.stdout.write((report.as_json(lines, by) if args.json else report.as_text(lines, by)) + "\n")
    if args.plot is not None:
        report.plot((item.record for item in _settled(args)), args.plot)
    return 0


def _receipt(args: argparse.Namespace) -> int:
    if args.check is not None:
        return _check_receipt(args)
    if not (args.ledger and args.request_id and args.key_file):
        raise ConfigError(
            "issuing needs --ledger, --request-id and --key-file; checking needs --check and --public-key"
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


def _rerate(args: argparse.Namespace) -> int:
    if args.after:
        raise ConfigError("rerate needs all of a ledger; choose records with --since, --until, --tenant and --model")
    return run_rerate(args, _chooser(args))


def _rotate_key(args: argparse.Namespace) -> int:
    signer = Signer.rotate(args.key_file)
    keys = [key.hex() for key in signer.public_keys]
    sys.stdout.write(json.dumps({"public_keys": keys}) + "\n" if args.json else f"public key {keys[0]}\n")
    return 0


def _check_receipt(args: argparse.Namespace) -> int:
    try:
        receipt, key = read_json(args.check, "receipt"), bytes.fromhex(args.public_key or "")
    except ValueError as err:
        raise ConfigError(f"the receipt must be JSON and --public-key 64 hex digits: {err}") from err
    checked = check_receipt(receipt, key, load_cards(args.ratecards) if args.ratecards else None)
    result: dict[str, object] = {"ok": checked.ok, "signature_ok": checked.signature_ok, "hash_ok": checked.hash_ok}
    result["price_ok"] = checked.price_ok if checked.price_ok is not None else "not checked"
    sys.stdout.write(json.dumps({**result, "record": checked.record.to_dict()}, indent=2) + "\n")
    return 0 if checked.ok else 1


def _time_us(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise ConfigError(f"{text!r} is not a date or time like 2026-09-10 or 2026-09-10T06:00:00Z") from err
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return int(moment.timestamp() * 1_000_000)
    except (OverflowError, ValueError) as err:
        raise ConfigError(f"{text!r} is before or after all times in UTC") from err
