"""The rate cards that a ledger's records were last priced by, kept next to it: what cards at the next start are held
against. A router takes other cards while it runs only where they leave priced records alone; so must a start.

    ratecards.json    each file's name and text, replaced as a whole
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
    """What the files say.  Raises:  ConfigError: one cannot be read."""
    return {str(path): read_toml_text(path, "rate cards") for path in paths}


def accepted_texts(ledger: Path) -> dict[str, str] | None:
    """None: none were kept yet, as in ledgers of before 0.2.  Raises:  ConfigError: the file is damaged."""
    path = ledger / _FILE
    if not path.exists():
        return None
    found = read_json(path, "accepted rate cards")
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(f"{path} is damaged: put it back from a copy, or remove it to take the cards as they are now")
    return found


def accepted_cards(ledger: Path) -> RateCards | None:
    """None: none were kept yet.  Raises:  ConfigError: the file is damaged."""
    texts = accepted_texts(ledger)
    return None if texts is None else parse_cards(texts)


def accept_cards(ledger: Path, texts: dict[str, str]) -> None:
    """Records are priced by these from now on.  Raises:  OSError."""
    write_private(ledger / _FILE, json.dumps(texts, indent=1) + "\n")
