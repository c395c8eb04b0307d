"""A conversation as every API's request is turned into, before it is written out for the model. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ChatRole(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Effort(StrEnum):
    """How much the model reasons before it answers. LOW to MAX think; NONE does not."""

    NONE = "none"
    LOW = "low"
    HIGH = "high"
    MAX = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """arguments: JSON text, as the model wrote it or the client sent it back."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBreakpoint:
    """A client's cache breakpoint: all before it is to be kept for `ttl_s`.

    offset: characters of the text before it; None: it stands at the end of whatever it is given with.
    """

    ttl_s: float
    offset: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. name: who speaks, where several do.  tool_call_id: which call a TOOL message answers.
    breakpoints: within `content`, or at the end of the whole turn.
    part_starts: where in `content` its parts begin, where it came in parts."""

    role: ChatRole
    content: str = ""
    name: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    breakpoints: tuple[TextBreakpoint, ...] = ()
    part_starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRule:
    """must_call: the answer is calls. names: of these tools only; None: of all. parallel: of several at once."""

    must_call: bool = False
    names: frozenset[str] | None = None
    parallel: bool = True

    @property
    def restricts(self) -> bool:
        return self.must_call or self.names is not None or not self.parallel

    def may_call(self, name: str) -> bool:
        return self.names is None or name in self.names


ANY_CALLS = ToolRule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """tools: JSON schemas as {"name", "description", "parameters"}.  continue_last: the last message is the beginning
    of the answer, to be continued.  tools_breakpoint: after the tools.
    strict: tools whose calls always keep to the schema.  deferred: tools that are not listed: they stand where they
    were found, in what a tool gave.
    answers_json: the answer is JSON, which keeps to response_schema where there is one.
    aside: text that changes with every request, and is said last.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    effort: Effort = Effort.NONE
    continue_last: bool = False
    tools_breakpoint: TextBreakpoint | None = None
    strict: frozenset[str] = frozenset()
    deferred: frozenset[str] = frozenset()
    tool_rule: ToolRule = ANY_CALLS
    answers_json: bool = False
    response_schema: dict[str, Any] | None = None
    aside: str = ""

    @property
    def listed_tools(self) -> tuple[dict[str, Any], ...]:
        return tuple(tool for tool in self.tools if tool["name"] not in self.deferred)

    @property
    def has_form(self) -> bool:
        """Whether the answer may not be just anything."""
        return self.answers_json or (bool(self.tools) and (self.tool_rule.restricts or bool(self.strict)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """Text that the format writes itself: special tokens in it become their ids. breakpoints: within it."""

    text: str
    breakpoints: tuple[TextBreakpoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Text that came from outside: never read as special tokens, whatever it holds. breakpoints: within it."""

    text: str
    breakpoints: tuple[TextBreakpoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole assistant turn, without the token that ends it; what the model wrote itself can be put in its place."""

    message: Message
    pieces: tuple[Special | Plain, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """What changes with every request, at the end of the turn before an answer. Without pieces it is an earlier turn's:
    the client does not send that again, and what stood there then is put there again, or its answer could not hit."""

    pieces: tuple[Special | Plain, ...] = ()


# A breakpoint as a piece stands between its neighbours.
Piece = Special | Plain | Answer | TextBreakpoint | Aside


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """What some new output text adds to a tool call. The pieces of `arguments` together are a JSON object.

    name: with the call's first piece only.  is_last: the call is whole; a call without a last piece was cut off.
    """

    id: str
    name: str = ""
    arguments: str = ""
    is_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What some new output text adds to the answer: one of the three."""

    reasoning: str = ""
    content: str = ""
    call: CallDelta | None = None


def plain_of(message: Message) -> Plain:
    """A turn's content, with who says it. Breakpoints at the turn's end are not in it: see `end_of`."""
    said_by = f"{message.name}: " if message.name else ""
    inside = tuple(
        TextBreakpoint(ttl_s=each.ttl_s, offset=len(said_by) + each.offset)
        for each in message.breakpoints
        if each.offset is not None
    )
    return Plain(text=said_by + message.content, breakpoints=inside)


def end_of(message: Message) -> list[Piece]:
    """The breakpoints at the end of a turn."""
    return [each for each in message.breakpoints if each.offset is None]
