"""Checks that the strings of a JSON value are valid text, and that its numbers are finite. Pure.

JSON can contain half of a surrogate pair, escaped or as three bytes. Such a string cannot be shown to a model, hashed,
or put into a record. So text with half a pair is refused when a request arrives, with the name of the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

_ESCAPED: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_RAW: Final = re.compile(rb"\xed[\xa0-\xbf]")
_REPLACED: Final = re.compile("[\ud800-\udfff]")


def is_text(text: str) -> bool:
    """Whether the string can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def may_hold_surrogates(body: bytes | bytearray) -> bool:
    """Whether the body may hold half of a surrogate pair. If it cannot, a body of megabytes need not be searched value
    by value.
    """
    is_utf8 = b"\x00" not in body[:4]
    return not is_utf8 or _ESCAPED.search(body) is not None or _RAW.search(body) is not None


def path_of_no_text(value: Any) -> str | None:
    """The JSON path of the first string that is not valid text, or of the object with such a key; None if all are
    valid.

    "" is the value itself.
    """
    for path, item in _items(value):
        if isinstance(item, str) and not is_text(item):
            return path
        if isinstance(item, dict) and not all(is_text(key) for key in item):
            return f"{path} (the name of a field)" if path else "the name of a field"
    return None


def path_of_no_number(value: Any) -> str | None:
    """The JSON path of the first number that is NaN or infinite; None if there is none. "" is the value itself."""
    return next((path for path, item in _items(value) if isinstance(item, float) and not math.isfinite(item)), None)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """The value and all values inside it, each with its JSON path, in the order of the text."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, item = todo.pop()
        yield path, item
        if isinstance(item, dict):
            todo += [(f"{path}.{key}" if path else key, inner) for key, inner in reversed(item.items())]
        if isinstance(item, list):
            todo += [(f"{path}[{index}]", inner) for index, inner in reversed([*enumerate(item)])]


def as_text(value: Any) -> Any:
    """A JSON value with U+FFFD in place of invalid text. The replacement is used in the model's output, which cannot be
    refused.
    """
    if isinstance(value, str):
        return _REPLACED.sub("\ufffd", value)
    if isinstance(value, dict):
        return {as_text(key): as_text(inner) for key, inner in value.items()}
    return [as_text(inner) for inner in value] if isinstance(value, list) else value
