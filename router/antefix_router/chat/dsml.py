"""Parses DeepSeek-V4's answers as they arrive: reasoning, text, and tool calls in DSML.

A call is passed on piece by piece: its name, then its arguments as pieces of a JSON object. Markup never appears in the
text, neither complete nor cut off. A tool call is passed on as a call, or is left out if no client could execute it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any, Final

from antefix_router.chat.messages import CallDelta, Delta

DSML: Final = "｜DSML｜"
_THINK_END: Final = "</think>"
_TAGS: Final = (f"<{DSML}", f"</{DSML}")
_CALLS_END: Final = f"</{DSML}tool_calls>"
_INVOKE_END: Final = f"</{DSML}invoke>"
_PARAMETER_END: Final = f"</{DSML}parameter>"
# The previous model version called the block `function_calls`.
_TAG: Final = re.compile(rf"<(/?){DSML}([a-z_]*)([^<>\n]*)>")
# Longer than any name. Text that continues beyond this without an end is not a tag.
_TAG_CHARACTERS_MAX: Final = 512
_BLOCK_NAMES: Final = ("tool_calls", "function_calls")
_NAME: Final = re.compile(r'name="([^"]*)"')
_IS_TEXT: Final = re.compile(r'string="true"')


class DeepSeekV4Parser:
    """Parses one answer. Text that may begin a tag is held until it is clear whether it does.

    text -> block -> call -> value        each state reads `_waiting` and sets the next state
    """

    def __init__(self, *, in_reasoning: bool, has_tools: bool) -> None:
        self.in_reasoning = in_reasoning
        self._has_tools = has_tools
        self._waiting = ""
        self._state: Callable[[list[Delta]], bool] = self._text
        self._after_block = False
        self._call = _Call()

    def push(self, text: str) -> list[Delta]:
        self._waiting += text
        deltas: list[Delta] = []
        while self._state(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """The output is over. The held text is passed on as text, unless it is markup that was cut off."""
        text, self._waiting = self._waiting, ""
        if self._state != self._text:
            return []
        before, begun, tag = text.partition("<")
        if begun and (before.endswith("\n\n") or "｜" in tag):
            text = before.removesuffix("\n\n")
        return self._said(text)

    def _text(self, deltas: list[Delta]) -> bool:
        """State of the parser: reasoning or content, up to the next tag. Like all states of the parser, this one
        returns whether there is more to read now.
        """
        places = [self._waiting.find(tag) for tag in self._ends()]
        place = min((each for each in places if each >= 0), default=-1)
        if place < 0:
            # The block begins after an empty line, which is not part of the text before it.
            tags = (*self._ends(), *(f"\n\n{tag}" for tag in _TAGS))
            certain, self._waiting = _split_undecided(self._waiting, tags)
            deltas += self._said(certain)
            return False
        if self._waiting.startswith(_THINK_END, place):
            deltas += self._said(self._waiting[:place])
            self._waiting = self._waiting[place + len(_THINK_END) :]
            self.in_reasoning = False
            return True
        tag = _TAG.match(self._waiting, place)
        if tag is None:
            return self._wait_for_tag(place, deltas)
        closes, name, _ = tag.groups()
        opens_block = not closes and name in _BLOCK_NAMES
        before, self._waiting = self._waiting[:place], self._waiting[tag.end() :]
        if opens_block or (not closes and name == "invoke"):
            before = before.removesuffix("\n\n")
            # A call within reasoning is only a thought, and without tools no client could execute a call. Neither is
            # passed on.
            self._state = self._block if self._has_tools and not self.in_reasoning else self._hidden
            self._waiting = self._waiting if opens_block else tag.group() + self._waiting
        deltas += self._said(before)
        return True

    def _wait_for_tag(self, place: int, deltas: list[Delta]) -> bool:
        """The tag at `place` is still incomplete. The empty line before the tag may belong to the tag."""
        rest = self._waiting[place + 1 :]
        if len(rest) > _TAG_CHARACTERS_MAX or "\n" in rest or "<" in rest:
            # The tag can never become complete. Its beginning is dropped, and what follows is text.
            begun = next(tag for tag in _TAGS if self._waiting.startswith(tag, place))
            deltas += self._said(self._waiting[:place])
            self._waiting = self._waiting[place + len(begun) :]
            return True
        certain = self._waiting[:place].removesuffix("\n\n")
        deltas += self._said(certain)
        self._waiting = self._waiting[len(certain) :]
        return False

    def _ends(self) -> tuple[str, ...]:
        return (_THINK_END, *_TAGS) if self.in_reasoning else _TAGS

    def _said(self, text: str) -> list[Delta]:
        if self._after_block:
            text = text.lstrip()
        if not text:
            return []
        self._after_block = False
        return [Delta(reasoning=text) if self.in_reasoning else Delta(content=text)]

    def _hidden(self, deltas: list[Delta]) -> bool:
        """State of the parser: inside a block that is not passed on."""
        ends = (_CALLS_END, _THINK_END) if self.in_reasoning else (_CALLS_END,)
        found = sorted((place, end) for end in ends if (place := self._waiting.find(end)) >= 0)
        if not found:
            _, self._waiting = _split_undecided(self._waiting, ends)
            return False
        place, end = found[0]
        self._waiting = self._waiting[place + (len(end) if end == _CALLS_END else 0) :]
        return self._leave_block()

    def _leave_block(self) -> bool:
        self._state, self._after_block = self._text, True
        return True

    def _block(self, deltas: list[Delta]) -> bool:
        """State: between calls. Everything in such a block that is not a tag is dropped."""
        tag = self._next_tag()
        if tag is None:
            return False
        closes, name, attributes = tag.groups()
        if closes and name in _BLOCK_NAMES:
            return self._leave_block()
        if not closes and name == "invoke":
            self._call = _Call()
            deltas.append(Delta(call=self._call.begin(_name_in(attributes))))
            self._state = self._parameters
        return True

    def _parameters(self, deltas: list[Delta]) -> bool:
        """State of the parser: inside a call, between its parameters."""
        tag = self._next_tag()
        if tag is None:
            return False
        closes, name, attributes = tag.groups()
        if not closes and name == "parameter":
            piece = self._call.begin_value(_name_in(attributes), is_text=_IS_TEXT.search(attributes) is not None)
            deltas += _call_delta(piece)
            self._state = self._value
        elif name == "invoke" or (closes and name in _BLOCK_NAMES):
            # The call's own end, or a tag that implies it: the end of the block, or the beginning of the next call.
            deltas.append(Delta(call=self._call.end()))
            self._state = self._block
            if name != "invoke" or not closes:
                self._waiting = tag.group() + self._waiting
        return True

    def _value(self, deltas: list[Delta]) -> bool:
        """State: inside a parameter. A parameter ends only with its own closing tag, because its text may contain
        anything, including markup.
        """
        value, end, rest = self._waiting.partition(_PARAMETER_END)
        if end:
            self._waiting, self._state = rest, self._parameters
            deltas += _call_delta(self._call.add(value))
            deltas += _call_delta(self._call.end_value())
            return True
        value, self._waiting = _split_undecided(self._waiting, (_PARAMETER_END,))
        deltas += _call_delta(self._call.add(value))
        return False

    def _next_tag(self) -> re.Match[str] | None:
        """The next complete tag. The tag is removed from the held text together with everything before it."""
        tag = _TAG.search(self._waiting)
        if tag is not None:
            self._waiting = self._waiting[tag.end() :]
            return tag
        place = max(self._waiting.rfind(each) for each in _TAGS)
        self._waiting = self._waiting[place:] if place >= 0 else _split_undecided(self._waiting, _TAGS)[1]
        return None


class _Call:
    """The arguments of one call, written as JSON while they are read. The spacing is that of `json.dumps`, so that
    clients that parse the arguments and write them again send back the same text.
    """

    def __init__(self) -> None:
        self.id = f"call_{secrets.token_hex(12)}"
        self._names: set[str] = set()
        self._is_text = False
        self._is_repeated = False
        self._held = ""

    def begin(self, name: str) -> CallDelta:
        return CallDelta(id=self.id, name=name)

    def begin_value(self, name: str, *, is_text: bool) -> CallDelta:
        self._is_text, self._held = is_text, ""
        # If a parameter appears twice, the first one counts, because a JSON object cannot hold both.
        self._is_repeated = name in self._names
        if self._is_repeated:
            return CallDelta(id=self.id)
        separator = ", " if self._names else "{"
        self._names.add(name)
        return CallDelta(id=self.id, arguments=f"{separator}{_json(name)}: " + ('"' if is_text else ""))

    def add(self, text: str) -> CallDelta:
        """Add to a value. Text goes out at once. Any other value is held until it is complete, because only then it is
        known to be JSON.
        """
        if self._is_repeated:
            return CallDelta(id=self.id)
        if self._is_text:
            return CallDelta(id=self.id, arguments=_json(text)[1:-1])
        self._held += text
        return CallDelta(id=self.id)

    def end_value(self) -> CallDelta:
        if self._is_repeated:
            return CallDelta(id=self.id)
        return CallDelta(id=self.id, arguments='"' if self._is_text else _json(_value_of(self._held)))

    def end(self) -> CallDelta:
        return CallDelta(id=self.id, arguments="}" if self._names else "{}", is_last=True)


def _value_of(text: str) -> Any:
    """The value of a parameter marked as JSON; the text itself if it is not JSON."""
    try:
        value = json.loads(text)
        # Python's parser accepts more than JSON allows: NaN, numbers without a bound, halves of surrogate pairs.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    return value


def _call_delta(piece: CallDelta) -> list[Delta]:
    return [Delta(call=piece)] if piece.arguments else []


def _name_in(attributes: str) -> str:
    found = _NAME.search(attributes)
    return found.group(1) if found is not None else ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _split_undecided(text: str, tags: tuple[str, ...]) -> tuple[str, str]:
    """Split the text into the part that is certain, and the longest end that may be the beginning of a tag."""
    for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return text[:-size], text[-size:]
    return text, ""
