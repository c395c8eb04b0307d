"""A conversation, into which the requests of all APIs are converted before it is written for the model. Pure values."""

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
    """How much the model reasons before it answers. The efforts LOW to MAX let the model think; NONE does not."""

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
    """A client's cache breakpoint: the prompt before it is to be kept for `ttl_s` seconds.

    offset: how many characters of the text lie before the breakpoint. None: the breakpoint is at the end of the
    message, of the tools or of the other part that has it.
    """

    ttl_s: float
    offset: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn.  name: the speaker, if there are several.  tool_call_id: the call that a TOOL message answers.
    breakpoints: positions within `content`, or at the end of the whole turn.
    part_starts: offsets in `content` at which its parts begin, if it came in parts.
    """

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
    """must_call: the answer has to be tool calls.  names: only these tools may be called; None: all.  parallel: the
    answer may hold several calls.
    """

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
    of the answer, to be continued.  tools_breakpoint: a breakpoint after the tools.
    strict: tools whose calls must satisfy their schema.  deferred: tools that are not in the list; they are shown
    inside the tool result that found them.
    answers_json: the answer must be JSON, which satisfies response_schema if there is one.
    aside: text that changes with every request, and is placed last.
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
        """Whether the answer must have a certain form."""
        return self.answers_json or (bool(self.tools) and (self.tool_rule.restricts or bool(self.strict)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """Text written by the format itself. Special tokens in this text become their ids. breakpoints: positions within
    the text.
    """

    text: str
    breakpoints: tuple[TextBreakpoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Text from outside. Nothing in this text is read as a special token. breakpoints: positions within the text."""

    text: str
    breakpoints: tuple[TextBreakpoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole turn of the assistant, without its end token. The tokens that the model generated can replace it."""

    message: Message
    pieces: tuple[Special | Plain, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """Text that changes with every request, at the end of the turn before an answer. Without pieces, it marks the
    changing text of an earlier turn: the client does not send that text again, and it must be restored so that the
    answer after it can hit.
    """

    pieces: tuple[Special | Plain, ...] = ()


# A breakpoint among the pieces marks the place between its neighbours.
Piece = Special | Plain | Answer | TextBreakpoint | Aside


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """The addition that new output text makes to a tool call. The pieces of `arguments`, joined, are a JSON object.

    name: set only in the call's first piece. is_last: the call is complete. If no last piece came, the call was cut
    off.
    """

    id: str
    name: str = ""
    arguments: str = ""
    is_last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The addition that new output text makes to the answer. Exactly one of the three fields is set."""

    reasoning: str = ""
    content: str = ""
    call: CallDelta | None = None


def plain_of(message: Message) -> Plain:
    """A turn's content with the name of its speaker. Breakpoints at the turn's end are not part of the content: see
    `end_of`.
    """
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
