"""A model's own chat template (Jinja), as found in Hugging Face model directories. The template runs in a sandbox,
because it may have been downloaded.

Inside message contents, a private mark is inserted into everything that looks like a special token. The rendered text
is cut at the marks before it is tokenized. So no message can pretend to be another speaker.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from antefix.checked_files import read_json, read_text
from antefix.errors import InvalidRequest, ModelError
from antefix_router.chat.answer_grammar import json_grammar
from antefix_router.chat.chat_formats import OutputParser, PlainParser
from antefix_router.chat.messages import (
    ChatRole,
    Conversation,
    Effort,
    Message,
    Piece,
    Special,
    TextBreakpoint,
    plain_of,
)
from antefix_router.chat.template_child import TEMPLATE_FAILS, Write, compiled
from antefix_router.chat.template_process import TemplateProcess, TemplateTooLong

# A noncharacter. It is not allowed in interchanged text, and is removed from incoming text anyway.
_MARK: Final = "\ufdd0"
# Another noncharacter, which marks a breakpoint.
_POINT: Final = "\ufdd1"


def template_of(model: Path) -> str | None:
    """The directory's template, or None."""
    if (model / "chat_template.jinja").is_file():
        return read_text(model / "chat_template.jinja", "chat template", error=ModelError)
    path = model / "tokenizer_config.json"
    if not path.is_file():
        return None
    template = _object(path).get("chat_template")
    return template if isinstance(template, str) else None


class TemplateFormat:
    """The format described above. Answers are treated as plain text, because each template writes tool calls in its own
    way.
    """

    name = "template"
    supports_reasoning = False

    def __init__(self, template: str, model: Path, *, bounded: bool = False) -> None:
        """bounded: run the template in a separate process with limits on time and memory; `render` then blocks until
        the process has answered.

        Raises:  ModelError: the template does not compile.
        """
        self.is_program = bounded
        try:
            self._write = _bounded(template) if bounded else compiled(template)
        except (*TEMPLATE_FAILS, TemplateTooLong) as err:
            raise ModelError(f"the chat template of {model} does not compile: {err!s:.300}") from err
        self._names = _special_tokens(model)
        texts = sorted(set(_added_tokens(model)) | set(self._names.values()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(self, conversation: Conversation) -> list[Piece]:
        if conversation.tools or any(message.tool_calls for message in conversation.messages):
            raise InvalidRequest("Antefix cannot read tool calls that are written in this model's chat template")
        if conversation.continue_last:
            raise InvalidRequest("this model's chat template cannot continue an answer of the assistant that was begun")
        messages = conversation.messages
        if conversation.aside:
            # The request-dependent text of earlier turns is lost, because a template has no place to put it back.
            messages = (*messages, Message(role=ChatRole.USER, content=conversation.aside))
        text = self._written(messages)
        places = self._breakpoints(messages, text)
        pieces: list[Piece] = []
        start = 0
        # Each part is tokenized separately, so text that a mark splits is never read as one token.
        for part in text.split(_MARK):
            end = start + len(part)
            inside = tuple(
                TextBreakpoint(ttl_s=ttl_s, offset=place - start) for place, ttl_s in places if start < place <= end
            )
            pieces += [Special(text=part, breakpoints=inside)] if part else []
            start = end + len(_MARK)
        return pieces

    def _breakpoints(self, messages: tuple[Message, ...], text: str) -> list[tuple[int, float]]:
        """The breakpoints' positions in the rendered text. The conversation is rendered a second time with a character
        at each breakpoint. If the template does anything but copy this character, the prompt has no breakpoints,
        because the prompt must not depend on them.
        """
        lifetimes = [each.ttl_s for message in messages for each in _sorted(message)]
        if not lifetimes:
            return []
        parts = self._written(tuple(_pointed(message) for message in messages), pointed=True).split(_POINT)
        if "".join(parts) != text or len(parts) != len(lifetimes) + 1:
            return []
        ends = itertools.accumulate(len(part) for part in parts[:-1])
        return list(zip(ends, lifetimes, strict=True))

    def _written(self, messages: tuple[Message, ...], *, pointed: bool = False) -> str:
        """Render the messages. Templates accept system text in different ways: as it is, as a user's turn, or as part
        of one.

        pointed: the messages hold breakpoint characters, which are kept.
        """
        refusal: Exception | None = None
        for form in (messages, _as_user(messages), _joined(_as_user(messages))):
            try:
                given = [self._escaped(message, pointed=pointed) for message in form]
                return self._write({"messages": given, "add_generation_prompt": True, **self._names})
            except TEMPLATE_FAILS as err:
                refusal = refusal or err
        raise InvalidRequest(
            f"the model's chat template refuses this conversation: {str(refusal) or type(refusal).__name__:.300}"
        ) from refusal

    def parser(self, conversation: Conversation) -> OutputParser:
        return PlainParser()

    def grammar(self, conversation: Conversation) -> str:
        return json_grammar(conversation.response_schema) if conversation.answers_json else ""

    def mode_name(self, effort: Effort) -> str:
        return "off"

    def _escaped(self, message: Message, *, pointed: bool) -> dict[str, str]:
        text = plain_of(message).text.replace(_MARK, "")
        text = text if pointed else text.replace(_POINT, "")
        if self._special is not None:
            text = self._special.sub(lambda match: match[0][:1] + _MARK + match[0][1:], text)
        return {"role": message.role.value, "content": text}


def _sorted(message: Message) -> list[TextBreakpoint]:
    end = len(message.content)
    return sorted(message.breakpoints, key=lambda each: end if each.offset is None else each.offset)


def _pointed(message: Message) -> Message:
    """The message with a character at each of its breakpoints."""
    text, start = "", 0
    for each in _sorted(message):
        end = len(message.content) if each.offset is None else each.offset
        text += message.content[start:end].replace(_POINT, "") + _POINT
        start = end
    return replace(message, content=text + message.content[start:].replace(_POINT, ""), breakpoints=())


def _as_user(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with system text after the head turned into user messages."""
    head = next((i for i, message in enumerate(messages) if message.role is not ChatRole.SYSTEM), len(messages))
    later = (replace(each, role=ChatRole.USER) if each.role is ChatRole.SYSTEM else each for each in messages[head:])
    return (*messages[:head], *later)


def _joined(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Merge adjacent turns of the same role. Some templates require user and assistant to alternate."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role is message.role:
            text = f"{plain_of(joined[-1]).text}\n\n{plain_of(message).text}"
            joined[-1] = Message(role=message.role, content=text)
        else:
            joined.append(message)
    return tuple(joined)


def _bounded(template: str) -> Write:
    process = TemplateProcess(template)
    process.check()
    return process


def _special_tokens(model: Path) -> dict[str, str]:
    """The special tokens that templates use, such as bos_token and eos_token."""
    path = model / "tokenizer_config.json"
    config = _object(path) if path.is_file() else {}
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
    added = _object(path).get("added_tokens") or []
    texts = [token.get("content") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [text for text in texts if isinstance(text, str) and text]


def _object(path: Path) -> dict[str, Any]:
    """Raises:  ModelError: the file holds something else."""
    value = read_json(path, "file of the model", error=ModelError)
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold one JSON object")
    return value
