"""Checks whether a call's arguments satisfy its tool's JSON schema. Schemas come from clients, so checking must be
bounded.

Three parts of JSON Schema are not supported: references to other documents are never fetched, regular expressions
(`pattern` and what depends on it) are not run, and a schema must not expand without end by referring to itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

import referencing
from jsonschema import Draft202012Validator, exceptions, validators

from antefix.errors import InvalidRequest
from antefix_router.chat.messages import ToolCall

# Ten levels that each refer twice to the next one are 1,024 references. No real tool comes near this.
_NUM_REFERENCES_MAX: Final = 10_000
_num_references: ContextVar[list[int]] = ContextVar("num_references")


class _TooMuch(Exception):
    """The schema refers to itself more often than is allowed."""


def _reference(validator: Any, reference: str, instance: Any, schema: Any) -> Iterator[Any]:
    counted = _num_references.get()
    counted[0] += 1
    if counted[0] > _NUM_REFERENCES_MAX:
        raise _TooMuch
    yield from Draft202012Validator.VALIDATORS["$ref"](validator, reference, instance, schema) or ()


def _skipped(validator: Any, value: Any, instance: Any, schema: Any) -> None:
    """Skip a keyword. A regular expression can run without end, and one client's tool must not hold up all streams."""


def _additional(validator: Any, rest: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """Check additional properties. If a schema has patterns, only these could tell which properties are additional, so
    additional properties are not checked.
    """
    if "patternProperties" not in schema:
        yield from Draft202012Validator.VALIDATORS["additionalProperties"](validator, rest, instance, schema) or ()


_BY_PATTERN: Final = ("pattern", "patternProperties", "unevaluatedProperties", "unevaluatedItems")
_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    {
        "$ref": _reference,
        "$dynamicRef": _skipped,
        "additionalProperties": _additional,
        **dict.fromkeys(_BY_PATTERN, _skipped),
    },
)
# Examining a schema takes 2 ms (measured), and agents send the same schemas in every turn.
_NUM_CHECKED_MAX: Final = 4096
_checked: set[bytes] = set()


def check_schema(schema: Any) -> None:
    """Raises:  InvalidRequest: this is not a JSON schema."""
    digest = hashlib.blake2b(json.dumps(schema).encode(), digest_size=16).digest()
    if digest in _checked:
        return
    try:
        Draft202012Validator.check_schema(schema)
    except exceptions.SchemaError as err:
        raise InvalidRequest(f"not a JSON schema: {err.message[:200]}") from err
    except RecursionError as err:
        raise InvalidRequest("the schema of the output is not a JSON schema: it is nested too deeply") from err
    if len(_checked) >= _NUM_CHECKED_MAX:
        _checked.clear()
    _checked.add(digest)


def keeps_to(call: ToolCall, schemas: Mapping[str, Any]) -> bool:
    """Whether a call may be passed to the client: its tool is not strict, or its arguments satisfy the schema."""
    if call.name not in schemas:
        return True
    return matches(json.loads(call.arguments or "{}"), schemas[call.name])


def matches(value: Any, schema: Any) -> bool:
    """Whether a JSON value satisfies the schema. A value that cannot be checked within the limits counts as invalid."""
    token = _num_references.set([0])
    try:
        return bool(_Validator(schema, registry=referencing.Registry()).is_valid(value))
    except (_TooMuch, RecursionError, referencing.exceptions.Unresolvable):
        return False
    except exceptions.UnknownType:
        return False
    finally:
        _num_references.reset(token)
