"""`antefix keys`: makes, lists, replaces and revokes API keys. Routers see a change within seconds, without a
restart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from antefix.config import add_flags, given_flags, require
from antefix.errors import ConfigError
from antefix.private_file import write_private
from antefix.redis_access import RedisAccess
from antefix.secret import Keyring
from antefix.text_table import text_table
from antefix.worker_settings import WorkerSettings
from antefix_billing.api_keys import USUAL_SCOPES, ApiKey, KeyBook, Scope, new_key, revoke, rotate
from antefix_billing.key_file import changing, create_book, read_book, write_book
from antefix_router.key_exchange import KeyExchange

DEFAULT_FILE: Final = Path("antefix-data/api-keys.json")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# A command's change to the key book. Returns the new key in plain text (empty if it made none) and the new book.
Change = Callable[[KeyBook], tuple[str, KeyBook]]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` with its subcommands; `run` runs them."""
    add_arguments(subparsers.add_parser("keys", help="make, list, replace and revoke API keys"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `antefix keys`."""
    commands = parser.add_subparsers(dest="keys_command", required=True)

    create = _command(commands, "create", "make a key and show it, once", "acme --scopes generate --expires 90d")
    create.add_argument("tenant", help="tenant whose key it is")
    create.add_argument(
        "--scopes",
        default=",".join(sorted(USUAL_SCOPES)),
        help=f"scopes of the key, out of {', '.join(Scope)}, separated by commas (default: %(default)s)",
    )
    create.add_argument("--note", default="", help="label that is shown with the key in lists")
    _add_making(create)

    follow = _command(commands, "rotate", "make a key that replaces another one", "3f9c01ab --overlap 24h")
    follow.add_argument("id", help="id of the key to replace")
    follow.add_argument(
        "--overlap",
        default="24h",
        metavar="TIME",
        help="how long the old key stays valid after the replacement (default: 24h)",
    )
    _add_making(follow)

    end = _command(commands, "revoke", "end a key now", "3f9c01ab")
    end.add_argument("id", nargs="+", help="ids of the keys to revoke")
    end.set_defaults(output=None)
    _add_file(end)

    show = _command(commands, "list", "list keys, without their secret part", "--tenant acme")
    show.add_argument("--tenant", help="only this tenant's")
    _add_file(show)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    epilog = f"example: antefix keys {name} {example}"
    return commands.add_parser(name, help=help_text, description=help_text, epilog=epilog)


def _add_making(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expires",
        default="",
        metavar="WHEN",
        help="when the key expires, as a UTC date or time, or as a time from now such as 90d or 12h",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="write the key to this file instead of printing it; only the owner may read the file",
    )
    _add_file(parser)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--file", type=Path, default=DEFAULT_FILE, help="the routers' --api-keys-file (default: %(default)s)"
    )
    group = parser.add_argument_group("routers on several hosts", "as they have --keys-redis")
    group.add_argument("--redis", default="", metavar="URL", help="the routers' --keys-redis")
    add_flags(group, WorkerSettings, ("redis_password_file", "redis_ca_file"))
    group.add_argument(
        "--secret-file", default="", metavar="FILE", help="file with the deployment's secret, which signs the keys"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.keys_command == "list":
        _list(args, _book(args))
        return 0
    text, before, after = asyncio.run(_change(args, _change_of(args)))
    made = [key for key in after.keys if key.id not in {each.id for each in before.keys}]
    if args.output is not None and text:
        write_private(args.output, text + "\n")
    _tell(args, text if args.output is None else "", made)
    return 0


def _change_of(args: argparse.Namespace) -> Change:
    if args.keys_command == "create":
        return lambda book: _created(args, book)
    if args.keys_command == "rotate":
        until = datetime.now(UTC).replace(microsecond=0) + _duration(args.overlap, "--overlap")
        return lambda book: rotate(book, args.id, until=until, expires=_moment(args.expires))
    return lambda book: _revoked(args, book)


def _created(args: argparse.Namespace, book: KeyBook) -> tuple[str, KeyBook]:
    text, key = new_key(args.tenant, _scopes(args.scopes), expires=_moment(args.expires), note=args.note)
    return text, book.added(key)


def _revoked(args: argparse.Namespace, book: KeyBook) -> tuple[str, KeyBook]:
    for key_id in args.id:
        book = revoke(book, key_id)
    return "", book


async def _change(args: argparse.Namespace, change: Change) -> tuple[str, KeyBook, KeyBook]:
    """Write to Redis first; if somebody else has changed the keys in Redis meanwhile, nothing is changed."""
    if args.keys_command == "create":
        args.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    exchange = _exchange(args)
    try:
        with changing(args.file):
            book = create_book(args.file) if args.keys_command == "create" else read_book(args.file)
            if exchange is not None:
                book = await exchange.get(newer_than=book.number) or book
            text, changed = change(book)
            if exchange is not None:
                await exchange.put(changed)
            write_book(args.file, changed)
    finally:
        if exchange is not None:
            await exchange.close()
    return text, book, changed


def _exchange(args: argparse.Namespace) -> KeyExchange | None:
    if not args.redis:
        return None
    require(bool(args.secret_file), "--redis needs --secret-file: routers believe only keys that it signs")
    access = RedisAccess.of(args.redis, WorkerSettings(**given_flags(WorkerSettings, args)))
    return KeyExchange(access, Keyring.from_file(args.secret_file))


def _book(args: argparse.Namespace) -> KeyBook:
    async def newest() -> KeyBook:
        book, exchange = read_book(args.file), _exchange(args)
        if exchange is None:
            return book
        try:
            return await exchange.get(newer_than=book.number) or book
        finally:
            await exchange.close()

    return asyncio.run(newest())


def _tell(args: argparse.Namespace, text: str, made: list[ApiKey]) -> None:
    shown = [{**_shown(key), **({"key": text} if text else {})} for key in made]
    if args.json:
        print(json.dumps(shown if args.keys_command != "revoke" else {"revoked": args.id}))
        return
    if text:
        # Only the key goes to standard output, so that it can be piped.
        print(text)
    what = ", ".join(f"key {key.id} of {key.tenant}" for key in made) or f"revoked {', '.join(args.id)}"
    where = f", in {args.output}" if text == "" and made else ""
    print(f"{what}{where}; routers with this file take it within 5 s", file=sys.stderr)
    if text:
        print("It is shown this once: only its SHA-256 is kept.", file=sys.stderr)


def _list(args: argparse.Namespace, book: KeyBook) -> None:
    rows = [_shown(key) for key in book.keys if args.tenant in (None, key.tenant)]
    if args.json:
        print(json.dumps({"number": book.number, "keys": rows}))
        return
    names = ("id", "tenant", "scopes", "state", "created", "expires", "note")
    print(text_table(names, ([str(row[name]) for name in names] for row in rows), num_left=len(names)))


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": ",".join(sorted(key.scopes)),
        "state": key.state(datetime.now(UTC)),
        "created": key.created.isoformat(),
        "expires": key.expires.isoformat() if key.expires else "",
        "revoked": key.revoked.isoformat() if key.revoked else "",
        "note": key.note,
    }


def _scopes(text: str) -> frozenset[Scope]:
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := names - set(Scope):
        raise ConfigError(f"--scopes may have only {', '.join(Scope)}; {', '.join(sorted(unknown))} is not one of them")
    return frozenset(Scope(name) for name in names)


def _moment(text: str) -> datetime | None:
    """A text that is a date, a time, or a duration from now. Raises: ConfigError: the text is neither a date, a time
    nor a duration.
    """
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return datetime.now(UTC).replace(microsecond=0) + _duration(text, "--expires")
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _duration(text: str, flag: str) -> timedelta:
    number, unit = text[:-1], text[-1:]
    if not number.isascii() or not number.isdigit() or unit not in _UNITS or len(number) > 6:
        raise ConfigError(f"{flag} must be a time like 90d, 12h, 30m or 45s, is {text!r}")
    return timedelta(seconds=int(number) * _UNITS[unit])
