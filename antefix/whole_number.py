"""Whole numbers as outside texts write them: ASCII digits and nothing else, of a bounded length.

`int` alone reads too much (signs, spaces, digits of other scripts) and fails for over 4,300 digits. `str.isdigit`
accepts characters that `int` refuses, such as superscripts.
"""

from __future__ import annotations

from typing import Final

_DIGITS_MAX: Final = 20
# The largest that protobuf, Redis and our files hold.
_INT64_MAX: Final = (1 << 63) - 1


def whole_number(text: str | bytes | None, most: int = _INT64_MAX) -> int | None:
    """The number that `text` writes, from 0 to `most`; None if it writes none, or a larger one."""
    if not text or len(text) > _DIGITS_MAX or not (text.isascii() and text.isdigit()):
        return None
    number = int(text)
    return number if number <= most else None
