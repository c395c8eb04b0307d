"""The interface of chat formats, which write a conversation for a model."""

from __future__ import annotations

from typing import Protocol

from antefix_router.chat.messages import Conversation, Delta, Effort, Piece


class OutputParser(Protocol):
    """Parses an answer's text as it arrives. `push` and `finish` return the parts of the answer that are certain;
    undecided text waits.
    """

    in_reasoning: bool

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class ChatFormat(Protocol):
    """One model family's chat format. As far as the format allows, the rendering of a longer conversation begins with
    the rendering of the shorter one. Because of the common beginning, the next turn of a conversation can hit.
    """

    name: str
    supports_reasoning: bool
    # Rendering runs a template from outside, which may be slow, so it must not run in the event loop.
    is_program: bool

    def render(self, conversation: Conversation) -> list[Piece]:
        """Write the conversation.  Raises:  InvalidRequest: the chat format cannot express this conversation."""

    def parser(self, conversation: Conversation) -> OutputParser: ...

    def grammar(self, conversation: Conversation) -> str:
        """The grammar of an answer that `parser` can read and that has the form the conversation asks for; empty: any
        answer.

        Raises:  UnusableSchema: a schema in the conversation cannot be enforced.
        """

    def mode_name(self, effort: Effort) -> str:
        """The thinking mode, in the words that clients and bills use: "off", "low", "high" or "max"."""


def mode_name(effort: Effort) -> str:
    """The name of the thinking mode, in a format that distinguishes all efforts."""
    return "off" if effort is Effort.NONE else effort.value


class PlainParser:
    """Treats all text as content."""

    in_reasoning = False

    def push(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        return []
