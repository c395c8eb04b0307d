"""A table of a TOML or JSON file, read field by field: types, ranges, finiteness and sizes, and no unknown names.

All files of settings are read through this, so all say the same of the same mistake: where, which field, what it takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from antefix.errors import ConfigError

CHARACTERS_MAX: Final = 4096
# Exact in a float, in a signed 64-bit number, and in whatever reads our files.
INTEGER_MAX: Final = 1 << 53
_MISSING: Final = object()
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Table:
    """where: of the error's beginning, such as "tenants file t.toml: tenant 3"."""

    def __init__(self, values: Any, where: str) -> None:
        """Raises:  ConfigError: it is no table."""
        self.where = where
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be a table of names and values, is {shown(values)}")
        self._values: dict[str, Any] = dict(values)

    def wrong(self, name: str, what: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {what}, is {shown(value)}")

    def has(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """As it is. Raises:  ConfigError: it is missing, and there is no default."""
        value = self._values.pop(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self.where}: {name} is missing")
        return value

    def text(self, name: str, default: str | None = None, *, empty: bool = False) -> str:
        """One line. empty: whether it may be."""
        value = self.take(name) if default is None else self.take(name, default)
        return self._text(name, value, empty=empty or default == "")

    def texts(self, name: str, default: Collection[str] | None = None) -> tuple[str, ...]:
        """A list of lines. A single one would be read letter by letter, so it is refused."""
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
        """None: missing, and without a default."""
        if not self.has(name):
            return default
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return int(value)

    def decimal(self, name: str, default: str | None = None, *, below: int, decimals: int) -> Decimal:
        """A string of digits, so that no float has touched it: at least 0, below a bound, of so many decimals."""
        value = self.take(name) if default is None else self.take(name, default)
        what = f'a string of digits like "0.15", at least 0 and below {below}, with {decimals} decimals at most'
        if not isinstance(value, str) or len(value) > CHARACTERS_MAX:
            raise self.wrong(name, what, value)
        try:
            found = Decimal(value)
        except InvalidOperation as err:
            raise self.wrong(name, what, value) from err
        exponent = found.as_tuple().exponent
        # A number's exponent is looked at before it is compared: 1e999999 is a million digits when it is written out.
        if not isinstance(exponent, int) or -exponent > decimals or found.adjusted() > len(str(below)):
            raise self.wrong(name, what, value)
        if not 0 <= found < below:
            raise self.wrong(name, what, value)
        return found

    def child(self, name: str) -> Table | None:
        """A table in this one; None where there is none."""
        return Table(self.take(name), f"{self.where}: {name}") if self.has(name) else None

    def children(self, name: str) -> list[Table]:
        """[[name]]: each with its number, from 1 on."""
        value = self.take(name, [])
        if not isinstance(value, list):
            raise self.wrong(name, f"tables, each under [[{name}]]", value)
        return [Table(each, f"{self.where}: {name} {number}") for number, each in enumerate(value, 1)]

    def named_children(self, name: str) -> dict[str, Table]:
        """[name.x]: by x."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, f"tables, each under [{name}.NAME]", value)
        return {each: Table(table, f"{self.where}: {name} {each}") for each, table in value.items()}

    def close(self, known: Iterable[str] = ()) -> None:
        """Raises:  ConfigError: names that nobody took: a misspelt one would change nothing, and say nothing."""
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
    """Whether it is a number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value as an error shows it: not megabytes of it, nor an integer that Python would not write."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
