"""Names of arithmetics that were measured with a directory before. For processes without torch too."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def known_names(directory: str) -> list[str]:
    """Of every arithmetic that was ever measured with this directory: other set-ups of the same host or deployment."""
    names = set()
    for file in sorted(Path(directory).glob("*.json")) if directory else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names.add(str(json.loads(file.read_text())["arithmetic"]["name"]))
    return sorted(names)
