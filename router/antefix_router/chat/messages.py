"""A conversation as every API's request is turned into, before it is written out for the model. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
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
class Message:
    """One turn. tool_call_id: which call a TOOL message answers.  breaks: cache breakpoints, as (characters of the
    content before it, lifetime in seconds)."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    breaks: tuple[tuple[int, float], ...] = ()


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
    of the answer, to be gone on with.  tools_break_s: lifetime of a cache breakpoint after the tools.
    strict: tools whose calls always keep to the schema.
    answers_json: the answer is JSON, which keeps to response_schema where there is one."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    effort: Effort = Effort.NONE
    continue_last: bool = False
    tools_break_s: float | None = None
    strict: frozenset[str] = frozenset()
    tool_rule: ToolRule = ANY_CALLS
    answers_json: bool = False
    response_schema: dict[str, Any] | None = None

    @property
    def has_form(self) -> bool:
        """Whether the answer may not be just anything."""
        return self.answers_json or (bool(self.tools) and (self.tool_rule.restricts or bool(self.strict)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """Text that the format writes itself: special tokens in it become their ids."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Text that came from outside: never read as special tokens, whatever it holds. breaks: as in `Message`."""

    text: str
    breaks: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole assistant turn, without the token that ends it; what the model wrote itself can be put in its place."""

    message: Message
    pieces: tuple[Special | Plain, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakpoint:
    """A cache breakpoint between pieces."""

    ttl_s: float


Piece = Special | Plain | Answer | Breakpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What some new output text adds to the answer. tool_call: a finished call; calls are not streamed in parts."""

    reasoning: str = ""
    content: str = ""
    tool_call: ToolCall | None = None
