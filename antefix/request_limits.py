"""Checks requests and answers against the limits in the protos (`limit.proto`): types, ranges, finiteness, sizes.

A service checks each message here when its bytes arrive; all later code trusts the message. A request that is not
protobuf, or breaks a limit, becomes an `Unreadable`, which the interceptor refuses with INVALID_ARGUMENT. Without this
class, gRPC would answer UNKNOWN and log a traceback for such a request.

A service that calls another one checks the other's answer in the same way (`answered`). Most fields of answers have no
limit in the proto. For fields without a limit, numbers must be finite, and lists no longer than any service makes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from antefix.errors import AntefixError, InvalidRequest, Unavailable
from antefix.v1 import limit_pb2

_PACKAGE: Final = "antefix.v1"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TEXTS: Final = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)

M = TypeVar("M")
# The longest list in an answer, such as a look-up's spans, a log's events or a prompt's log probabilities.
_ANSWER_ITEMS_MAX: Final = 1 << 20
_FLOATS: Final = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT)

# Raises for a bad value. The error's text begins with a blank, because the caller puts the field's name in front.
Check = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a request that could not be read, until it reaches code that may raise. It holds the reason."""

    err: AntefixError


def reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The deserializer, wrapped so that it returns an `Unreadable` for bytes it cannot read and for a broken limit."""

    def read(raw: bytes) -> Any:
        try:
            message = deserialize(raw)
            if isinstance(message, Message):
                check_request(message)
            return message
        except AntefixError as err:
            return Unreadable(err)
        except (DecodeError, UnicodeDecodeError, ValueError) as err:
            return Unreadable(InvalidRequest(f"the request is not the message type that this call takes: {err}"))

    return read


def readable(request: Any) -> Any:
    """The request, or an iterator over the requests of a stream.

    Raises:  InvalidRequest: the request could not be read. In a stream, raised when that request is reached.
    """
    if isinstance(request, Unreadable):
        raise request.err
    if isinstance(request, Message) or not hasattr(request, "__aiter__"):
        return request
    return _each(request)


async def _each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield readable(request)


def check_request(message: Message) -> None:
    """Raises:  InvalidRequest: a field of the message breaks its limit; the error names the field."""
    if message.DESCRIPTOR.file.package != _PACKAGE:
        return
    try:
        _check(message)
    except InvalidRequest as err:
        raise InvalidRequest(str(err).removeprefix(".")) from None


def answered(answer: M) -> M:
    """Check another service's answer, and return it.

    Raises:  Unavailable: the answer breaks a limit or is another message; the error names the field. The caller
        continues without that service, as if it had not answered.
    """
    if not isinstance(answer, Message):
        # gRPC passes None for an answer that it cannot read.
        raise Unavailable(
            "the service's answer is not the message type that this call returns: the service may have another version"
        )
    try:
        _check(answer, of_answer=True)
    except InvalidRequest as err:
        text = str(err).removeprefix(".")
        raise Unavailable(f"the service's answer cannot be right: {answer.DESCRIPTOR.name}.{text}") from None
    return answer


def limit_of(field: FieldDescriptor) -> limit_pb2.FieldLimit | None:
    """The field's limit in the proto file; None if it has no limit."""
    options: Any = field.GetOptions()
    if not options.HasExtension(limit_pb2.limit):
        return None
    found: limit_pb2.FieldLimit = options.Extensions[limit_pb2.limit]
    return found


def _check(message: Message, *, of_answer: bool = False) -> None:
    for name, check in _checks_of(message.DESCRIPTOR, of_answer):
        try:
            check(message)
        except InvalidRequest as err:
            raise InvalidRequest(f".{name}{err}") from None


@cache
def _checks_of(descriptor: Descriptor, of_answer: bool) -> tuple[tuple[str, Check], ...]:
    """The checks of a message's fields, by field name. The checks are cached per message type, because requests are
    frequent.
    """
    checks: list[tuple[str, Check]] = []
    for field in descriptor.fields:
        one = _check_of_value(_value_of(field), of_answer)
        if field.is_repeated:
            limit = limit_of(field)
            most = limit.items_max if limit is not None else _ANSWER_ITEMS_MAX if of_answer else 0
            checks.append((field.name, _of_items(field.name, most, one)))
        elif one is not None:
            checks.append((field.name, _of_field(field, one)))
    return tuple(checks)


def _of_field(field: FieldDescriptor, one: Check) -> Check:
    name = field.name
    if field.message_type is not None:
        return lambda message: one(getattr(message, name)) if message.HasField(name) else None
    return lambda message: one(getattr(message, name))


def _of_items(name: str, most: int, one: Check | None) -> Check:
    def check(message: Message) -> None:
        items = getattr(message, name)
        if len(items) > most:
            raise InvalidRequest(f" takes {most} items, has {len(items)}")
        if one is not None:
            for item in items.values() if isinstance(items, Mapping) else items:
                one(item)

    return check


def _value_of(field: FieldDescriptor) -> FieldDescriptor:
    """For a map field, the field of its values; any other field is returned unchanged."""
    kind = field.message_type
    return kind.fields_by_name["value"] if kind is not None and kind.GetOptions().map_entry else field


def _check_of_value(field: FieldDescriptor, of_answer: bool) -> Check | None:
    limit = limit_of(field)
    if field.message_type is not None:
        return partial(_check, of_answer=of_answer)
    if field.enum_type is not None:
        return _known(frozenset(field.enum_type.values_by_number))
    if limit is None:
        return _finite if of_answer and field.type in _FLOATS else None
    return _text_check(limit) if field.type in _TEXTS else _number_check(limit)


def _known(numbers: frozenset[int]) -> Check:
    def check(value: int) -> None:
        if value not in numbers:
            raise InvalidRequest(f": {value} is not one of the field's values")

    return check


def _finite(value: float) -> None:
    if not math.isfinite(value):
        raise InvalidRequest(f" must be a finite number, is {value:g}")


def _number_check(limit: limit_pb2.FieldLimit) -> Check:
    low = limit.min if limit.HasField("min") else 0.0
    high = limit.max if limit.HasField("max") else sys.float_info.max

    def check(value: float) -> None:
        # Negated so that NaN is refused.
        if not low <= value <= high:
            raise InvalidRequest(f" must be a number from {low:g} to {high:g}, is {value:g}")

    return check


def _text_check(limit: limit_pb2.FieldLimit) -> Check:
    size, most, is_name = limit.bytes, limit.bytes_max, limit.is_name

    def check(value: str | bytes) -> None:
        nbytes = len(value) if isinstance(value, bytes) or value.isascii() else len(value.encode())
        if size and nbytes and nbytes != size:
            raise InvalidRequest(f" must be {size} bytes, is {nbytes}")
        if most and nbytes > most:
            raise InvalidRequest(f" takes {most} bytes, has {nbytes}")
        if is_name and _CONTROL.search(str(value)):
            raise InvalidRequest(" may not hold control characters")

    return check
