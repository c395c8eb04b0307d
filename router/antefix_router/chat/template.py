"""A tokenizer's own chat template (Jinja), as Hugging Face directories have it. Sandboxed: it came with a download.

The template sees the contents with a private mark inside everything that reads like a special token, and the marks cut
the rendered text where it must not be read as one: so no message can speak as somebody else.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from antefix.errors import InvalidRequest, ModelError
from antefix_router.chat.chat_formats import OutputParser, PlainParser
from antefix_router.chat.grammar import json_grammar
from antefix_router.chat.messages import Conversation, Message, Piece, Special

# A noncharacter: no text that is valid for interchange has it, so it cannot come from outside; it is removed anyway.
_MARK: Final = "\ufdd0"


def template_of(model: Path) -> str | None:
    """The directory's template, or None."""
    if (model / "chat_template.jinja").is_file():
        return (model / "chat_template.jinja").read_text()
    path = model / "tokenizer_config.json"
    if not path.is_file():
        return None
    template = json.loads(path.read_text()).get("chat_template")
    return template if isinstance(template, str) else None


class TemplateFormat:
    """See the module. Answers are taken as plain text: how calls are written differs from template to template."""

    name = "template"
    supports_tools = False
    supports_reasoning = False

    def __init__(self, template: str, model: Path) -> None:
        """Raises:  ModelError: the template does not compile."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda text: datetime.now(UTC).strftime(text)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as err:
            raise ModelError(f"the chat template of {model} does not compile: {err}") from err
        self._names = _special_tokens(model)
        texts = sorted(set(_added_tokens(model)) | set(self._names.values()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(self, conversation: Conversation) -> list[Piece]:
        if conversation.tools or any(message.tool_calls for message in conversation.messages):
            raise InvalidRequest("this deployment has no tool calls for this model's chat template")
        if conversation.continue_last:
            raise InvalidRequest("this model's chat template cannot go on with an answer that was begun")
        try:
            text = self._template.render(
                messages=[self._escaped(message) for message in conversation.messages],
                add_generation_prompt=True,
                **self._names,
            )
        except jinja2.TemplateError as err:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {err}") from err
        # Each part is tokenized by itself, so nothing that a mark cut apart is read as one token.
        return [Special(text=part) for part in text.split(_MARK) if part]

    def parser(self, conversation: Conversation) -> OutputParser:
        return PlainParser()

    def grammar(self, conversation: Conversation) -> str:
        return json_grammar(conversation.response_schema) if conversation.answers_json else ""

    def _escaped(self, message: Message) -> dict[str, str]:
        text = message.content.replace(_MARK, "")
        if self._special is not None:
            text = self._special.sub(lambda match: match[0][:1] + _MARK + match[0][1:], text)
        return {"role": message.role.value, "content": text}


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _special_tokens(model: Path) -> dict[str, str]:
    """bos_token, eos_token and so on, as templates use them."""
    path = model / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    names = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str) and text:
            names[name] = text
    return names


def _added_tokens(model: Path) -> list[str]:
    path = model / "tokenizer.json"
    if not path.is_file():
        return []
    return [token["content"] for token in json.loads(path.read_text()).get("added_tokens", []) if token.get("content")]
