"""Schemas of JSON that stands between tags: the beginning of a closing tag is in none of its texts and names. Pure.

The engine reads JSON as JSON, and a tag inside a text as text; a format's parser takes the first tag for the end. So
what is free in a schema gets a pattern, and what a schema leaves to be made up (names, any values) is written out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from antefix_router.chat.schema import ALL_TYPES, types_of

# No "</" before a full-width bar, the first letter of DSML's tags.
_FREE_TEXT: Final = "^(?:[^<]|<(?:<|/<)*(?:[^</]|/[^<｜]))*(?:<(?:<|/<)*/?)?$"
# A pattern of the whole text that has no way to write that bar: both together would only cost the engine time.
_TAME: Final = re.compile(r"\^(?:(?!\[\^|\\[WSDPp])[!-~ ](?<![.|]))*\$")
_ANY: Final = "antefix-any"
_REFERENCE: Final = {"$ref": f"#/$defs/{_ANY}"}
_CHOICES: Final = ("anyOf", "oneOf", "allOf")


def tagless(schema: Any) -> Any:
    """A schema by itself, as `schema.standalone` gives it, whose values hold no closing tag."""
    made = _tagless(schema)
    if isinstance(made, dict) and _REFERENCE["$ref"] in json.dumps(made):
        made = dict(made)
        made["$defs"] = {**made.get("$defs", {}), _ANY: _restricted({"type": list(ALL_TYPES)})}
    return made


def _tagless(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return _REFERENCE if schema is True else schema
    made = dict(schema)
    for name in ("$defs", "definitions"):
        if name in made:
            made[name] = {key: _tagless(each) for key, each in made[name].items()}
    if made.keys() & {"enum", "const", "$ref"}:
        return made
    says = made.keys() - {"$defs", "definitions"}
    if not says:
        return {**made, **_REFERENCE}
    if len(says) == 1 and (chosen := next(iter(says))) in _CHOICES:
        made[chosen] = [_tagless(each) for each in made[chosen]]
        return made
    return _restricted(made)


def _restricted(schema: dict[str, Any]) -> dict[str, Any]:
    """By each kind of value that it allows; a keyword says something about its own kind alone."""
    made, kinds = dict(schema), types_of(schema)
    if "type" not in made and not made.keys() & set(_CHOICES):
        made["type"] = list(ALL_TYPES)
    if "string" in kinds and "format" not in made:
        if "pattern" not in made:
            made["pattern"] = _FREE_TEXT
        elif not _TAME.fullmatch(made["pattern"]):
            made["allOf"] = [*made.get("allOf", ()), {"pattern": _FREE_TEXT}]
    if "array" in kinds:
        if "prefixItems" in made:
            made["prefixItems"] = [_tagless(each) for each in made["prefixItems"]]
        made["items"] = _tagless(made.get("items", True))
    if "object" in kinds:
        made |= _named_properties(made)
    return made


def _named_properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Of an object: with names of its own no others are made up; without any, all names are free."""
    others = _tagless(schema.get("additionalProperties", True))
    properties = {name: _tagless(each) for name, each in schema.get("properties", {}).items()}
    properties |= {name: others for name in schema.get("required", ()) if name not in properties}
    patterns = {name: _tagless(each) for name, each in schema.get("patternProperties", {}).items()}
    if not properties and not patterns and others is not False:
        patterns = {_FREE_TEXT: others}
    made: dict[str, Any] = {"properties": properties, "additionalProperties": False}
    return {**made, "patternProperties": patterns} if patterns else made
