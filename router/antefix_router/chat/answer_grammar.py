"""Writes the required form of an answer as a grammar in the engine's Lark dialect. Pure text; `router.grammar_check`
checks it.

One grammar covers the whole answer including its reasoning. So the text after the reasoning has the required form, and
no other part of the system needs to know where reasoning ends.
"""

from __future__ import annotations

import json
from typing import Any, Final

import llguidance

from antefix_router.chat.schema import UnusableSchema, prepared

# Each JSON value can be written in only one way. If white space were allowed anywhere, a model could write it without
# end.
_WRITTEN: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def quoted(text: str) -> str:
    """The text, written as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any) -> str:
    """A grammar rule for a JSON value that satisfies a prepared schema."""
    if schema is False:
        raise UnusableSchema("no value satisfies the schema")
    return "%json " + json.dumps({**({} if schema is True else schema), "x-guidance": _WRITTEN}, ensure_ascii=False)


def json_answer(schema: dict[str, Any] | None) -> str:
    """The rule for an answer that is JSON. Without a schema, any JSON object is allowed.  Raises:  UnusableSchema"""
    return json_rule({"type": "object"} if schema is None else prepared(schema, strict=True))


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of an answer that consists of JSON alone.  Raises:  UnusableSchema"""
    return f"start: {json_answer(schema)}\n"


def search_regex(pattern: str) -> str:
    """Turn a schema's `pattern` into a regex for the whole text. A pattern without anchors may match anywhere in the
    text.

    Raises:  UnusableSchema: the pattern has anchors elsewhere than at its ends.
    """
    body = pattern.removeprefix("^")
    starts, ends = len(body) < len(pattern), body.endswith("$") and not body.endswith("\\$")
    body = body.removesuffix("$") if ends else body
    if _has_bare(body, "^$") or ((starts or ends) and _has_bare(body, "|", outermost=True)):
        raise UnusableSchema(f"the pattern {pattern!r} cannot be enforced: anchors belong at its ends")
    written = llguidance.regex_to_lark(f"(?:{body})", "dw")
    # The engine would treat an empty line or a comment as the end of the rule.
    written = written.replace("\n", "\\n").replace("\r", "\\r")
    return f"/{'' if starts else '(?s:.*)'}{written}{'' if ends else '(?s:.*)'}/"


def _has_bare(pattern: str, chars: str, *, outermost: bool = False) -> bool:
    """Whether the pattern contains one of these characters unescaped and outside character classes. outermost: only
    characters outside groups count.
    """
    is_escaped = in_class = False
    depth = 0
    for char in pattern:
        if is_escaped:
            is_escaped = False
        elif char == "\\":
            is_escaped = True
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in chars and not (outermost and depth):
            return True
        depth += (char == "(") - (char == ")")
    return False
