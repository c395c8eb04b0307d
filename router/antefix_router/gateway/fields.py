"""Reading JSON requests strictly: each field is used, known to change nothing, or refused by name. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from antefix.errors import InvalidRequest

T = TypeVar("T")
_MISSING = object()


class WrongField(InvalidRequest):
    """A field of the request is missing, of a wrong type, or not supported. param: its name; code: which, in OpenAI's
    words."""

    def __init__(self, message: str, *, param: str, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def missing(param: str, what: str) -> WrongField:
    return WrongField(f"{param} is missing: it must be {what}", param=param, code="missing_required_parameter")


def wrong_type(param: str, what: str) -> WrongField:
    return WrongField(f"{param} must be {what}", param=param, code="invalid_type")


def unsupported(param: str, why: str) -> WrongField:
    return WrongField(f"{param}{why}", param=param, code="unsupported_value")


def is_number(value: Any, number: float) -> bool:
    """Whether a JSON value is this number; true and false are none."""
    return value == number and not isinstance(value, bool)


class Fields:
    """One JSON object. Take what is understood, then `refuse_rest`."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            raise wrong_type(where or "the request body", "a JSON object")
        # null is how some clients leave a field out.
        self._values: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def name_of(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def peek(self, name: str, default: Any = None) -> Any:
        """What stands there, left for whoever takes it."""
        return self._values.get(name, default)

    def take(self, name: str, default: Any = None) -> Any:
        return self._values.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str:
        """Raises:  InvalidRequest: missing without a default, or not a string."""
        value = self._values.pop(name, default)
        if value is None:
            raise missing(self.name_of(name), "a string")
        if not isinstance(value, str):
            raise wrong_type(self.name_of(name), "a string")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._values.pop(name, default)
        if not isinstance(value, bool):
            raise wrong_type(self.name_of(name), "true or false")
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 0) -> int | None:
        value = self._values.pop(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise wrong_type(self.name_of(name), f"an integer of at least {low}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._values.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise wrong_type(self.name_of(name), "a number")
        return float(value)

    def items(self, name: str, default: Any = _MISSING) -> list[Any]:
        value = self._values.pop(name, default)
        if value is _MISSING:
            raise missing(self.name_of(name), "a list")
        if not isinstance(value, list):
            raise wrong_type(self.name_of(name), "a list")
        return value

    def texts(self, name: str) -> list[str]:
        """A string or a list of strings."""
        value = self._values.pop(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            raise wrong_type(self.name_of(name), "a string or a list of strings that are not empty")
        return values

    def one_of(self, name: str, choices: Mapping[str, T], default: Any = _MISSING) -> T:
        """Raises:  WrongField: none of them, or missing without a default."""
        value = self._values.pop(name, _MISSING)
        if value is _MISSING and default is _MISSING:
            raise missing(self.name_of(name), f"one of {', '.join(choices)}")
        if value is _MISSING:
            return cast(T, default)
        if not isinstance(value, str) or value not in choices:
            raise unsupported(self.name_of(name), f" must be one of {', '.join(choices)}; {value!r} is not supported")
        return choices[value]

    def only(self, name: str, allowed: Callable[[Any], bool], why: str) -> None:
        """A field that may be there with values that change nothing."""
        value = self._values.pop(name, _MISSING)
        if value is not _MISSING and not allowed(value):
            raise unsupported(self.name_of(name), f": {why}")

    def rest(self) -> dict[str, Any]:
        """All that has not been taken yet, where the names are the client's."""
        rest, self._values = self._values, {}
        return rest

    def drop(self, *names: str) -> None:
        """Fields that say something about the caller, not about the answer."""
        for name in names:
            self._values.pop(name, None)

    def refuse_rest(self) -> None:
        """Raises:  InvalidRequest: fields are left that nobody understood."""
        if self._values:
            names = [self.name_of(name) for name in sorted(self._values)]
            raise WrongField(f"not supported here: {', '.join(names)}", param=names[0], code="unknown_parameter")
