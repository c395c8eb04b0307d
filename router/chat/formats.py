"""How a conversation is written for a model: the interface of all formats, and the choice among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from antefix.errors import ConfigError
from antefix.tokenizer import ByteTokenizer, Tokenizer
from router.chat.messages import Conversation, Delta, Piece


class OutputParser(Protocol):
    """Takes an answer's text as it comes. `push` and `finish` give what is certain; the rest waits."""

    in_reasoning: bool

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class ChatFormat(Protocol):
    """One model family's way of writing. Rendering a longer conversation begins with the shorter one's rendering, as
    far as the format itself allows: that is what makes the next turn hit."""

    name: str
    supports_tools: bool
    supports_reasoning: bool

    def render(self, conversation: Conversation) -> list[Piece]:
        """Raises:  InvalidRequest: the format has no way to write this."""

    def parser(self, conversation: Conversation) -> OutputParser: ...


class PlainParser:
    """All text is content."""

    in_reasoning = False

    def push(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


def choose_format(name: str, model: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The format by setting; "auto" looks at the model directory: its own template, then V4, then plain.

    Raises:  ConfigError: the model directory has no template but one was asked for.
    """
    from router.chat.deepseek_v4 import EFFORTS_0731, DeepSeekV4Format
    from router.chat.plain import PlainFormat
    from router.chat.template import TemplateFormat, template_of

    template = template_of(model)
    if name == "auto":
        if template is not None:
            name = "template"
        elif isinstance(tokenizer, ByteTokenizer):
            name = "plain"
        else:
            name = _deepseek_v4(model) or "plain"
    if name == "template":
        if template is None:
            raise ConfigError(f"--chat-format template: {model} has no chat template")
        return TemplateFormat(template, model)
    if name == "deepseek-v4-0731":
        return DeepSeekV4Format(EFFORTS_0731)
    return DeepSeekV4Format() if name == "deepseek-v4" else PlainFormat()


def _deepseek_v4(model: Path) -> str:
    """The format of a V4 checkpoint, or empty. Its config does not tell the later checkpoint from the first; the
    encoder that is shipped beside it does, and else its name."""
    config = json.loads((model / "config.json").read_text())
    if config.get("model_type") != "deepseek_v4":
        return ""  # DeepSeek-V4.1 ("deepseek_v41") is another architecture with another format
    encoders = list((model / "encoding").glob("*.py"))
    is_later = "0731" in model.name
    if encoders:
        is_later = any("Beyond maximum" in path.read_text(errors="replace") for path in encoders)
    return "deepseek-v4-0731" if is_later else "deepseek-v4"
