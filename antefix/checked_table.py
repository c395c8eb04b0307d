"""Reads a table of a TOML or JSON file field by field, checking types, ranges, finiteness, sizes and unknown names.

All settings files are read with this, so the same mistake always gives the same message: the place, the field, and the
values that the field takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from antefix.errors import ConfigError

CHARACTERS_MAX: Final = 4096
# The largest integer that a float, a signed 64-bit number and other programs hold exactly.
INTEGER_MAX: Final = 1 << 53
_MISSING: Final = object()
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Table:
    """A table of a settings file. where: the start of its error messages, such as "tenants file t.toml: tenant 3"."""

    def __init__(self, values: Any, where: str) -> None:
        """Raises:  ConfigError: `values` is not a table."""
        self.where = where
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be a table of names and values, is {shown(values)}")
        self._values: dict[str, Any] = dict(values)

    def wrong(self, name: str, what: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {what}, is {shown(value)}")

    def has(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The field's value, unchecked.  Raises:  ConfigError: the field is missing, and has no default."""
        value = self._values.pop(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self.where}: {name} is missing")
        return value

    def text(self, name: str, default: str | None = None, *, empty: bool = False) -> str:
        """One line of text.  empty: whether the text may be empty."""
        value = self.take(name) if default is None else self.take(name, default)
        return self._text(name, value, empty=empty or default == "")

    def texts(self, name: str, default: Collection[str] | None = None) -> tuple[str, ...]:
        """A list of strings. A single string is refused where a list is expected, because a string would be read letter
        by letter.
        """
        value = self.take(name) if default is None else self.take(name, list(default))
        if not isinstance(value, list):
            raise self.wrong(name, 'a list of strings, such as ["a", "b"]', value)
        return tuple(self._text(f"{name}[{number}]", each) for number, each in enumerate(value))

    def one_of(self, name: str, choices: Collection[str], default: str | None = None) -> str:
        value = self.take(name) if default is None else self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}", value)
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 0, high: int = INTEGER_MAX) -> int | None:
        """An integer from `low` to `high`. None: the field is missing from the file and has no default."""
        if not self.has(name):
            return default
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return int(value)

    def decimal(self, name: str, default: str | None = None, *, below: int, decimals: int) -> Decimal:
        """A decimal number given as a string, so that it is never rounded to a float: at least 0, less than `below`,
        and with at most `decimals` decimals.
        """
        value = self.take(name) if default is None else self.take(name, default)
        what = f'a string of digits like "0.15", at least 0 and below {below}, with {decimals} decimals at most'
        if not isinstance(value, str) or len(value) > CHARACTERS_MAX:
            raise self.wrong(name, what, value)
        try:
            found = Decimal(value)
        except InvalidOperation as err:
            raise self.wrong(name, what, value) from err
        exponent = found.as_tuple().exponent
        # Check the exponent before comparing: 1e999999 written out has a million digits.
        if not isinstance(exponent, int) or -exponent > decimals or found.adjusted() > len(str(below)):
            raise self.wrong(name, what, value)
        if not 0 <= found < below:
            raise self.wrong(name, what, value)
        return found

    def child(self, name: str) -> Table | None:
        """The table of this name within this table; None if there is no such table."""
        return Table(self.take(name), f"{self.where}: {name}") if self.has(name) else None

    def children(self, name: str) -> list[Table]:
        """The tables of the array [[name]]. The tables' error messages number them from 1 on."""
        value = self.take(name, [])
        if not isinstance(value, list):
            raise self.wrong(name, f"tables, each under [[{name}]]", value)
        return [Table(each, f"{self.where}: {name} {number}") for number, each in enumerate(value, 1)]

    def named_children(self, name: str) -> dict[str, Table]:
        """The tables [name.x], by x."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, f"tables, each under [{name}.NAME]", value)
        return {each: Table(table, f"{self.where}: {name} {each}") for each, table in value.items()}

    def close(self, known: Iterable[str] = ()) -> None:
        """Check that every field has been read. Without this check, a misspelt name in a file would be ignored
        silently.

        Raises:  ConfigError: the table has fields that were not read and are not in `known`.
        """
        if unknown := sorted(set(self._values) - set(known)):
            raise ConfigError(f"{self.where}: unknown names: {', '.join(unknown)[:200]}")

    def _text(self, name: str, value: Any, *, empty: bool = False) -> str:
        if not isinstance(value, str) or len(value) > CHARACTERS_MAX or _CONTROL.search(value):
            what = f"a string of at most {CHARACTERS_MAX} characters without control characters"
            raise self.wrong(name, what, value)
        if not value and not empty:
            raise self.wrong(name, "a string that is not empty", value)
        return value


def finite(value: Any) -> bool:
    """Whether the value is a number that a float can hold. True and false are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value for an error message: shortened if it is long, and safe for integers that Python refuses to print."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
