"""Reading JSON requests strictly: each field is used, known to change nothing, or refused by name. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from antefix.errors import InvalidRequest

T = TypeVar("T")
_MISSING = object()


class Fields:
    """One JSON object. Take what is understood, then `refuse_rest`."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            raise InvalidRequest(f"{where or 'the request body'} must be a JSON object")
        # null is how some clients leave a field out.
        self._values: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def name_of(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, default: Any = None) -> Any:
        return self._values.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str:
        """Raises:  InvalidRequest: missing without a default, or not a string."""
        value = self._values.pop(name, default)
        if not isinstance(value, str):
            raise InvalidRequest(f"{self.name_of(name)} must be a string")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._values.pop(name, default)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{self.name_of(name)} must be true or false")
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 0) -> int | None:
        value = self._values.pop(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InvalidRequest(f"{self.name_of(name)} must be an integer of at least {low}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._values.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidRequest(f"{self.name_of(name)} must be a number")
        return float(value)

    def items(self, name: str, default: Any = _MISSING) -> list[Any]:
        value = self._values.pop(name, default)
        if value is _MISSING:
            raise InvalidRequest(f"{self.name_of(name)} is missing")
        if not isinstance(value, list):
            raise InvalidRequest(f"{self.name_of(name)} must be a list")
        return value

    def texts(self, name: str) -> list[str]:
        """A string or a list of strings."""
        value = self._values.pop(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            raise InvalidRequest(f"{self.name_of(name)} must be a string or a list of strings that are not empty")
        return values

    def one_of(self, name: str, choices: Mapping[str, T], default: T) -> T:
        value = self._values.pop(name, _MISSING)
        if value is _MISSING:
            return default
        if not isinstance(value, str) or value not in choices:
            raise InvalidRequest(
                f"{self.name_of(name)} must be one of {', '.join(choices)}; {value!r} is not supported"
            )
        return choices[value]

    def only(self, name: str, allowed: Callable[[Any], bool], why: str) -> None:
        """A field that may be there with values that change nothing."""
        value = self._values.pop(name, _MISSING)
        if value is not _MISSING and not allowed(value):
            raise InvalidRequest(f"{self.name_of(name)}: {why}")

    def drop(self, *names: str) -> None:
        """Fields that say something about the caller, not about the answer."""
        for name in names:
            self._values.pop(name, None)

    def refuse_rest(self) -> None:
        """Raises:  InvalidRequest: fields are left that nobody understood."""
        if self._values:
            names = ", ".join(self.name_of(name) for name in sorted(self._values))
            raise InvalidRequest(f"not supported here: {names}")
