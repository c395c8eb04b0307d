"""Hands adjustments to a ledger that a running router writes: one file per adjustment in the directory `inbox`.

The router reads these files and writes their adjustments into the ledger. No API key is needed, because an operator who
can write this directory could also write the ledger. A file that was processed but not removed does no harm, because
the ledger takes each adjustment id only once.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from antefix.checked_files import read_json
from antefix.errors import AntefixError, ConfigError, Unavailable
from antefix.private_file import DIRECTORY_MODE, write_private
from antefix_billing.adjustment import Adjustment
from antefix_billing.ledger import Ledger

INBOX: Final = "inbox"
_WAIT_S: Final = 15.0
_NUM_A_FILE: Final = 1000


def adjust(directory: Path, adjustments: Sequence[Adjustment]) -> None:
    """Write adjustments into the ledger, through its router if one is running. When this returns, the adjustments are
    durable.

    Raises:  Unavailable: the router does not process them.  ConfigError: the ledger cannot be written.
    """
    try:
        ledger = Ledger(directory)
    except ConfigError as err:
        if "another process writes" not in str(err):
            raise
        for start in range(0, len(adjustments), _NUM_A_FILE):
            _hand_over(directory, adjustments[start : start + _NUM_A_FILE])
        return
    try:
        for start in range(0, len(adjustments), _NUM_A_FILE):
            ledger.append(adjustments[start : start + _NUM_A_FILE])
    finally:
        ledger.close()


def _hand_over(directory: Path, adjustments: Sequence[Adjustment]) -> None:
    inbox = directory / INBOX
    inbox.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    path = inbox / f"{time.time_ns()}-{secrets.token_hex(4)}.json"
    write_private(path, json.dumps([each.to_dict() for each in adjustments]) + "\n")
    deadline = time.monotonic() + _WAIT_S
    while path.exists():
        if time.monotonic() > deadline:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                raise Unavailable(f"the router that writes {directory} does not accept adjustments; its log says why")
            return
        time.sleep(0.05)


def waiting(directory: Path) -> list[Path]:
    return sorted((directory / INBOX).glob("*.json"))


def read_waiting(path: Path) -> list[Adjustment]:
    """The adjustments in one inbox file.  Raises:  ConfigError: the file does not hold adjustments."""
    rows = read_json(path, "adjustments")
    try:
        return [Adjustment.from_dict(row) for row in rows]
    except (AntefixError, TypeError) as err:
        raise ConfigError(f"adjustments {path}: {err}") from err
