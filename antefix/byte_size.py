"""Sizes in bytes as people write them. Settings, strategies, quotas and the simulator all read them here.

The grammar is that of GNU's `dd`, `du` and `truncate`, with letters in either case:

    number                    bytes              1048576
    number K, M, G, T         powers of 1024     200G   = 200 * 2^30
    number KiB, MiB, GiB, TiB powers of 1024     200GiB = 200 * 2^30
    number KB, MB, GB, TB     powers of 1000     200GB  = 200 * 10^9

"B" alone may follow a plain number. A number with a unit may have a fraction; a remaining fraction of a byte is
dropped. Spaces may stand around the number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from antefix.checked_table import shown
from antefix.errors import ConfigError

_SIZE: Final = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*(b|[kmgt](?:i?b)?)?\s*", re.IGNORECASE | re.ASCII)
_POWERS: Final = {"k": 1, "m": 2, "g": 3, "t": 4}
# The largest number that fits a signed 64-bit field of protobuf and of the disk format.
SIZE_MAX: Final = (1 << 63) - 1
ACCEPTED: Final = "1048576, 200G or 200GiB (powers of 1024), or 200GB (powers of 1000)"


def parse_byte_size(value: str | int) -> int:
    """Bytes from a number, or from text of the grammar above.

    Raises:  ConfigError: anything else, or more than 2^63 - 1 bytes.
    """
    # `shown` is safe for integers of thousands of digits, which Python refuses to print.
    match = _SIZE.fullmatch(value if isinstance(value, str) else shown(value))
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{shown(value)} is not a size in bytes: write {ACCEPTED}")
    number, unit = Fraction(match[1]), (match[2] or "").lower().removeprefix("b")
    if not unit and number.denominator != 1:
        raise ConfigError(f"{shown(value)} is not a whole number of bytes")
    base = 1000 if unit.endswith("b") and not unit.endswith("ib") else 1024
    nbytes = int(number * base ** _POWERS[unit[0]]) if unit else int(number)
    if nbytes > SIZE_MAX:
        raise ConfigError(f"{shown(value)} is more than {SIZE_MAX} bytes")
    return nbytes
