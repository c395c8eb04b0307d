"""Does a call's JSON keep to its tool's schema? The part of JSON Schema that strict tools are written in. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from antefix_router.chat.messages import ToolCall

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def keeps_to(call: ToolCall, schemas: Mapping[str, Any]) -> bool:
    """Whether a call may be handed out: its tool is not strict, or its arguments are as the schema says."""
    if call.name not in schemas:
        return True
    return matches(json.loads(call.arguments or "{}"), schemas[call.name], schemas[call.name])


def matches(value: Any, schema: Any, root: Any) -> bool:
    """Whether a JSON value is valid. `root` is what "$ref" refers into. Keywords not known here allow everything."""
    if not isinstance(schema, dict):
        return schema is not False
    if isinstance(reference := schema.get("$ref"), str):
        return matches(value, _resolved(reference, root), root)
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "anyOf" in schema and not any(matches(value, option, root) for option in schema["anyOf"]):
        return False
    kinds = schema.get("type", [])
    if kinds and not any(_is_of(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, dict):
        return _object_matches(value, schema, root)
    return not isinstance(value, list) or all(matches(item, schema.get("items", True), root) for item in value)


def _object_matches(value: dict[str, Any], schema: dict[str, Any], root: Any) -> bool:
    properties = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    return all(name in value for name in schema.get("required", ())) and all(
        matches(item, properties.get(name, rest), root) for name, item in value.items()
    )


def _is_of(value: Any, kind: str) -> bool:
    # True is an int to Python, and no number to JSON.
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _TYPES.get(kind, (object,)))


def _resolved(reference: str, root: Any) -> Any:
    found = root
    for name in reference.removeprefix("#/").split("/") if reference != "#" else ():
        found = found.get(name, True) if isinstance(found, dict) else True
    return found
