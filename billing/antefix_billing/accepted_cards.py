"""The rate cards by which a ledger's records were last priced. The cards are kept next to the ledger.

When a router starts, it compares its rate cards with the cards kept here. A running router accepts changed cards only
if they leave the prices of existing records as they are. The same rule holds for a start.

    ratecards.json    each file's name and text; the file is always replaced as a whole
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from antefix.checked_files import read_json, read_toml_text
from antefix.errors import ConfigError
from antefix.private_file import write_private
from antefix_billing.ratecard import RateCards, parse_cards

_FILE: Final = "ratecards.json"


def texts_of(paths: Sequence[str | Path]) -> dict[str, str]:
    """The text of each file.  Raises:  ConfigError: the file of kept cards cannot be read."""
    return {str(path): read_toml_text(path, "rate cards") for path in paths}


def accepted_texts(ledger: Path) -> dict[str, str] | None:
    """The texts of the cards kept with this ledger. Returns None if no cards are kept yet, as in ledgers written before
    version 0.2.

    Raises:  ConfigError: the file is damaged.
    """
    path = ledger / _FILE
    if not path.exists():
        return None
    found = read_json(path, "accepted rate cards")
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(
            f"{path} is damaged: restore it from a copy, or delete it to start from the price files as they are now"
        )
    return found


def accepted_cards(ledger: Path) -> RateCards | None:
    """The cards kept with this ledger, or None if none are kept yet.  Raises:  ConfigError: the file is damaged."""
    texts = accepted_texts(ledger)
    return None if texts is None else parse_cards(texts)


def accept_cards(ledger: Path, texts: dict[str, str]) -> None:
    """Keep these cards with the ledger: from now on they price its records.  Raises:  OSError."""
    write_private(ledger / _FILE, json.dumps(texts, indent=1) + "\n")
