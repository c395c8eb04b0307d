"""Reads JSON requests: known fields are read and checked, all others are ignored and reported. Pure.

Clients add fields every month, and most change nothing. So a reader of a request takes the fields that it knows, and
refuses by name the few that would change the answer (`only`). At the end `close` reports all other fields with their
JSON paths, at any level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar, cast

from antefix.checked_table import finite
from antefix.errors import InvalidRequest
from antefix_router.gateway.notes import Notes

T = TypeVar("T")
_MISSING = object()
# The largest integers that the services' messages can hold.
_INTEGER_MAX: Final = 2**64 - 1


class WrongField(InvalidRequest):
    """A field of the request is missing, of a wrong type, or not supported. param: the field's name. code: the kind of
    error, in OpenAI's terms.
    """

    def __init__(self, message: str, *, param: str, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def missing(param: str, what: str) -> WrongField:
    return WrongField(f"{param} is missing: it must be {what}", param=param, code="missing_required_parameter")


def wrong_type(param: str, what: str) -> WrongField:
    return WrongField(f"{param} must be {what}", param=param, code="invalid_type")


def wrong_value(param: str, why: str) -> WrongField:
    return WrongField(f"{param}{why}", param=param, code="invalid_value")


def unsupported(param: str, why: str) -> WrongField:
    return WrongField(f"{param}{why}", param=param, code="unsupported_value")


def is_number(value: Any, number: float) -> bool:
    """Whether a JSON value is exactly this number; true and false are not numbers."""
    return value == number and not isinstance(value, bool)


class Fields:
    """One JSON object of a request, and the objects inside it that were read. null counts as a missing field, because
    some clients send null so.
    """

    def __init__(self, values: Any, where: str = "", notes: Notes | None = None) -> None:
        if not isinstance(values, dict):
            raise wrong_type(where or "the request body", "a JSON object")
        self.where = where
        self.notes = notes or Notes()
        self._values: dict[str, Any] = dict(values)
        self._inner: list[Fields] = []

    def name_of(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str, default: Any = None) -> Any:
        value = self._values.pop(name, None)
        return default if value is None else value

    def peek(self, name: str, default: Any = None) -> Any:
        """A field's value, exactly as it was sent. The field still counts as not read."""
        value = self._values.get(name)
        return default if value is None else value

    def takes(self, name: str, value: str | bool) -> bool:
        """Take a field if it has exactly this value. Returns whether it had."""
        held = self._values.get(name)
        if held != value or type(held) is not type(value):
            return False
        del self._values[name]
        return True

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def child(self, name: str) -> Fields | None:
        """An object inside this JSON object; None if there is none. Raises: WrongField: the field is not an object."""
        value = self.take(name)
        return None if value is None else self.inside(value, self.name_of(name))

    def children(self, name: str, default: Any = _MISSING) -> list[Fields]:
        """A list of objects."""
        items = enumerate(self.items(name, default))
        return [self.inside(item, f"{self.name_of(name)}[{index}]") for index, item in items]

    def inside(self, value: Any, where: str) -> Fields:
        """An object that belongs to this one, and is closed together with this one."""
        fields = Fields(value, where, self.notes)
        self._inner.append(fields)
        return fields

    def text(self, name: str, default: str | None = None) -> str:
        """Raises:  InvalidRequest: the field is missing without a default, or is not a string."""
        value = self.take(name, default)
        if value is None:
            raise missing(self.name_of(name), "a string")
        if not isinstance(value, str):
            raise wrong_type(self.name_of(name), "a string")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise wrong_type(self.name_of(name), "true or false")
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 0) -> int | None:
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise wrong_type(self.name_of(name), f"an integer of at least {low}")
        if value > _INTEGER_MAX:
            raise wrong_value(self.name_of(name), f" must be at most {_INTEGER_MAX}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name, default)
        if not finite(value):
            raise wrong_type(self.name_of(name), "a number")
        return float(value)

    def items(self, name: str, default: Any = _MISSING) -> list[Any]:
        value = self.take(name, default)
        if value is _MISSING:
            raise missing(self.name_of(name), "a list")
        if not isinstance(value, list):
            raise wrong_type(self.name_of(name), "a list")
        return value

    def texts(self, name: str) -> list[str]:
        """A field's value, which is a string or a list of strings."""
        value = self.take(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            raise wrong_type(self.name_of(name), "a string or a list of strings that are not empty")
        return values

    def one_of(self, name: str, choices: Mapping[str, T], default: Any = _MISSING) -> T:
        """Raises:  WrongField: the value is none of these, or is missing without a default."""
        value = self.take(name, _MISSING)
        if value is _MISSING and default is _MISSING:
            raise missing(self.name_of(name), f"one of {', '.join(choices)}")
        if value is _MISSING:
            return cast(T, default)
        if not isinstance(value, str) or value not in choices:
            raise unsupported(
                self.name_of(name), f" must be one of {', '.join(choices)}; {str(value)[:80]!r} is not supported"
            )
        return choices[value]

    def known(self, name: str, choices: Mapping[str, T], default: T) -> T:
        """Read a hint. An unknown value of the field is ignored, as an unknown field is."""
        value = self._values.get(name)
        if not isinstance(value, str) or value not in choices:
            return default
        del self._values[name]
        return choices[value]

    def only(self, name: str, allowed: Callable[[Any], bool], why: str) -> None:
        """Check a field that would change the answer, unless its value is one of the allowed values.

        Raises:  WrongField: the field has another value.
        """
        value = self.take(name, _MISSING)
        if value is not _MISSING and not allowed(value):
            raise unsupported(self.name_of(name), f": {why}")

    def rest(self) -> dict[str, Any]:
        """All fields that were not read yet, for objects in which the client chooses the names."""
        rest, self._values = self._values, {}
        return rest

    def drop(self, *names: str) -> None:
        """Ignore fields that the server's own answers have. Clients send these fields back with every turn, where they
        have no meaning.
        """
        for name in names:
            self._values.pop(name, None)

    def drop_rest(self, *, but: Iterable[str] = ()) -> None:
        """Ignore the rest of this object without reporting it, because the whole object was left out and reported."""
        self._values = {name: self._values[name] for name in but if name in self._values}

    def close(self) -> None:
        """Report all fields that were not read, in this object and in those inside it."""
        self.notes.ignore_all(self.where, self._values)
        for fields in self._inner:
            fields.close()
