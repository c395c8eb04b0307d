"""Finds the part of a request that a token comes from: a JSON path and a line. This module knows no store and no
ledger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from antefix.block import TokenArray
from antefix.tokenizer import Tokenizer
from antefix_router.chat.render import TextSpan

# Characters shown on each side of a place: a line of a tool definition can be a whole schema.
_SHOWN_CHARACTERS: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """One place in a prompt. path: the request field that it comes from; empty if the chat format wrote it.
    line: the line within that field's text, from 1.  shown: the text there, with « before the token.
    """

    token: int
    path: str
    line: int
    shown: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcedPrompt:
    """name: the prompt's name in an explanation.  body: the request, if there is one.  spans: the origin of its
    tokens.
    """

    name: str
    tokens: TokenArray
    tokenizer: Tokenizer
    body: Any = None
    spans: tuple[TextSpan, ...] = ()

    def spot(self, token: int) -> Spot | None:
        """Where the token at this index comes from; None if the index is after the prompt's end."""
        if token >= len(self.tokens):
            return None
        index = next((i for i, span in enumerate(self.spans) if span.start <= token < span.end), -1)
        if index < 0:
            text, at = self._window(token)
            return Spot(token=token, path="", line=0, shown=_shown(text, at))
        span = self.spans[index]
        at = min(len(span.text), len(self._text(span.start, token)))
        path, field_text, offset = self._field(index, at)
        line = field_text.count("\n", 0, offset) + 1 if path else 0
        return Spot(token=token, path=path, line=line, shown=_shown(span.text, at))

    def _field(self, index: int, at: int) -> tuple[str, str, int]:
        """The request field whose text covers position `at` of a piece: its path, its text, the position in that
        text.
        """
        text, leaves = self.spans[index].text, list(_leaves(self.body))
        covering = _covering(text, at, leaves)
        if covering:
            # If several fields have the same text, they are taken in order.
            earlier = sum(span.text == text for span in self.spans[:index])
            number, written, offset = covering[min(earlier, len(covering) - 1)]
            return leaves[number][0], written, offset
        # The piece may be a part of a field, such as one parameter of a call's arguments: take the first field that
        # contains it, after the last field that is identified.
        known = max((number for span in self.spans[:index] for number in _fields_of(span.text, leaves)), default=-1)
        holding = [number for number, (_, said) in enumerate(leaves) if text.strip() and text in said]
        chosen = next((number for number in holding if number > known), holding[-1] if holding else None)
        if chosen is None:
            return "", "", 0
        path, said = leaves[chosen]
        return path, said, said.find(text) + at

    def _window(self, token: int) -> tuple[str, int]:
        before = self._text(max(0, token - _SHOWN_CHARACTERS), token)
        return before + self._text(token, token + _SHOWN_CHARACTERS), len(before)

    def _text(self, start: int, end: int) -> str:
        return self.tokenizer.decode([int(token) for token in self.tokens[start:end]])


def _covering(text: str, at: int, leaves: list[tuple[str, str]]) -> list[tuple[int, str, int]]:
    """(number of a field, its text in the piece, the position in that text) of the longest fields that cover a position
    of a piece. Shorter fields that match are mostly words that occur in the piece by chance.
    """
    found: list[tuple[int, str, int]] = []
    for number, (_, said) in enumerate(leaves):
        for written in {said, json.dumps(said, ensure_ascii=False)[1:-1]} - {""}:
            start = text.find(written)
            while start >= 0:
                if start <= at < start + len(written) or at == len(text) == start + len(written):
                    found.append((number, written, at - start))
                start = text.find(written, start + len(written))
    longest = max((len(written) for _, written, _ in found), default=0)
    return [each for each in found if len(each[1]) == longest]


def _fields_of(text: str, leaves: list[tuple[str, str]]) -> list[int]:
    """The field of the messages that equals the whole piece, if there is exactly one."""
    numbers = [number for number, (path, said) in enumerate(leaves) if said == text and not path.startswith("tools")]
    return numbers if len(numbers) == 1 else []


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a request, with their JSON paths."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")


def _shown(text: str, at: int) -> str:
    """The line around a position, cut on both sides. Terminal control characters are escaped."""
    start = max(text.rfind("\n", 0, at) + 1, at - _SHOWN_CHARACTERS)
    ends = text.find("\n", at)
    end = min(len(text) if ends < 0 else ends, at + _SHOWN_CHARACTERS)
    whole = f"{text[start:at]}«{text[at : max(end, at)]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in whole)
