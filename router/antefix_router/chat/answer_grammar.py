"""What an answer has to be, as a grammar in the engine's Lark dialect. Pure text; `router.grammar_check` tries it out.

One grammar spans the whole answer, its reasoning included: so what comes after the reasoning is held to its form, and
nobody else needs to know where reasoning ends.
"""

from __future__ import annotations

import json
from typing import Any, Final

import llguidance

from antefix_router.chat.schema import UnusableSchema, prepared

# One way to write each value: a model that may put white space anywhere may continue with it for ever.
_WRITTEN: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def quoted(text: str) -> str:
    """A text as the grammar's literal."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any) -> str:
    """A JSON value that keeps to a prepared schema."""
    if schema is False:
        raise UnusableSchema("no value keeps to it")
    return "%json " + json.dumps({**({} if schema is True else schema), "x-guidance": _WRITTEN}, ensure_ascii=False)


def json_answer(schema: dict[str, Any] | None) -> str:
    """The rule of an answer that is JSON; without a schema any object.  Raises:  UnusableSchema"""
    return json_rule({"type": "object"} if schema is None else prepared(schema, strict=True))


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of an answer that is nothing but JSON.  Raises:  UnusableSchema"""
    return f"start: {json_answer(schema)}\n"


def search_regex(pattern: str) -> str:
    """A schema's `pattern` as a regex of the whole text: it may be found anywhere in it, but for its anchors.

    Raises:  UnusableSchema: anchors elsewhere than at its ends.
    """
    body = pattern.removeprefix("^")
    starts, ends = len(body) < len(pattern), body.endswith("$") and not body.endswith("\\$")
    body = body.removesuffix("$") if ends else body
    if _has_bare(body, "^$") or ((starts or ends) and _has_bare(body, "|", outermost=True)):
        raise UnusableSchema(f"the pattern {pattern!r} cannot be enforced: anchors belong at its ends")
    written = llguidance.regex_to_lark(f"(?:{body})", "dw")
    # The engine would take an empty line, or a comment, for the rule's end.
    written = written.replace("\n", "\\n").replace("\r", "\\r")
    return f"/{'' if starts else '(?s:.*)'}{written}{'' if ends else '(?s:.*)'}/"


def _has_bare(pattern: str, chars: str, *, outermost: bool = False) -> bool:
    """Whether one of the characters stands in it unescaped and in no class; outermost: in no group either."""
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
