"""How a conversation is written for a model: what all formats have in common."""

from __future__ import annotations

from typing import Protocol

from antefix_router.chat.messages import Conversation, Delta, Effort, Piece


class OutputParser(Protocol):
    """Takes an answer's text as it comes. `push` and `finish` give what is certain; the rest waits."""

    in_reasoning: bool

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class ChatFormat(Protocol):
    """One model family's way of writing. Rendering a longer conversation begins with the shorter one's rendering, as
    far as the format itself allows: that is what makes the next turn hit."""

    name: str
    supports_reasoning: bool
    # Writing runs somebody else's program, which may take its time: not for an event loop.
    is_program: bool

    def render(self, conversation: Conversation) -> list[Piece]:
        """Raises:  InvalidRequest: the format has no way to write this."""

    def parser(self, conversation: Conversation) -> OutputParser: ...

    def grammar(self, conversation: Conversation) -> str:
        """What the answer has to be so that `parser` reads what the conversation asks for; empty: anything.

        Raises:  UnusableSchema: a schema in it cannot be enforced.
        """

    def mode_name(self, effort: Effort) -> str:
        """What clients and bills are told of how the model thought: "off", "low", "high" or "max"."""


def mode_name(effort: Effort) -> str:
    """As clients and bills have it, where a format tells all efforts apart."""
    return "off" if effort is Effort.NONE else effort.value


class PlainParser:
    """All text is content."""

    in_reasoning = False

    def push(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        return []
