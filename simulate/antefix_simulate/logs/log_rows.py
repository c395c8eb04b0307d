"""Rows of a log file: JSON lines, one JSON value, or CSV; plain or .gz. Rows that are no JSON objects are counted and
left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from antefix.checked_files import parse_json
from antefix.errors import InvalidRequest
from antefix_simulate.logs.logged_call import Ignored

# Size limit of a file that is one JSON value, which must be read as a whole.
WHOLE_BYTES_MAX: Final = 1 << 30
# Size limit of a line: no prompt is longer, even with a million tokens of text, and images.
LINE_BYTES_MAX: Final = 256 << 20
# Names of the list of rows in answers of other programs' APIs.
_LISTS: Final = ("data", "observations", "logs", "results", "items")


def json_rows(path: Path, ignored: Ignored) -> Iterator[dict[str, Any]]:
    """The objects of a file: one per line, or those of one JSON list, also of a list in an object.

    Lines that are not JSON are counted, because the last line of a log that is still being written is cut off.
    Raises:  InvalidRequest: the file cannot be read to its end, or a line is too long.
    """
    if path.suffixes[-2:] in ([".csv", ".gz"], [".csv"]) or path.suffix == ".csv":
        yield from _csv_rows(path)
        return
    lines = text_lines(path)
    first = next((line for line in lines if line.strip()), "")
    if _begins_a_value(first):
        yield from _rows_of(_whole(itertools.chain([first], lines), path), ignored)
        return
    for line in itertools.chain([first], lines):
        if line.strip():
            try:
                yield from _rows_of(parse_json(line, path.name), ignored)
            except InvalidRequest:
                ignored.count("lines that are not JSON")


def text_lines(path: Path) -> Iterator[str]:
    """Raises:  InvalidRequest: the file cannot be read to its end, is not text, or has a line that is too long."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            while line := file.readline(LINE_BYTES_MAX):
                if len(line) >= LINE_BYTES_MAX:
                    raise InvalidRequest(f"a line of {path.name} is longer than {LINE_BYTES_MAX} bytes")
                yield line
    except (OSError, EOFError, zlib.error) as err:
        raise InvalidRequest(f"{path} cannot be read to its end: {getattr(err, 'strerror', None) or err}") from err


def unpacked(value: Any) -> Any:
    """The value of a field. Exports may write JSON inside a string, which is then parsed."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return parse_json(value, "a field")
        except InvalidRequest:
            return value
    return value


def _begins_a_value(first: str) -> bool:
    """Whether the first line begins a value of many lines, instead of being a row."""
    if first.lstrip()[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return first.lstrip()[:1] == "[" or first.strip() == "{"


def _whole(lines: Iterable[str], path: Path) -> Any:
    text, length = io.StringIO(), 0
    for line in lines:
        length += text.write(line)
        if length > WHOLE_BYTES_MAX:
            raise InvalidRequest(
                f"{path.name} is one JSON value of more than {WHOLE_BYTES_MAX} bytes: write the log with one "
                "row per line"
            )
    return parse_json(text.getvalue(), path.name)


def _rows_of(value: Any, ignored: Ignored) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for each in value:
            yield from _rows_of(each, ignored)
    elif isinstance(value, dict):
        lists = [value[name] for name in _LISTS if isinstance(value.get(name), list)]
        inside = next((each for each in lists if each and all(isinstance(row, dict) for row in each)), None)
        if inside is None:
            yield value
        else:
            yield from inside
    else:
        ignored.count("rows that are no objects")


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LINE_BYTES_MAX)
    try:
        for row in csv.DictReader(text_lines(path)):
            yield {name: unpacked(value) for name, value in row.items() if name and value not in (None, "")}
    except csv.Error as err:
        raise InvalidRequest(f"{path.name} is not CSV: {err}") from err
