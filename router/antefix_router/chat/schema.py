"""Prepares clients' JSON schemas for the grammar engine. Annotations are dropped. Keywords that the engine cannot
enforce are refused, or dropped if the client did not ask for strict adherence. Pure.

The engine reads schemas itself. This module adds limits that the engine lacks, and takes apart the schemas whose values
a format does not write as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from antefix.errors import InvalidRequest

# Levels of JSON nesting. The engine stops at 128, and Python's own parser far beyond that.
DEPTH_MAX = 64
SCHEMA_BYTES_MAX = 128 << 10
# The engine takes N milliseconds for a `multipleOf` of N times ten thousand.
_MULTIPLE_MAX = 10_000
_REFERENCES_MAX = 32
# Steps of following references and options: some 20 ms. The largest schemas that clients send take hundreds of steps.
_STEPS_MAX = 5_000

_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTS: Final = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS: Final = frozenset({"items", "additionalProperties"})
_VALUES: Final = frozenset(
    {
        *("$ref", "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
)
# Keywords that restrict values in a way that the engine cannot enforce.
_UNENFORCED: Final = frozenset(
    {
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        *("additionalItems", "$dynamicRef", "$recursiveRef"),
    }
)
# The formats that the engine knows. All others are annotations, as they are in JSON Schema by default.
_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)
_ROOT: Final = "antefix-root"


class UnusableSchema(InvalidRequest):
    """No output can satisfy the client's schema: it is wrong, impossible, or has keywords that cannot be enforced."""


class UnusableTool(UnusableSchema):
    """One of the tools has an unusable schema.  number: the tool's position."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def prepared(schema: Any, *, strict: bool) -> Any:
    """The schema, checked and without annotations.  strict: refuse what cannot be enforced instead of dropping it.

    Raises:  UnusableSchema
    """
    if not isinstance(schema, (dict, bool)):
        raise UnusableSchema("a schema is an object, or true or false")
    try:
        nbytes = len(json.dumps(schema))
    except RecursionError as err:
        raise UnusableSchema("the schema is nested too deep") from err
    if nbytes > SCHEMA_BYTES_MAX:
        raise UnusableSchema(f"a schema takes at most {SCHEMA_BYTES_MAX} bytes")
    made = _prepared(schema, strict, 0)
    if not _Ends(made).ends(made):
        raise UnusableSchema("no finite value satisfies the schema: it requires itself, or something impossible")
    return made


class _Ends:
    """Finds out whether a schema allows a finite value. A schema that requires itself allows no finite value, and its
    output would never end.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: set[str] = set()
        self._num_steps = 0

    def ends(self, schema: Any, within: frozenset[str] = frozenset()) -> bool:
        """Whether the schema has a finite value.  within: the references being followed; meeting one of them again
        gives no finite value on this path.
        """
        self._num_steps += 1
        if self._num_steps > _STEPS_MAX:
            raise UnusableSchema("the schema refers to itself in too many ways")
        if isinstance(schema, bool):
            return schema
        if "$ref" in schema and not self._reference_ends(schema["$ref"], within):
            return False
        for name, quantifier in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            if name in schema and not quantifier(self.ends(each, within) for each in schema[name]):
                return False
        if "enum" in schema or "const" in schema:
            return True
        kinds = types_of(schema)
        if set(kinds) - {"object", "array"}:
            return True
        return ("array" in kinds and self._array_ends(schema, within)) or (
            "object" in kinds and self._object_ends(schema, within)
        )

    def _reference_ends(self, reference: str, within: frozenset[str]) -> bool:
        if reference in within:
            return False
        if reference not in self._known and self.ends(_pointed(reference, self._root), within | {reference}):
            self._known.add(reference)
        return reference in self._known

    def _array_ends(self, schema: Mapping[str, Any], within: frozenset[str]) -> bool:
        first, num_min = schema.get("prefixItems", []), schema.get("minItems", 0)
        if not isinstance(num_min, int):
            return True  # the engine says what is wrong with it
        needed = first[:num_min] + ([schema.get("items", True)] if num_min > len(first) else [])
        return all(self.ends(each, within) for each in needed)

    def _object_ends(self, schema: Mapping[str, Any], within: frozenset[str]) -> bool:
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        rest = True if "patternProperties" in schema else rest
        return all(self.ends(properties.get(each, rest), within) for each in schema.get("required", ()))


def _prepared(schema: Any, strict: bool, depth: int) -> Any:
    if depth > DEPTH_MAX // 2:
        raise UnusableSchema(f"a schema may be nested at most {DEPTH_MAX // 2} levels deep")
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise UnusableSchema(f"a schema is an object, or true or false, not {json.dumps(schema)[:40]}")
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _MAPS:
            made[name] = {key: _prepared(each, strict, depth + 1) for key, each in _of(dict, name, value).items()}
        elif name in _LISTS:
            made[name] = [_prepared(each, strict, depth + 1) for each in _of(list, name, value)]
        elif name == "items" and isinstance(value, list):
            made["prefixItems"] = [_prepared(each, strict, depth + 1) for each in value]  # as before 2020
        elif name in _SCHEMAS:
            made[name] = _prepared(value, strict, depth + 1)
        elif name in _VALUES:
            made[name] = value
        elif name in _UNENFORCED and strict and not _is_idle(name, value):
            raise UnusableSchema(f"{name!r} cannot be enforced")
    _check_values(made, strict)
    return made


def _of(kind: type, name: str, value: Any) -> Any:
    if not isinstance(value, kind):
        raise UnusableSchema(f"{name!r} must be a JSON {'object' if kind is dict else 'list'}")
    return value


def _is_idle(name: str, value: Any) -> bool:
    """Whether the keyword allows everything. Generated schemas often contain keywords without effect."""
    return (name == "uniqueItems" and value is False) or (
        name in ("propertyNames", "unevaluatedProperties", "unevaluatedItems", "additionalItems")
        and value in (True, {}, {"type": "string"})
    )


def _check_values(schema: dict[str, Any], strict: bool) -> None:
    """Remove keywords without effect, and refuse values that would take the engine too long."""
    if schema.get("format") not in _FORMATS:
        schema.pop("format", None)
    if (num := schema.get("minProperties", 0)) and not isinstance(num, bool):
        # A grammar may write the same name twice; readers count it once.
        if num > len(schema.get("required", ())) and strict:
            raise UnusableSchema("'minProperties' beyond the required ones cannot be enforced")
        del schema["minProperties"]
    multiple = schema.get("multipleOf")
    if isinstance(multiple, (int, float)) and (multiple > _MULTIPLE_MAX or multiple < 1 / _MULTIPLE_MAX):
        if strict:
            raise UnusableSchema(f"'multipleOf' must be from {1 / _MULTIPLE_MAX:g} to {_MULTIPLE_MAX}")
        del schema["multipleOf"]
    for name, value in schema.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UnusableSchema(f"{name!r} is too large a number")
    if not str(schema.get("$ref", "#")).startswith("#"):
        raise UnusableSchema(f"'$ref' may refer only to a place in the same schema, not to {schema['$ref']!r}")


class Resolver:
    """Resolves references and `allOf` of one whole schema, where they are looked at, with a limit on the total work."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self._num_steps = 0

    def step(self, depth: int) -> None:
        """Raises:  UnusableSchema: the schema refers to itself or branches without end."""
        self._num_steps += 1
        if self._num_steps > _STEPS_MAX or depth > _REFERENCES_MAX:
            raise UnusableSchema("the schema refers to itself in too many ways")

    def resolved(self, schema: Any, depth: int = 0) -> Any:
        """The schema with its own reference and its `allOf` resolved; nested ones stay."""
        self.step(depth)
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            rest = {name: value for name, value in schema.items() if name != "$ref"}
            return self.resolved(merged(rest, _pointed(schema["$ref"], self.root)), depth + 1)
        if "allOf" in schema:
            made: Any = {name: value for name, value in schema.items() if name != "allOf"}
            for part in schema["allOf"]:
                made = merged(made, self.resolved(part, depth + 1))
            return self.resolved(made, depth + 1)
        return schema


def _pointed(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            raise UnusableSchema(f"'$ref' refers to {reference!r}, which the schema does not have")
        found = found[name]
    return found


def merged(first: Any, second: Any) -> Any:
    """A schema that allows only what both of the given schemas allow. Raises: UnusableSchema: two keywords contradict
    each other.
    """
    if isinstance(first, bool) or isinstance(second, bool):
        if first is False or second is False:
            return False
        return second if first is True else first
    made = dict(first)
    for name, value in second.items():
        if name not in made or made[name] == value:
            made[name] = value
        elif name == "required":
            made[name] = [*made[name], *(each for each in value if each not in made[name])]
        elif name in ("properties", "$defs", "definitions"):
            both = made[name].keys() & value.keys()
            made[name] = {**made[name], **value, **{each: merged(made[name][each], value[each]) for each in both}}
        elif name == "type":
            made[name] = [each for each in types_of(first) if each in types_of(second)]
        else:
            raise UnusableSchema(f"{name!r} applies twice to the same value, which cannot be enforced")
    return made


ALL_TYPES: Final = ("object", "array", "string", "number", "boolean", "null")


def types_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The types of values that the schema allows, judged by `type` alone."""
    kinds = schema.get("type", ALL_TYPES)
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def standalone(schema: Any, root: Mapping[str, Any]) -> Any:
    """A part of `root` as a separate schema whose references still resolve as before."""
    if '"$ref"' not in json.dumps(schema):
        return schema
    defined = {name: root[name] for name in ("$defs", "definitions") if name in root}
    whole = {name: value for name, value in root.items() if name not in defined}
    made: dict[str, Any] = _moved({**defined, **schema})
    if f"#/$defs/{_ROOT}" in json.dumps(made):
        made["$defs"] = {**made.get("$defs", {}), _ROOT: _moved(whole)}
    return made


def _moved(value: Any) -> Any:
    """The schema with references into the old root changed to the root's new place."""
    if isinstance(value, list):
        return [_moved(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {name: _moved(each) for name, each in value.items()}
    reference = made.get("$ref")
    if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
        made["$ref"] = f"#/$defs/{_ROOT}{reference.removeprefix('#')}"
    return made
