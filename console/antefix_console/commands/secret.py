"""`antefix secret`: replaces the deployment's secret step by step, while KV stored under the old one is still used.

No command shows a secret. Each generation is shown with a digest, so that two files can be compared.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from antefix.errors import ConfigError, InvalidRequest
from antefix.events.event_seal import EventKeys
from antefix.private_file import FILE_MODE, write_private
from antefix.secret import GENERATION_MAX, SECRET_BYTES, Keyring, create_secret_file, read_generations

DEFAULT_FILE: Final = Path("antefix-data/secret")
Generations = list[tuple[int, bytes]]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `secret` with its subcommands; `run` runs them."""
    add_arguments(subparsers.add_parser("secret", help="make, show and change the deployment's secret"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `antefix secret`."""
    commands = parser.add_subparsers(dest="secret_command", required=True)
    _command(commands, "create", "make the file, if it is not there", "antefix-data/secret")
    _command(
        commands, "show", "show the generations, and which one new records are written with", "antefix-data/secret"
    )
    add = _command(commands, "rotate", "write with a new secret, and continue reading with the old ones", "secret")
    add.add_argument(
        "--stage",
        action="store_true",
        help=(
            "use the new secret only to read at first; give the file to all services, then rotate again without --stage"
        ),
    )
    drop = _command(commands, "drop", "stop reading with a generation, so that its records become misses", "secret 1")
    drop.add_argument(
        "generation", type=int, help="number of the secret's generation, as `antefix secret show` prints it"
    )
    _command(
        commands,
        "events-key",
        "the key that signs events in Redis, for the store's --events-key-file",
        "secret > events.key",
    )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    epilog = f"example: antefix secret {name} {example}"
    parser = commands.add_parser(name, help=help_text, description=help_text, epilog=epilog)
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT_FILE, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.secret_command == "create":
        create_secret_file(args.file)
    elif args.secret_command == "events-key":
        sys.stdout.write(EventKeys.of(Keyring.from_file(args.file)).lines())
        return 0
    elif args.secret_command == "rotate":
        with _changing(args.file):
            _write(args.file, rotated(read_generations(args.file), stage=args.stage))
    elif args.secret_command == "drop":
        with _changing(args.file):
            _write(args.file, dropped(read_generations(args.file), args.generation))
    _show(args)
    return 0


def rotated(generations: Generations, *, stage: bool = False) -> Generations:
    """Add a new secret. The new secret becomes the current one at once; with `stage` it is used for reading only, until
    the next rotation makes it the current one.

    Raises:  InvalidRequest: a secret is staged already, or generation numbers are used up.
    """
    current, newest = generations[0][0], max(number for number, _ in generations)
    staged = newest if newest > current else 0
    if staged and stage:
        raise InvalidRequest(
            f"generation {staged} of the secret is staged already: once all services have it, rotate without --stage"
        )
    if staged:
        first = next(each for each in generations if each[0] == staged)
        return [first, *(each for each in generations if each[0] != staged)]
    if newest >= GENERATION_MAX:
        raise InvalidRequest(f"generations end at {GENERATION_MAX}")
    fresh = (newest + 1, secrets.token_bytes(SECRET_BYTES))
    return [generations[0], fresh, *generations[1:]] if stage else [fresh, *generations]


def dropped(generations: Generations, number: int) -> Generations:
    """Raises:  InvalidRequest: no generation has that number, or it is the current one, which new KV is written
    under.
    """
    if number == generations[0][0]:
        raise InvalidRequest(f"records are written with generation {number} of the secret: rotate the secret first")
    rest = [each for each in generations if each[0] != number]
    if len(rest) == len(generations):
        raise InvalidRequest(f"there is no generation {number}")
    return rest


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Lock the secret file, because two rotations at the same time would make two secrets with one number."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, FILE_MODE)
    except OSError as err:
        raise ConfigError(f"secret file {path}: {err}") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(path: Path, generations: Generations) -> None:
    text = "".join(f"{number} {secret.hex()}\n" for number, secret in generations)
    # Validates the secrets before they are written.
    Keyring(generations[0][1], generation=generations[0][0], older=dict(generations[1:]))
    write_private(path, text)


def _show(args: argparse.Namespace) -> None:
    generations = read_generations(args.file)
    rows = [
        {"generation": number, "use": "write and read" if index == 0 else "read", "digest": _digest(secret)}
        for index, (number, secret) in enumerate(generations)
    ]
    if args.json:
        print(json.dumps({"generations": rows}))
        return
    for row in rows:
        print(f"generation {row['generation']:<6} {row['use']:<15} digest {row['digest']}")
    if args.secret_command in ("rotate", "drop"):
        print("Give this file to all workers and routers and restart them, one after the other.", file=sys.stderr)


def _digest(secret: bytes) -> str:
    """A digest that tells secrets apart and reveals nothing of them, because they have at least 128 random bits."""
    return hashlib.blake2b(secret, digest_size=4, person=b"antefix-shown").hexdigest()
