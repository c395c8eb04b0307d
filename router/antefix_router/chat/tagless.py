"""Restricts the schemas of JSON values between tags, so that no text or name in them contains the beginning of a
closing tag. Pure.

The engine treats a tag inside a JSON text as text, but a format's parser takes the first closing tag for the end. So
free texts get a pattern, and parts that a schema leaves open (names, any values) are written out with this restriction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from antefix_router.chat.schema import ALL_TYPES, types_of

# Matches text without "</" before a full-width bar, the first letter of DSML's tags.
_FREE_TEXT: Final = "^(?:[^<]|<(?:<|/<)*(?:[^</]|/[^<｜]))*(?:<(?:<|/<)*/?)?$"
# A pattern for the whole text that cannot produce that bar. Combining it with the restriction would only cost the
# engine time.
_TAME: Final = re.compile(r"\^(?:(?!\[\^|\\[WSDPp])[!-~ ](?<![.|]))*\$")
_ANY: Final = "antefix-any"
_REFERENCE: Final = {"$ref": f"#/$defs/{_ANY}"}
_CHOICES: Final = ("anyOf", "oneOf", "allOf")


def tagless(schema: Any) -> Any:
    """A standalone schema, as `schema.standalone` returns it, restricted to values without a closing tag."""
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
    """Restrict each type of value that the schema allows. Each keyword concerns only one type of value."""
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
    """An object's properties. If the schema names some properties, no others may be added; if it names none, all names
    are free.
    """
    others = _tagless(schema.get("additionalProperties", True))
    properties = {name: _tagless(each) for name, each in schema.get("properties", {}).items()}
    properties |= {name: others for name in schema.get("required", ()) if name not in properties}
    patterns = {name: _tagless(each) for name, each in schema.get("patternProperties", {}).items()}
    if not properties and not patterns and others is not False:
        patterns = {_FREE_TEXT: others}
    made: dict[str, Any] = {"properties": properties, "additionalProperties": False}
    return {**made, "patternProperties": patterns} if patterns else made
