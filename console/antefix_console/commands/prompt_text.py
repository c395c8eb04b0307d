"""The text that a command works on: an argument, a file or standard input. Text that is not UTF-8 is refused."""

from __future__ import annotations

import sys
from pathlib import Path

from antefix.errors import InvalidRequest


def given_text(text: str) -> str:
    """An argument's text.

    Raises:  InvalidRequest: it held bytes that are not UTF-8, which Python passes as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise InvalidRequest(f"the prompt is not UTF-8 text (at character {err.start}); nothing was sent") from err
    return text


def read_text(path: Path) -> str:
    """A file's text; `-` is standard input.

    Raises:  InvalidRequest: the file cannot be read, or is not UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode()
    except UnicodeDecodeError as err:
        raise InvalidRequest(f"{name} is not UTF-8 text (at byte {err.start}); nothing was sent") from err
    except OSError as err:
        raise InvalidRequest(f"{name} cannot be read: {err.strerror}") from err
