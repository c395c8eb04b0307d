"""Reading DeepSeek-V4's answers: reasoning, text, and tool calls in DSML. Text that is no valid call stays text."""

from __future__ import annotations

import json
import re
import secrets
from typing import Final

from antefix_router.chat.messages import Delta, ToolCall

DSML: Final = "｜DSML｜"
_THINK_END: Final = "</think>"
_CALLS: Final = f"<{DSML}tool_calls>"
_CALLS_END: Final = f"</{DSML}tool_calls>"
_INVOKE: Final = re.compile(rf'\s*<{DSML}invoke name="(.*?)">\n(.*?)\n?</{DSML}invoke>', re.DOTALL)
_PARAMETER: Final = re.compile(
    rf'\s*<{DSML}parameter name="(.*?)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL
)


class DeepSeekV4Parser:
    """One answer. Text that may be the beginning of a tag waits until that is decided."""

    def __init__(self, *, in_reasoning: bool, has_tools: bool) -> None:
        self.in_reasoning = in_reasoning
        self._has_tools = has_tools
        self._waiting = ""
        self._calls: str | None = None

    def push(self, text: str) -> list[Delta]:
        self._waiting += text
        deltas: list[Delta] = []
        if self.in_reasoning:
            deltas += self._reasoning()
        if not self.in_reasoning and self._calls is None:
            deltas += self._content()
        if self._calls is not None:
            self._calls, self._waiting = self._calls + self._waiting, ""
            if _CALLS_END in self._calls:
                deltas += self._end_calls()
        return deltas

    def finish(self) -> list[Delta]:
        """The output is over: what waited is what it looks like."""
        text, self._waiting = self._waiting, ""
        if self._calls is not None:
            text, self._calls = "\n\n" + _CALLS + self._calls, None
        if not text:
            return []
        return [Delta(reasoning=text) if self.in_reasoning else Delta(content=text)]

    def _reasoning(self) -> list[Delta]:
        before, tag, after = self._waiting.partition(_THINK_END)
        if tag:
            self.in_reasoning, self._waiting = False, after
            return [Delta(reasoning=before)] if before else []
        shown, self._waiting = _split_undecided(self._waiting, (_THINK_END,))
        return [Delta(reasoning=shown)] if shown else []

    def _content(self) -> list[Delta]:
        if not self._has_tools:
            shown, self._waiting = self._waiting, ""
            return [Delta(content=shown)] if shown else []
        before, tag, after = self._waiting.partition(_CALLS)
        if tag:
            self._calls, self._waiting = "", after
            before = before.removesuffix("\n\n")
            return [Delta(content=before)] if before else []
        # The block begins after an empty line, which is not part of the text before it.
        shown, self._waiting = _split_undecided(self._waiting, ("\n\n" + _CALLS, _CALLS))
        return [Delta(content=shown)] if shown else []

    def _end_calls(self) -> list[Delta]:
        assert self._calls is not None
        body, _, rest = self._calls.partition(_CALLS_END)
        self._calls = None
        calls = parse_calls(body)
        if calls is None:
            return [Delta(content=f"\n\n{_CALLS}{body}{_CALLS_END}{rest}")]
        deltas = [Delta(tool_call=call) for call in calls]
        return [*deltas, Delta(content=rest)] if rest.strip() else deltas


def parse_calls(body: str) -> list[ToolCall] | None:
    """The calls of a `tool_calls` block's inside, or None where it is not well formed."""
    calls: list[ToolCall] = []
    position = 0
    while match := _INVOKE.match(body, position):
        arguments = _arguments(match.group(2))
        if arguments is None:
            return None
        calls.append(ToolCall(id=f"call_{secrets.token_hex(12)}", name=match.group(1), arguments=arguments))
        position = match.end()
    return calls if calls and not body[position:].strip() else None


def _arguments(text: str) -> str | None:
    values: dict[str, object] = {}
    position = 0
    while match := _PARAMETER.match(text, position):
        name, is_text, value = match.groups()
        if name in values:
            return None
        try:
            values[name] = value if is_text == "true" else json.loads(value)
        except ValueError:
            return None
        position = match.end()
    return json.dumps(values, ensure_ascii=False) if not text[position:].strip() else None


def _split_undecided(text: str, tags: tuple[str, ...]) -> tuple[str, str]:
    """Text that is certain, and the longest end of it that may begin one of the tags."""
    for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return text[:-size], text[-size:]
    return text, ""
