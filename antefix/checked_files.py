"""Reads TOML and JSON files written by people and other programs, with limits on size, depth and time.

A file that cannot be read, or exceeds a limit, gives a one-line error. The types and ranges of the values in the file
are checked by `checked_table`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import select
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from antefix.errors import ConfigError, InvalidRequest

# A tenants file has about 200 bytes per tenant with a key and limits.
TOML_BYTES_MAX: Final = 4 << 20
# The largest known file of a model, a tokenizer.json, has 33 MB.
JSON_BYTES_MAX: Final = 256 << 20
# tomllib takes quadratic time for a dotted name of many parts: 24 s for 20,000 parts.
_NAME_PARTS_MAX: Final = 64
_DIGITS_MAX: Final = 40
_PIPE_S: Final = 10.0
_SPLIT_NAMES: Final = re.compile(r"[={,\[\]]")


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file. what: the setting or the kind of file, for the error message.

    Raises:  ConfigError: it cannot be read, is too large, or is not TOML.
    """
    return parse_toml(read_toml_text(path, what), f"{what} {path}")


def read_toml_text(path: str | Path, what: str) -> str:
    """The text of a TOML file, for `parse_toml`.  Raises:  ConfigError: the file cannot be read, or is too large."""
    return read_text(path, what, bytes_max=TOML_BYTES_MAX)


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text. where: the kind of file and its name, for the error message.

    Raises:  ConfigError: the text is not TOML.
    """
    try:
        for number, line in enumerate(text.splitlines(), 1):
            if any(part.count(".") > _NAME_PARTS_MAX for part in _SPLIT_NAMES.split(_without_strings(line))):
                raise ConfigError(f"line {number} has a name with more than {_NAME_PARTS_MAX} parts separated by dots")
        return tomllib.loads(text)
    except (ConfigError, ValueError, RecursionError) as err:
        raise ConfigError(f"{where}: {_reason(err)}") from err


def read_json(path: str | Path, what: str, *, error: type[InvalidRequest] = ConfigError, infinity: bool = False) -> Any:
    """The value in a JSON file.  what: as for `read_toml`.  infinity: whether the file may hold Infinity and NaN.

    Raises:  `error`: the file cannot be read, is too large, or is not JSON as `parse_json` accepts it.
    """
    text = read_text(path, what, error=error, bytes_max=JSON_BYTES_MAX)
    return parse_json(text, f"{what} {path}", error=error, infinity=infinity)


def parse_json(
    text: str | bytes, what: str, *, error: type[InvalidRequest] = InvalidRequest, infinity: bool = False
) -> Any:
    """The value of a JSON text. Numbers must fit a float; Python's parser would accept NaN and integers of any length.

    Raises:  `error`: the text is not JSON, is nested too deeply, or has a number that is not finite or too long.
    """
    try:
        return json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=float if infinity else _finite)
    except (ValueError, RecursionError) as err:
        raise error(f"{what}: the text is not JSON: {_reason(err)}") from err


def read_text(
    path: str | Path, what: str, *, error: type[InvalidRequest] = ConfigError, bytes_max: int = JSON_BYTES_MAX
) -> str:
    """The text of a file or a pipe.

    Raises:  `error`: it cannot be read, is not UTF-8, or has more than `bytes_max` bytes.
    """
    try:
        data = read_bytes(path, bytes_max)
        if len(data) > bytes_max:
            raise error(f"{what} {path}: the file has more than {bytes_max} bytes")
        # Editors on Windows write a byte order mark first.
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as err:  # ValueError: not UTF-8, or a path with a NUL in it
        if isinstance(err, error):
            raise
        raise error(f"{what} {path}: {_reason(err)}") from err


def read_bytes(path: str | Path, nbytes_max: int) -> bytes:
    """The bytes of a file or a pipe, at most the first `nbytes_max` + 1.

    Raises:  OSError: it cannot be read, or it is a pipe or device that gives no bytes for 10 s.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer and block signal handlers.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return file.read(nbytes_max + 1)
        return b"".join(_pieces(descriptor, nbytes_max + 1))


def _pieces(descriptor: int, nbytes: int) -> Iterator[bytes]:
    """Up to `nbytes` bytes of a pipe, as they arrive."""
    is_begun, until_s = False, time.monotonic() + _PIPE_S
    while nbytes > 0:
        left_s = until_s - time.monotonic()
        if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
            raise TimeoutError(errno.ETIMEDOUT, f"no data came from this pipe for {_PIPE_S:g} s")
        with contextlib.suppress(BlockingIOError):
            if piece := os.read(descriptor, min(nbytes, 1 << 16)):
                is_begun, until_s = True, time.monotonic() + _PIPE_S
                nbytes -= len(piece)
                yield piece
            elif is_begun:
                return
            else:
                time.sleep(0.01)  # the pipe has no writer yet, which read() reports as its end


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS_MAX:
        raise ValueError(f"a number has more than {_DIGITS_MAX} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.40} is not a finite number")
    return number


def _without_strings(line: str) -> str:
    """The line without quoted strings: names in quotes may have any number of dots, so only unquoted names are
    checked.
    """
    return re.sub(r'"[^"]*"|\'[^\']*\'', "", line) if len(line) > _NAME_PARTS_MAX else line


def _reason(err: Exception) -> str:
    if isinstance(err, RecursionError):
        return "it is nested too deeply"
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    return str(err)
