"""The small model's format: a token for the speaker, the text, a token for its end. No tools, no reasoning.

<|bos|> [system text <|end|>] (<|user|> text <|end|> <|assistant|> text <|end|>)* <|user|> text <|end|> <|assistant|>
"""

from __future__ import annotations

from typing import Final

from antefix.errors import InvalidRequest
from antefix_router.chat.answer_grammar import json_grammar
from antefix_router.chat.chat_formats import OutputParser, PlainParser
from antefix_router.chat.messages import (
    Answer,
    Aside,
    ChatRole,
    Conversation,
    Effort,
    Piece,
    Plain,
    Special,
    end_of,
    plain_of,
)

_NO_TOOLS: Final = (
    "this model cannot call tools, because its chat format is plain: send none, or start the router with a --model "
    "whose format has them, or with --chat-format deepseek-v4"
)


class PlainFormat:
    """The format described above."""

    name = "plain"
    supports_reasoning = False
    is_program = False

    def render(self, conversation: Conversation) -> list[Piece]:
        if conversation.tools:
            raise InvalidRequest(_NO_TOOLS)
        pieces: list[Piece] = [Special(text="<|bos|>")]
        last = len(conversation.messages) - 1
        is_head = True
        for index, message in enumerate(conversation.messages):
            if message.role is ChatRole.TOOL or message.tool_calls:
                raise InvalidRequest(_NO_TOOLS)
            is_head &= message.role is ChatRole.SYSTEM
            if message.role is ChatRole.ASSISTANT:
                pieces += _aside(conversation, is_last=index == last and conversation.continue_last)
            if not is_head:
                # System text has no token of its own. At the head it has no speaker token; later it is written like a
                # user's turn.
                pieces.append(Special(text="<|assistant|>" if message.role is ChatRole.ASSISTANT else "<|user|>"))
            text = plain_of(message)
            pieces.append(Answer(message=message, pieces=(text,)) if message.role is ChatRole.ASSISTANT else text)
            pieces += end_of(message)
            if index == last and conversation.continue_last:
                return pieces
            pieces.append(Special(text="<|end|>"))
        return [*pieces, *_aside(conversation, is_last=True), Special(text="<|assistant|>")]

    def parser(self, conversation: Conversation) -> OutputParser:
        return PlainParser()

    def grammar(self, conversation: Conversation) -> str:
        """The model is not told about a schema. Only the grammar makes the model's answer satisfy the schema."""
        return json_grammar(conversation.response_schema) if conversation.answers_json else ""

    def mode_name(self, effort: Effort) -> str:
        return "off"


def _aside(conversation: Conversation, *, is_last: bool) -> list[Piece]:
    """The text that changes with each request, as a separate user turn."""
    if not conversation.aside:
        return []
    said = Special(text="<|user|>"), Plain(text=conversation.aside), Special(text="<|end|>")
    return [Aside(pieces=said if is_last else ())]
